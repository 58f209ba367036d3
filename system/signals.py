"""SIGTERM, SIGINT and SIGHUP, which schedulers, Ctrl-C and closed terminals send.

A job saves its state and exits.
"""

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

# The exit code of a job that was asked to stop and can be continued: EX_TEMPFAIL of sysexits.h.
EXIT_TRY_AGAIN = 75

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if hasattr(signal, "SIGHUP"):  # not on Windows
    SIGNALS.append(signal.SIGHUP)


ENDINGS = [number for number in SIGNALS if number != signal.SIGINT]


class StopRequested(BaseException):
    """A signal asked this process to stop, and nothing is left to save.

    A BaseException, so that no `except Exception` swallows it.
    """


@contextmanager
def cleaning_up_when_ended() -> Iterator[None]:
    """Inside, SIGTERM and SIGHUP raise StopRequested, so that half-written files are removed.

    A second signal ends the process.
    """

    def stop(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise StopRequested

    changed = []
    if threading.current_thread() is threading.main_thread():
        changed = [n for n in ENDINGS if signal.getsignal(n) is signal.SIG_DFL]
    for number in changed:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, signal.SIG_DFL)


class StopSignals:
    """Inside its `with` block, a first signal raises StopRequested; a second one ends the process.

    Inside `deferred()` the first signal only sets `requested`, which the code checks at points
    where it can stop.
    """

    def __init__(self) -> None:
        self.requested = False
        self._is_deferred = False
        self._previous: dict[int, signal.Handlers] = {}

    def __enter__(self) -> "StopSignals":
        # Python allows signal handlers in the main thread only.
        if threading.current_thread() is threading.main_thread():
            # What is ignored stays so: nohup asks for that.
            chosen = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._on_signal) for number in chosen}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal is only noted; StopRequested is raised at the end of the block."""
        self._is_deferred = True
        try:
            yield
        finally:
            self._is_deferred = False
        if self.requested:
            raise StopRequested

    def _on_signal(self, number: int, _frame: object) -> None:
        name = signal.Signals(number).name
        if self.requested and name == "SIGHUP":
            return  # a terminal that closes sends it more than once
        if self.requested:
            log.warning("%s again: stopping at once", name)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.requested = True
        when = " once everything is saved" if self._is_deferred else ""
        log.warning("%s: stopping%s; a second signal stops at once", name, when)
        if not self._is_deferred:
            raise StopRequested


@contextmanager
def holding_sigterm_back() -> Iterator[None]:
    """Processes that this thread starts inside begin with SIGTERM blocked, in all their threads.

    So `leave_signals_to_parent` can tell who sends it. Where a process starts without it and has
    several threads, as where the system cannot tell (macOS), any SIGTERM ends that process.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


def leave_signals_to_parent(_worker: int = 0) -> None:
    """For worker processes: heed no signal that asks a job to stop, unless the parent sends it.

    Ctrl-C, closed terminals and schedulers signal all processes of a job, and the parent still
    needs its workers to finish the step. Later it ends them itself, by SIGTERM.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_when_parent_asks, daemon=True).start()
    elif hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])


def _end_when_parent_asks() -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)


@contextmanager
def stopping_at_once() -> Iterator[None]:
    """Inside, a signal ends the process at once, as if nobody handled it.

    For waits in compiled code, during which Python's handlers do not run.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
