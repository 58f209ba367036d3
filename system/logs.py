"""Log lines: on the terminal, and in the log.txt of a run's folder once there is one."""

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from system.escaping import SafeFormatter


class RunLogHandler(logging.FileHandler):
    """Writes a run's log.txt. A class of its own, so that it can be found among handlers."""


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        # The terminal may be gone, or the reader of a pipe; log.txt still gets the line.
        with suppress(OSError, ValueError):
            tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to_terminal(is_main: bool, level: int) -> Iterator[None]:
    """Show log lines from `level` on; on processes other than the main one, errors only.

    The main process also keeps its lines in memory until `log_to_file` names a file for them:
    nothing is written before the inputs have been checked.
    """
    root = logging.getLogger()
    level_before = root.level
    root.setLevel(level if is_main else logging.ERROR)
    kept = [_keep_log_lines()] if is_main else []
    try:
        with showing_log_lines():
            yield
    finally:
        root.setLevel(level_before)
        for handler in root.handlers[:]:
            if handler in kept or isinstance(handler, RunLogHandler):
                root.removeHandler(handler)
                handler.close()


@contextmanager
def showing_log_lines() -> Iterator[None]:
    """Inside, log lines are shown on the terminal."""
    handler = _TerminalHandler()
    handler.setFormatter(SafeFormatter("%(message)s"))
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)
        handler.close()


def _keep_log_lines() -> logging.Handler:
    """Keep log lines in memory from now on, however many; returns the handler that does it."""
    never = logging.CRITICAL + 1
    handler = logging.handlers.MemoryHandler(sys.maxsize, flushLevel=never, flushOnClose=False)
    logging.getLogger().addHandler(handler)
    return handler


def log_to_file(folder: Path) -> None:
    """Write all log lines so far, and from now on, to the folder's log.txt."""
    file = RunLogHandler(folder / "log.txt", encoding="utf-8")
    file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for handler in root.handlers[:]:
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
            root.removeHandler(handler)
    root.addHandler(file)
