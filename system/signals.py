"""What SIGTERM and SIGINT, which schedulers and Ctrl-C send, do to a training: it saves and ends with a code of its own."""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

EXIT_TRY_AGAIN = (
    75  # the exit code, sysexits.h's EX_TEMPFAIL: the same command with --resume auto goes on
)


SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(BaseException):
    """A signal asked this process to stop, and what has to be saved is saved. No Exception: nothing is to catch it on the way."""


class StopSignals:
    """While its `with` block lasts, the first signal ends the run by StopRequested, and a second one ends the process.

    Inside `finishing()` the first signal waits: the block looks at `requested` where it can stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._finishing = False
        self._before: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "StopSignals":
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python allows handlers nowhere else
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted; StopRequested comes at the block's end."""
        self._finishing = True
        try:
            yield
        finally:
            self._finishing = False
        if self.requested:
            raise StopRequested

    def _on_signal(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self.requested:
            log.warning("%s again: stopping at once", name)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = True
        log.warning(
            "%s: %sstopping; a second one stops at once",
            name,
            "finishing the step, saving, " if self._finishing else "",
        )
        if not self._finishing:
            raise StopRequested


def ignore_signals_in_worker(_worker: int = 0) -> None:
    """For worker processes: the parent, which gets the same Ctrl-C, ends them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
