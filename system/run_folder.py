"""TODO."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from modules.options.groups import Options
from system.logs import log_to_file
from system.runtime import Runtime

LOCK_TIMEOUT = 60  # seconds in which an earlier attempt of a job of several processes must have let go of its folder


@contextmanager
def open_run_folder(options: Options, runtime: Runtime) -> Iterator[Path]:
    """Make the run's folder and, on the main process, write all log lines so far and from now on to its log.txt.

    Raises ValueError, on every process, where another run works in it.
    """
    folder = Path(options.run.output_dir)
    lock = FileLock(folder / ".lock")

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_TIMEOUT if runtime.world_size > 1 else 0)
        except Timeout:
            raise ValueError(
                f"another run works in {folder}: wait for its end, or give another --output_dir"
            ) from None

    runtime.on_main(take)
    try:
        if runtime.is_main:
            log_to_file(folder)
        yield folder
    finally:
        lock.release()
