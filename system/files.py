"""Reading and writing small files: JSON with errors that name the file, writes that leave nothing half-done."""

import hashlib
import os
import struct
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from system.escaping import has_control_characters
from system.urls import scrub

BLOCK = 1 << 20  # bytes read at once


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
)  # what readers of binary files, others' and ours, raise over bytes that make no sense


def error_line(error: Exception) -> str:
    """An error's words in one line of at most 160 letters, without secrets of addresses in them."""
    text = " ".join(scrub(str(error)).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def is_safe_file_name(name: str) -> bool:
    """Whether a name is a file's in its folder, leads nowhere else, and has no control characters."""
    return (
        name not in ("", ".", "..")
        and not set(name) & set("/\\")
        and not has_control_characters(name)
    )


def refuse_existing(*paths: Path) -> None:
    """ValueError where one of them is a file, or a folder that is not empty."""
    for path in paths:
        if path.is_file() or path.is_dir() and any(path.iterdir()):
            raise ValueError(f"{path} is there already: give another name, or remove it")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path` that is synced and takes its name when the block ends well, and is gone when it does not."""
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError(None, "it is a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
        _sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """Of a file's bytes, as 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    """Let the names in a folder outlast a power failure, where the system can: Windows and some file systems cannot."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def cache_folder(cache_dir: str | None) -> Path:
    """--cache_dir, else the user's."""
    if cache_dir:
        return Path(cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clip4idc"


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
