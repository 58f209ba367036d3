"""The folder that a run writes into: its lock, so that no other run uses it, and its log.txt."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from system.locks import LockTaken, hold_lock
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
    with ExitStack() as held:

        def acquire() -> None:
            folder.mkdir(parents=True, exist_ok=True)
            timeout = LOCK_TIMEOUT if runtime.world_size > 1 else 0
            try:
                held.enter_context(hold_lock(folder / ".lock", timeout))
            except LockTaken:
                raise ValueError(
                    f"{folder} is in use by another run: wait for it to finish, or choose another "
                    "folder"
                ) from None

        runtime.on_main(acquire)
        if runtime.is_main:
            log_to_file(folder)
        yield folder
