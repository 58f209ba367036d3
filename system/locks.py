"""Locks of files, among processes. Where a file system has none, work goes on without."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

log = logging.getLogger(__name__)

FOREVER = -1


class LockTaken(Exception):
    """Another process holds the lock."""


@contextmanager
def hold_lock(path: Path, timeout: float = FOREVER) -> Iterator[bool]:
    """Hold the lock in the block; the file at `path` stays.

    Yields whether it is held: not where the file system has no locks, which is said once. Raises
    LockTaken after `timeout` seconds, and OSError if the file cannot be made.
    """
    # Without "fallback_to_soft": a file that stands for a lock would outlive a killed process.
    lock = FileLock(path, fallback_to_soft=False)
    is_held = True
    try:
        lock.acquire(timeout)
    except Timeout:
        raise LockTaken(str(path)) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, PermissionError) or not os.access(path, os.W_OK):
            raise
        _warn_without_locks(path.parent, str(error))
        is_held = False
    try:
        yield is_held
    finally:
        lock.release()


@cache
def _warn_without_locks(folder: Path, reason: str) -> None:
    log.warning(
        "%s: its file system has no locks (%s): let only one process write there", folder, reason
    )
