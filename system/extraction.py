"""Extracts zip and tar archives without ever writing outside the target folder."""

import logging
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from system.archives import MeteredReader, NotAnArchive, iter_entries, open_tar, open_zip
from system.escaping import has_control_characters, summarize_error, to_one_line
from system.file_names import find_unportable
from system.files import READ_BYTES, READ_ERRORS, DiskFull, check_free_space
from system.progress import show_progress

MIN_FREE_BYTES = 1 << 28  # left free on the disk
MAX_FILES = 500_000  # in an archive, folders included
MAX_DEPTH = 32  # folders within each other
MAX_PATH_BYTES = 1024  # of a file's path in the archive
MAX_NAME_BYTES = 255  # of one part of it, as in most file systems
MAX_END_BYTES = 16 << 20  # zeros after a tar's last file
MAX_SHOWN_NAME = 80  # characters of a name in a message

ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    *(error_class for error_class in READ_ERRORS if error_class is not ValueError),
)


log = logging.getLogger(__name__)

# What macOS adds to archives: a file ._x for each x, in a folder of the same layout or beside it.
MACS_FOLDER = "__MACOSX"
MACS_PREFIX = "._"
MACS_ICON = "Icon\r"

TAR_MAGIC = b"ustar"
TAR_MAGIC_OFFSET = 257
ZIP_START = b"PK\x03\x04"
OTHER_ARCHIVES = {b"7z\xbc\xaf'\x1c": "7z", b"Rar!": "rar", b"\x28\xb5\x2f\xfd": "zstd"}
MAGIC_BYTES = 8


class DamagedArchive(ValueError):
    """A truncated or corrupt archive, or a file that is not an archive."""


class _File(NamedTuple):
    """A file in an archive: its path there, its size by its header, and its content."""

    name: str
    size: int
    content: IO[bytes]


@contextmanager
def extract_to_temporary(archive: Path, parent: Path) -> Iterator[Path]:
    """Extract the archive into a temporary folder in `parent`, which is deleted after the block.

    Parent folders that were made for it are deleted too if they are empty. Raises DamagedArchive
    for a corrupt archive or a file that is no archive; ValueError for one that would write outside
    the folder, contains links or devices, or exceeds a limit; and DiskFull.
    """
    made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
    parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=parent))
    try:
        _extract(archive, temporary)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in made:
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()


def _extract(archive: Path, folder: Path) -> None:
    try:
        _write_files(archive, folder)
    except ARCHIVE_ERRORS as error:
        raise DamagedArchive(f"{archive} is corrupt: {summarize_error(error)}") from None
    except FileExistsError as error:
        name = Path(error.filename).relative_to(folder)
        raise DamagedArchive(f"{archive} holds {name} twice") from None
    except DiskFull:
        raise
    except OSError as error:
        if error.errno is None:  # raised by a decompressor, not by the system
            raise DamagedArchive(f"{archive} is corrupt: {summarize_error(error)}") from None
        raise


def _write_files(archive: Path, folder: Path) -> None:
    paths = []
    for file in _iter_files(archive, folder):
        if file.name.rpartition("/")[2] == MACS_ICON:
            continue
        path = _to_safe_path(file.name, archive)
        if _is_macs_own(path):
            continue
        paths.append(path)
        _check_room(file.size, archive, folder)
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb") as copy:
            shutil.copyfileobj(file.content, copy, READ_BYTES)
            size = copy.tell()
        if size != file.size:
            raise DamagedArchive(
                f"{archive} is corrupt: {file.name} has {size} bytes, expected {file.size}"
            )
    unportable = find_unportable(paths)
    if unportable:
        log.warning(
            "%s: %d of its names cannot be used on Windows, such as %s",
            archive,
            len(unportable),
            _shorten(unportable[0]),
        )


def _is_macs_own(path: str) -> bool:
    """Whether a file is one that macOS adds: it lies in a copy of the real folder, or begins so."""
    *folders, name = path.split("/")
    return MACS_FOLDER in folders or name.startswith(MACS_PREFIX)


def _check_room(size: int, archive: Path, folder: Path) -> None:
    refusal = f"no room to extract {archive} in {folder.parent}"
    check_free_space(folder, size + MIN_FREE_BYTES, refusal)


def _iter_files(archive: Path, folder: Path) -> Iterator[_File]:
    """The files of an archive, one after another. Raises DiskFull if a zip does not fit."""
    # A tar may end with a zip that it holds, and a zip is looked for at the end.
    if zipfile.is_zipfile(archive) and not _is_plain_tar(archive):
        yield from _iter_zip(archive, folder)
    else:
        yield from _iter_tar(archive)


def _is_plain_tar(archive: Path) -> bool:
    with open(archive, "rb") as file:
        file.seek(TAR_MAGIC_OFFSET)
        return file.read(len(TAR_MAGIC)) == TAR_MAGIC


def _iter_zip(archive: Path, folder: Path) -> Iterator[_File]:
    with _named_in_errors(archive), open_zip(archive, MAX_FILES) as opened:
        entries = [entry for entry in opened.infolist() if not entry.is_dir()]
        _check_room(sum(entry.file_size for entry in entries), archive, folder)
        for entry in show_progress(entries, to_one_line(archive.name), unit=" files"):
            file_type = stat.S_IFMT(entry.external_attr >> 16)
            if file_type not in (0, stat.S_IFREG):
                raise ValueError(f"{archive} holds more than files: {_shorten(entry.filename)}")
            with opened.open(entry) as content:
                yield _File(entry.filename, entry.file_size, content)


def _iter_tar(archive: Path) -> Iterator[_File]:
    with _named_in_errors(archive), open_tar(archive) as (opened, stream):
        entries = iter_entries(opened, stream)
        bar = show_progress(entries, to_one_line(archive.name), unit=" files")
        for number, entry in enumerate(bar):
            if number >= MAX_FILES:
                raise ValueError(f"{archive} holds more than {MAX_FILES} files and folders")
            if entry.isdir():
                continue
            if not entry.isreg() or entry.issparse():
                raise ValueError(f"{archive} holds more than files: {_shorten(entry.name)}")
            with opened.extractfile(entry) as content:
                yield _File(entry.name, entry.size, content)
        stream.allow(MAX_END_BYTES, f"more than {MAX_END_BYTES} bytes follow its last file")
        _check_tar_end(stream, archive)


@contextmanager
def _named_in_errors(archive: Path) -> Iterator[None]:
    """Inside, a ValueError that does not name the archive gets its name."""
    try:
        yield
    except NotAnArchive:
        raise DamagedArchive(f"{archive} {_describe_kind(archive)}") from None
    except ValueError as error:
        if str(archive) in str(error):
            raise
        raise ValueError(f"{archive} is refused: {error}") from None


def _describe_kind(file: Path) -> str:
    """What a file is that is no whole zip or tar archive."""
    with open(file, "rb") as content:
        head = content.read(MAGIC_BYTES)
    if not head:
        return "is empty: download it again"
    if head.startswith(ZIP_START):
        return "is incomplete: it begins as a zip, but its end is missing; download it again"
    for start, kind in OTHER_ARCHIVES.items():
        if head.startswith(start):
            return f"is a {kind} archive, which is not read here: pack its files as a zip"
    return "is neither a zip nor a tar archive"


def _check_tar_end(rest: MeteredReader, archive: Path) -> None:
    """Raise DamagedArchive unless only zeros follow.

    `tarfile` takes a corrupt header for the end of the archive.
    """
    zeros = 0
    while block := rest.read(READ_BYTES):
        if block.strip(b"\0"):
            raise DamagedArchive(f"{archive} is corrupt: it has a header that makes no sense")
        zeros += len(block)
    if zeros < tarfile.BLOCKSIZE:
        raise DamagedArchive(f"{archive} is corrupt: it is cut short")


def _to_safe_path(name: str, archive: Path) -> str:
    """The name as a path that stays in its folder. Raises ValueError for one that does not."""
    shown = _shorten(name)
    parts = name.replace("\\", "/").split("/")
    if has_control_characters(name):
        raise ValueError(f"{archive} holds a name with control characters: {shown}")
    if parts[0] == "" or ".." in parts:
        raise ValueError(f"{archive} would write outside its folder: {shown}")
    if ":" in parts[0]:
        raise ValueError(f"{archive} holds a name that Windows takes for a drive: {shown}")
    if parts[-1] in ("", "."):
        raise ValueError(f"{archive} holds a file without a name: {shown}")
    parts = [part for part in parts if part not in ("", ".")]
    longest = max(len(os.fsencode(part)) for part in parts)
    if len(os.fsencode(name)) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES:
        raise ValueError(f"{archive} holds a name that is too long: {shown}")
    *folders, _ = parts
    if len(folders) > MAX_DEPTH:
        raise ValueError(f"{archive} holds folders more than {MAX_DEPTH} deep: {shown}")
    return "/".join(parts)


def _shorten(name: str) -> str:
    """A name in an archive, for a message."""
    line = to_one_line(name)
    return line if len(line) <= MAX_SHOWN_NAME else f"{line[: MAX_SHOWN_NAME - 1]}…"


def move_into(source: Path, target: Path, endings: Collection[str]) -> int:
    """Move the files below `source` that end in one of `endings`, such as ".jpg", to `target`.

    Returns how many there are. Hidden files and other kinds, such as programs, are not moved. Files
    that `target` has already are kept; raises ValueError if one has another size.
    """
    found = [Path(root, name) for root, _, names in os.walk(source) for name in names]
    paths = [file.relative_to(source) for file in found]
    wanted = [path for path in paths if _is_wanted(path, endings)]
    for path in wanted:
        place = target / path
        if place.exists() and not _is_same_size(source / path, place):
            raise ValueError(
                f"{place} exists already and differs from the archive's: move it away, or choose "
                "another folder"
            )
    for path in wanted:
        place = target / path
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            (source / path).replace(place)
    return len(wanted)


def _is_wanted(path: Path, endings: Collection[str]) -> bool:
    """Whether a file, by its path in the archive, is not hidden and has one of the endings."""
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.suffix.lower() in endings


def _is_same_size(file: Path, other: Path) -> bool:
    return other.is_file() and other.stat().st_size == file.stat().st_size
