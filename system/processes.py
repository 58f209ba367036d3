"""Helper processes: pools whose death is noticed, and what the system lends them."""

import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from system.signals import holding_sigterm_back, leave_signals_to_parent

try:
    import resource
except ImportError:  # Windows
    resource = None

# What a pool raises when one of its processes is killed, most often for lack of memory.
LostWorker = BrokenProcessPool

MAX_OPEN_FILES = 65536  # asked for, where the system allows more
MAX_SOCKET_FOLDER = 60  # bytes; multiprocessing adds up to 40, and a socket's path may have 103
SHARED_MEMORY = Path("/dev/shm")  # where Linux keeps it


class WorkerPool(ProcessPoolExecutor):
    """A pool of processes that heed their parent's signals alone."""

    def submit(self, *arguments: Any, **settings: Any) -> Future:
        """As ProcessPoolExecutor's, which starts processes here."""
        with holding_sigterm_back():
            return super().submit(*arguments, **settings)


def start_pool(
    workers: int,
    prepare: Callable[..., None] | None = None,
    arguments: tuple[Any, ...] = (),
    start_method: str | None = None,
) -> WorkerPool:
    """A pool of processes, each of which calls `prepare` first.

    `start_method` is one of multiprocessing's; None: the system's usual one. Waiting for a result
    raises LostWorker if a process is killed.
    """
    context = multiprocessing.get_context(start_method)
    return WorkerPool(workers, context, _start_worker, (prepare, arguments))


def _start_worker(prepare: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    leave_signals_to_parent()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if prepare is not None:
        prepare(*arguments)


def _end_with_parent() -> None:
    """End this process when its parent is gone: a killed one cannot tell its workers."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)


def raise_open_files_limit() -> None:
    """Let this process and its children open as many files as the system allows without asking.

    Workers hand over each tensor as an open file, and the usual limit is low: 256 on macOS.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with suppress(OSError, ValueError):  # macOS refuses more than its own constant
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


def count_free_files() -> float:
    """How many more files this process may open."""
    if resource is None:
        return float("inf")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return float("inf")
    with suppress(OSError):
        return soft - len(os.listdir("/dev/fd"))
    return soft


def has_room_for_sockets() -> bool:
    """Whether sockets can be made among the temporary files: their paths must be short."""
    return len(os.fsencode(tempfile.gettempdir())) <= MAX_SOCKET_FOLDER


def read_free_shared_memory() -> float:
    """Bytes that processes may still share; infinite where that has no limit of its own."""
    if not sys.platform.startswith("linux"):
        return float("inf")
    try:
        return shutil.disk_usage(SHARED_MEMORY).free
    except OSError:
        return 0
