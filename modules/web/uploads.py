"""The folder of visitors' uploads: limited in age and size, and deleted with the server."""

import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from dataloaders.picture_files import picture_endings
from system.escaping import has_control_characters
from system.files import READ_BYTES
from system.locks import LockTaken, hold_lock

# The folder's name starts with PREFIX; its lock file is next to it and ends in LOCK.
PREFIX = "clip4idc-page-"
LOCK = ".lock"
SWEEP_SECONDS = 1.0  # between two searches for uploads that are too old
MAX_PATH_LENGTH = 4096  # the time to resolve a path grows with the square of its length
MAX_NAME_LENGTH = 80  # characters that are kept of an upload's name


class NoRoom(OSError):
    """There is no room for an upload at the moment."""


class UploadFolder:
    """The uploads, each in its own folder, whose name nobody can guess.

    Anyone who knows the path of an upload may use it; only the visitor who sent it learns the path.
    Use `open_upload_folder` to make one.
    """

    def __init__(self, root: Path, max_age: float, max_bytes: int) -> None:
        """`max_age` in seconds; `max_bytes` is for all uploads together."""
        self.root = root.resolve()
        self.max_age = max_age
        self.max_bytes = max_bytes
        self._kept: frozenset[Path] = frozenset()
        self._arriving = 0
        self._lock = threading.Lock()

    def resolve(self, path: object) -> Path:
        """The real path of a file in this folder, which may have been deleted meanwhile.

        Raises PermissionError for anything else, however it is written.
        """
        is_path = isinstance(path, str) and len(path) <= MAX_PATH_LENGTH
        if not is_path or has_control_characters(path):
            raise PermissionError("there is no upload of that name")
        try:
            real = Path(path).resolve()
            is_folder = real.is_dir()
        except (OSError, RuntimeError, ValueError):  # a long name; circular links; lone surrogates
            raise PermissionError("there is no upload of that name") from None
        if is_folder or self.root not in real.parents:
            raise PermissionError("this file was not uploaded to this page")
        return real

    def store(self, name: str, content: IO[bytes]) -> Path:
        """Write an upload and return its path. Raises OSError if the disk is full."""
        folder = self.root / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        try:
            path = folder / safe_name(name)
            with open(path, "xb") as file:
                shutil.copyfileobj(content, file, READ_BYTES)
            return path
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @contextmanager
    def count_arriving_bytes(self) -> Iterator[Callable[[int], None]]:
        """Count an upload while it arrives. Call the yielded function with the size of each part.

        The function raises NoRoom if all arriving uploads together exceed `max_bytes`. Bytes that
        were only announced do not count.
        """
        own = 0

        def add_bytes(size: int) -> None:
            nonlocal own
            own += size
            with self._lock:
                self._arriving += size
                if self._arriving > self.max_bytes:
                    raise NoRoom("too many uploads at once")

        try:
            yield add_bytes
        finally:
            with self._lock:
                self._arriving -= own

    def exempt_current_files(self) -> None:
        """Never delete what is in the folder now: the page's own examples."""
        self._kept = frozenset(self.root.iterdir())

    def sweep(self) -> None:
        """Delete uploads that are too old, then the oldest ones until the rest fits.

        Uploads that are still arriving count too.
        """
        uploads = sorted(self._list_uploads())
        total = sum(size for _, size, _ in uploads)
        now = time.time()
        with self._lock:
            room = self.max_bytes - self._arriving
        for changed, size, path in uploads:
            if now - changed > self.max_age or total > room:
                _remove(path)
                total -= size

    def _list_uploads(self) -> Iterator[tuple[float, int, Path]]:
        """Time of the last change, bytes on the disk, and path of each upload."""
        for path in self.root.iterdir():
            if path in self._kept:
                continue
            try:
                changed, size = _time_and_size(path)
            except OSError:  # it may be deleted meanwhile
                continue
            yield changed, size, path


def safe_name(name: str) -> str:
    """A safe file name for an upload: letters, digits, dashes, underscores, a picture's ending."""
    stem, ending = os.path.splitext(name.replace("\\", "/").rpartition("/")[2])
    if ending.lower() not in picture_endings():
        stem, ending = stem + ending, ""
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_")
    return (plain[-MAX_NAME_LENGTH:] or "upload") + ending.lower()


def _time_and_size(path: Path) -> tuple[float, int]:
    """Time of the last change and bytes on the disk, of a file or of everything in a folder."""
    status = path.lstat()
    changed = status.st_mtime
    size = _bytes_on_disk(status)
    if path.is_dir() and not path.is_symlink():
        for below in path.rglob("*"):
            status = below.lstat()
            changed = max(changed, status.st_mtime)
            size += _bytes_on_disk(status)
    return changed, size


def _bytes_on_disk(status: os.stat_result) -> int:
    """Bytes used on the disk, if the system tells, so that empty files count too."""
    return max(status.st_size, getattr(status, "st_blocks", 0) * 512)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


@contextmanager
def open_upload_folder(max_age: float, max_bytes: int) -> Iterator[UploadFolder]:
    """The folder of uploads, in the system's temporary folder, while the block runs.

    First deletes folders of servers that no longer run. A thread enforces age and size.
    """
    place = Path(tempfile.gettempdir())
    remove_orphans(place)
    folder = place / f"{PREFIX}{secrets.token_hex(8)}"
    lock_file = place / f"{folder.name}{LOCK}"
    try:
        with hold_lock(lock_file, timeout=0):
            folder.mkdir(mode=0o700)
            with _sweeping(UploadFolder(folder, max_age, max_bytes)) as uploads:
                yield uploads
    finally:
        lock_file.unlink(missing_ok=True)


@contextmanager
def _sweeping(uploads: UploadFolder) -> Iterator[UploadFolder]:
    """A thread enforces age and size during the block; afterwards the folder is deleted."""
    stop = threading.Event()
    sweeper = threading.Thread(target=_sweep_until, args=(stop, uploads), daemon=True)
    try:
        sweeper.start()
        yield uploads
        stop.set()
        sweeper.join()
    finally:
        stop.set()
        shutil.rmtree(uploads.root, ignore_errors=True)


def _sweep_until(stop: threading.Event, uploads: UploadFolder) -> None:
    while not stop.wait(SWEEP_SECONDS):
        with suppress(OSError):
            uploads.sweep()


def remove_orphans(place: Path) -> None:
    """Delete the folders of servers that were killed: nobody holds their locks anymore."""
    for path in place.glob(f"{PREFIX}*{LOCK}"):
        with suppress(OSError, LockTaken):
            _remove_if_orphan(path)


def _remove_if_orphan(lock_file: Path) -> None:
    if lock_file.is_symlink() or not _is_own(lock_file):
        return
    with hold_lock(lock_file, timeout=0) as is_held:
        if not is_held:
            return
        folder = lock_file.with_name(lock_file.name.removesuffix(LOCK))
        if not folder.is_symlink():
            shutil.rmtree(folder, ignore_errors=True)
    lock_file.unlink(missing_ok=True)


def _is_own(path: Path) -> bool:
    """Whether a file belongs to this process's user; true where users have no numbers."""
    return not hasattr(os, "getuid") or path.stat().st_uid == os.getuid()
