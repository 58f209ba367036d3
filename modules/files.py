"""Reading and writing small files: JSON with errors that name the file, writes that leave nothing half-done."""

import hashlib
import json
import math
import os
import re
import reprlib
import struct
import tempfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from modules.escaping import has_control_characters
from modules.urls import scrub

BLOCK = 1 << 20  # bytes read at once
DAMAGED = (
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


def parse_json(text: str) -> Any:
    """The JSON value in a text. Raises ValueError also for what Python lets pass: numbers that are none, keys given twice, and
    halves of letters; and for nesting without end."""
    try:
        value = json.loads(
            text, object_pairs_hook=_distinct, parse_constant=_finite, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if re.search(r"\\u[dD]", text):
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # an escaped half of a surrogate pair cannot be encoded
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice in an object")
    return value


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is no number of JSON's, or too large a one")
    return value


def read_json(path: str | Path, kind: type | None = None) -> Any:
    """The JSON value in a UTF-8 file. Raises FileNotFoundError, or ValueError for what is no JSON or not of `kind`."""
    path = Path(path)
    if not os.path.isfile(path):  # pathlib's raises where a name is too long
        raise FileNotFoundError(
            f"{path} is a folder, expected a file" if os.path.isdir(path) else f"no file {path}"
        )
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError both are one
        raise ValueError(f"{path} is not JSON in UTF-8: {short(error)}") from None
    if kind is not None and not isinstance(value, kind):
        names = {list: "a list", dict: "an object"}
        raise ValueError(
            f"{path} holds {names.get(type(value), type(value).__name__)}, expected {names[kind]}"
        )
    return value


def short(error: Exception) -> str:
    """An error's words in one line of at most 160 letters, without secrets of addresses in them."""
    text = " ".join(scrub(str(error)).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def is_plain_name(name: str) -> bool:
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
def written_at_once(path: str | Path) -> Iterator[Path]:
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


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file at once, in the compact form of `json.dump`."""
    with written_at_once(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN: a missing score is null."""
    return json.dumps(_nan_to_none(value), indent=indent)


def _nan_to_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _nan_to_none(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_nan_to_none(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def file_sha256(path: Path) -> str:
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
