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

from filelock import FileLock, Timeout

from dataloaders.picture_files import picture_endings
from system.escaping import has_control_characters
from system.files import BLOCK

PREFIX = "clip4idc-page-"  # of the folder; beside it lies a file of the same name and LOCK
LOCK = ".lock"
PAUSE = 1.0  # seconds between two looks for what is too old
LONGEST_PATH = 4096  # letters; following a path takes time that grows with its square
LONGEST_NAME = 80  # letters that are kept of an upload's name


class NoRoom(OSError):
    """An upload for which there is no room at the moment."""


class UploadFolder:
    """A folder of its own for each upload, under a name that nobody can guess.

    Whoever knows the path of an upload may use it: it is told to the visitor who sent it, to nobody
    else. Use `open_upload_folder` to make one.
    """

    def __init__(self, root: Path, max_age: float, max_bytes: int) -> None:
        self.root = root.resolve()
        self.max_age = max_age
        self.max_bytes = max_bytes
        self._kept: frozenset[Path] = frozenset()
        self._arriving = 0
        self._lock = threading.Lock()

    def resolve(self, path: object) -> Path:
        """The real path of a file in this folder, which need not be there any more. PermissionError
        for anything else, however it is written."""
        is_path = isinstance(path, str) and len(path) <= LONGEST_PATH
        if not is_path or has_control_characters(path):
            raise PermissionError("no upload is called so")
        try:
            real = Path(path).resolve()
            is_folder = real.is_dir()
        except (OSError, RuntimeError, ValueError):  # a long name; circular links; lone surrogates
            raise PermissionError("no upload is called so") from None
        if is_folder or self.root not in real.parents:
            raise PermissionError("it was not uploaded to this page")
        return real

    def store(self, name: str, content: IO[bytes]) -> Path:
        """Write an upload; returns its path. OSError where the disk does not take it."""
        folder = self.root / secrets.token_hex(16)
        folder.mkdir(mode=0o700)
        try:
            path = folder / safe_name(name)
            with open(path, "xb") as file:
                shutil.copyfileobj(content, file, BLOCK)
            return path
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    @contextmanager
    def arriving(self) -> Iterator[Callable[[int], None]]:
        """Count an upload while it arrives. Call the yielded function with the size of each part.

        The function raises NoRoom when all uploads under way exceed `max_bytes` together. Bytes
        that were only announced do not count.
        """
        own = 0

        def arrived(size: int) -> None:
            nonlocal own
            own += size
            with self._lock:
                self._arriving += size
                if self._arriving > self.max_bytes:
                    raise NoRoom("too many uploads at once")

        try:
            yield arrived
        finally:
            with self._lock:
                self._arriving -= own

    def keep_present(self) -> None:
        """What is there now is the page's own, its examples, and stays as long as the server."""
        self._kept = frozenset(self.root.iterdir())

    def sweep(self) -> None:
        """Delete uploads that are too old, then the oldest ones until the rest fits.

        Uploads that are still arriving take part of the room.
        """
        entries = sorted(self._entries())
        total = sum(size for _, size, _ in entries)
        now = time.time()
        with self._lock:
            room = self.max_bytes - self._arriving
        for changed, size, path in entries:
            if now - changed > self.max_age or total > room:
                _remove(path)
                total -= size

    def _entries(self) -> Iterator[tuple[float, int, Path]]:
        """When it was last changed, bytes on the disk, and path of each upload."""
        for path in self.root.iterdir():
            if path in self._kept:
                continue
            with suppress(OSError):  # it may go meanwhile
                yield (*_age_and_size(path), path)


def safe_name(name: str) -> str:
    """A safe file name for an upload: letters, digits, dashes, underscores, a picture's ending."""
    stem, ending = os.path.splitext(name.replace("\\", "/").rpartition("/")[2])
    if ending.lower() not in picture_endings():
        stem, ending = stem + ending, ""
    plain = re.sub(r"[^A-Za-z0-9-]+", "_", stem).strip("_")
    return (plain[-LONGEST_NAME:] or "upload") + ending.lower()


def _age_and_size(path: Path) -> tuple[float, int]:
    status = path.lstat()
    changed, size = status.st_mtime, _on_disk(status)
    if path.is_dir() and not path.is_symlink():
        for below in path.rglob("*"):
            status = below.lstat()
            changed = max(changed, status.st_mtime)
            size += _on_disk(status)
    return changed, size


def _on_disk(status: os.stat_result) -> int:
    """Bytes used on the disk, where the system tells, so that empty files count too."""
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
    name = PREFIX + secrets.token_hex(8)
    lock = FileLock(place / f"{name}{LOCK}")
    with suppress(
        NotImplementedError, OSError
    ):  # a file system without locks; nobody can take them there
        lock.acquire(timeout=0)
    folder = place / name
    folder.mkdir(mode=0o700)
    stop = threading.Event()
    try:
        uploads = UploadFolder(folder, max_age, max_bytes)
        sweeper = threading.Thread(target=_sweep_until, args=(stop, uploads), daemon=True)
        sweeper.start()
        yield uploads
        stop.set()
        sweeper.join()
    finally:
        stop.set()
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()
        Path(lock.lock_file).unlink(missing_ok=True)


def _sweep_until(stop: threading.Event, uploads: UploadFolder) -> None:
    while not stop.wait(PAUSE):
        with suppress(OSError):
            uploads.sweep()


def remove_orphans(place: Path) -> None:
    """Remove the folders of servers that ended without doing so: nobody holds their locks."""
    for path in place.glob(f"{PREFIX}*{LOCK}"):
        folder = path.with_name(path.name.removesuffix(LOCK))
        with suppress(OSError, NotImplementedError):
            if path.is_symlink() or path.stat().st_uid != _own_user(path):
                continue
            lock = FileLock(path)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                continue
            if not folder.is_symlink():
                shutil.rmtree(folder, ignore_errors=True)
            lock.release()
            path.unlink(missing_ok=True)


def _own_user(path: Path) -> int:
    """This process' user, where the system has users with numbers."""
    return os.getuid() if hasattr(os, "getuid") else path.stat().st_uid
