"""Log lines: on the terminal, and in the log.txt of a run's folder once there is one."""

import logging
import logging.handlers
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from system.escaping import SafeFormatter


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def logging_to_terminal(is_main: bool, level: int) -> Iterator[None]:
    root = logging.getLogger()
    before, handlers = root.level, []
    if is_main:
        terminal = _TerminalHandler()
        terminal.setFormatter(SafeFormatter("%(message)s"))
        # Keeps the lines until the run has a folder: nothing is written before the inputs have been checked.
        early = logging.handlers.MemoryHandler(
            capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        handlers = [terminal, early]
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level if is_main else logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in root.handlers[:]:
            if handler in handlers or isinstance(handler, RunLogHandler):
                root.removeHandler(handler)
                handler.close()


class RunLogHandler(logging.FileHandler):
    """log.txt of a run."""


def log_to_file(folder: Path) -> None:
    """Write all log lines so far, and from now on, to the folder's log.txt."""
    file = RunLogHandler(folder / "log.txt", encoding="utf-8")
    file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for early in [h for h in root.handlers if isinstance(h, logging.handlers.MemoryHandler)]:
        early.setTarget(file)
        early.flush()
        root.removeHandler(early)
    root.addHandler(file)
