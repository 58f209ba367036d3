"""Files: atomic writes, links, free space, checksums, safe names, and the user's cache folder."""

import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import IO, Any

from system.escaping import has_control_characters

READ_BYTES = 1 << 20  # bytes read at once

# What file systems say that lack what was asked for: buckets, FAT, network and FUSE mounts.
NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP})

HTML_START = re.compile(rb"(\xef\xbb\xbf)?\s*<(!doctype|html|head|body|\?xml|!--)", re.IGNORECASE)

# Exceptions that parsers of binary files, other people's and ours, raise on corrupt files.
READ_ERRORS = (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RuntimeError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zlib.error,
)


def is_safe_file_name(name: str) -> bool:
    """Whether a name stays in its folder when it is joined to it, and has no control characters."""
    is_folder = name in ("", ".", "..")
    has_slash = "/" in name or "\\" in name
    return not is_folder and not has_slash and not has_control_characters(name)


def is_html(head: bytes) -> bool:
    """Whether a file that begins like this is HTML, such as a login page instead of the file."""
    return HTML_START.match(head) is not None


class DiskFull(OSError):
    """A disk has too little free space."""


def check_free_space(folder: Path, needed: int, refusal: str) -> None:
    """Raise DiskFull, with `refusal` first, if the folder's disk has fewer bytes free.

    A disk that does not say how much is free counts as large enough.
    """
    free = _read_free_bytes(folder)
    if free is not None and free < needed:
        raise DiskFull(
            f"{refusal}: it takes {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free, "
            f"{(needed - free) / 1e9:.3f} GB are missing"
        )


def _read_free_bytes(folder: Path) -> int | None:
    """None where the file system does not say: mounts of cloud storage answer with zeros."""
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        if error.errno in NOT_SUPPORTED:
            return None
        raise
    return usage.free if usage.total > 0 else None


def refuse_overwriting(output: Path | None, inputs: Iterable[Path | None]) -> None:
    """Raise ValueError if a file to write is one of those that are read."""
    for path in inputs:
        if output and path and os.path.realpath(output) == os.path.realpath(path):
            raise ValueError(f"--output {output} is a file that is read: choose another name")


def refuse_existing(*paths: Path) -> None:
    """Raise ValueError if one of the paths is a file, or a folder that is not empty."""
    for path in paths:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ValueError(f"{path} exists already: choose another name, or remove it")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder.

    On success it is synced and renamed to `path`, on failure deleted. Raises OSError if nothing can
    be written there.
    """
    path = Path(path)
    temporary = _make_temporary(path)
    try:
        yield temporary
        with open(temporary, "r+b") as written:  # Windows does not sync what is open for reading
            sync(written)
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_temporary(path: Path) -> Path:
    """An empty, hidden file in the folder of `path`, which is made if need be."""
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        open(temporary, "xb").close()
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    return temporary


def sync(file: IO[Any]) -> None:
    """Write an open file's bytes to the disk, if its file system can be told to.

    Raises OSError if the disk is full or broken.
    """
    file.flush()
    try:
        os.fsync(file.fileno())
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            raise


def _sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk. Windows and some file systems cannot do it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def link_or_copy(source: Path, path: Path) -> None:
    """Give a file a second name in its folder: by a link, or as a copy where links are refused.

    What has this name before is replaced. Raises OSError, DiskFull too, if there is no room.
    """
    for link in (_link_by_name, os.link):
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            link(source, temporary)
            temporary.replace(path)
        except (OSError, NotImplementedError):
            temporary.unlink(missing_ok=True)
        else:
            return
    check_free_space(path.parent, source.stat().st_size, f"cannot write {path}")
    with atomic_write(path) as temporary:
        shutil.copyfile(source, temporary)


def _link_by_name(source: Path, path: Path) -> None:
    path.symlink_to(source.name)


def compute_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def choose_cache_folder(cache_dir: str | None) -> Path:
    """The given folder, else `clip4idc` in the user's cache folder.

    For a user without a home it is a private folder among the temporary files.
    """
    if cache_dir:
        return Path(cache_dir)
    given = os.environ.get("XDG_CACHE_HOME")
    if given:
        return Path(given) / "clip4idc"
    try:
        return Path.home() / ".cache" / "clip4idc"
    except RuntimeError:  # a user number without an entry, as in containers
        return _make_private_folder()


@cache
def _make_private_folder() -> Path:
    """A folder for temporary files that only this user can have written to."""
    place = Path(tempfile.gettempdir())
    folder = place / f"clip4idc-{os.getuid() if hasattr(os, 'getuid') else 'user'}"
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    status = folder.lstat()
    is_own = not hasattr(os, "getuid") or status.st_uid == os.getuid()
    is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return folder if is_own and is_private else Path(tempfile.mkdtemp(prefix="clip4idc-"))
