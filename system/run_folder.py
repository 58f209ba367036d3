"""The folder that a run writes into: its lock, so that no other run uses it, and its log.txt."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from system.logs import log_to_file
from system.runtime import Runtime

# Seconds that a restarted job of several processes waits for its earlier attempt to free the lock.
LOCK_TIMEOUT = 60


@contextmanager
def open_run_folder(folder: Path, runtime: Runtime) -> Iterator[Path]:
    """Make the folder and lock it. The main process writes all log lines, the earlier ones too, to
    its log.txt.

    Raises ValueError, on every process, if another run uses the folder.
    """
    lock = FileLock(folder / ".lock")

    def acquire() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT if runtime.world_size > 1 else 0)
        except Timeout:
            raise ValueError(
                f"{folder} is in use by another run: wait for it to finish, or choose another "
                "folder"
            ) from None

    runtime.on_main(acquire)
    try:
        if runtime.is_main:
            log_to_file(folder)
        yield folder
    finally:
        lock.release()
