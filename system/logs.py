"""Log lines: on the terminal, and in the log.txt of a run's folder once there is one."""

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from system.escaping import SafeFormatter

MAX_BUFFERED_LINES = 10_000


class RunLogHandler(logging.FileHandler):
    """Writes log.txt of a run. A class of its own, so that it can be found among handlers."""


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to_terminal(is_main: bool, level: int) -> Iterator[None]:
    """Show log lines from `level` on; on processes other than the main one, errors only.

    The main process also keeps its lines in memory until `log_to_file` names a file for them:
    nothing is written before the inputs have been checked.
    """
    root = logging.getLogger()
    level_before = root.level
    handlers = [_terminal_handler(), _buffering_handler()] if is_main else []
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level if is_main else logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level_before)
        for handler in root.handlers[:]:
            if handler in handlers or isinstance(handler, RunLogHandler):
                root.removeHandler(handler)
                handler.close()


def _terminal_handler() -> logging.Handler:
    handler = _TerminalHandler()
    handler.setFormatter(SafeFormatter("%(message)s"))
    return handler


def _buffering_handler() -> logging.Handler:
    """Keeps lines until it gets a target: no level is high enough to flush it."""
    never = logging.CRITICAL + 1
    return logging.handlers.MemoryHandler(MAX_BUFFERED_LINES, flushLevel=never, flushOnClose=False)


def log_to_file(folder: Path) -> None:
    """Write all log lines so far, and from now on, to the folder's log.txt."""
    file = RunLogHandler(folder / "log.txt", encoding="utf-8")
    file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    buffers = [one for one in root.handlers if isinstance(one, logging.handlers.MemoryHandler)]
    for buffered in buffers:
        buffered.setTarget(file)
        buffered.flush()
        root.removeHandler(buffered)
    root.addHandler(file)
