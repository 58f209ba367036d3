"""Files: atomic writes, free space, checksums, safe names, and the user's cache folder."""

import hashlib
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from system.escaping import has_control_characters

READ_BYTES = 1 << 20  # bytes read at once

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
    """Raise DiskFull, with `refusal` first, if the folder's disk has fewer bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DiskFull(
            f"{refusal}: it takes {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free, "
            f"{(needed - free) / 1e9:.3f} GB are missing"
        )


def refuse_existing(*paths: Path) -> None:
    """Raise ValueError if one of the paths is a file, or a folder that is not empty."""
    for path in paths:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ValueError(f"{path} exists already: choose another name, or remove it")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path in the same folder.

    On success it is fsynced and renamed to `path`, on failure deleted. Raises OSError if nothing
    can be written there.
    """
    path = Path(path)
    temporary = _make_temporary(path)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_read_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _make_temporary(path: Path) -> Path:
    """An empty, hidden file in the folder of `path`, which is made if need be."""
    if path.is_dir():
        raise OSError(f"cannot write {path}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    os.close(handle)
    return Path(name)


def _sync_folder(folder: Path) -> None:
    """Write a folder's list of names to the disk. Windows and some file systems cannot do it."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _read_umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def compute_sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def choose_cache_folder(cache_dir: str | None) -> Path:
    """The given folder, else `clip4idc` in the user's cache folder."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip4idc"
