"""What a run writes into: its folder or file, locked against other runs, and its log.txt."""

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
    runtime.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    with _locked_by_main(folder / ".lock", f"{folder} is in use", "folder", runtime):
        if runtime.is_main:
            log_to_file(folder)
        yield folder


@contextmanager
def reserve_file(path: Path, runtime: Runtime) -> Iterator[None]:
    """Keep other runs from writing into the same file; leaves no trace.

    Raises ValueError, on every process, if another one does. A folder that does not exist yet is
    not made.
    """
    if not runtime.on_main(path.parent.is_dir):
        yield
        return
    lock_file = path.with_name(f".{path.name}.lock")
    is_reserved = False
    try:
        with _locked_by_main(lock_file, f"{path} is being written", "file", runtime):
            is_reserved = runtime.is_main
            yield
    finally:
        if is_reserved:  # now that it is closed: Windows does not remove open files
            lock_file.unlink(missing_ok=True)


@contextmanager
def _locked_by_main(lock_file: Path, state: str, kind: str, runtime: Runtime) -> Iterator[None]:
    with ExitStack() as held:

        def acquire() -> None:
            timeout = LOCK_TIMEOUT if runtime.world_size > 1 else 0
            try:
                held.enter_context(hold_lock(lock_file, timeout))
            except LockTaken:
                raise ValueError(
                    f"{state} by another run: wait for it to finish, or choose another {kind}"
                ) from None

        runtime.on_main(acquire)
        yield
