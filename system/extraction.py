"""Unpacks zip and tar archives (compressed ones too) so that nothing lands outside their folder."""

import errno
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
from typing import IO

from tqdm import tqdm

from system.archives import MeteredReader, NoArchive, opened_tar, opened_zip, tar_files
from system.escaping import has_control_characters, one_line
from system.files import BLOCK, READ_ERRORS, error_line

MIN_FREE_BYTES = 1 << 28  # bytes of the disk that unpacking leaves free


MAX_FILES = 500_000  # of an archive


MAX_FOLDERS = 32  # within each other


MAX_PATH_BYTES = 1024  # bytes of a file's path in the archive


MAX_NAME_BYTES = 255  # bytes of a part of it, which is what file systems take


MAX_END_BYTES = 16 << 20  # bytes of zeros behind a tar's last file


MAX_SHOWN_NAME = 80  # letters of a name in a message


ARCHIVE_ERRORS = (
    zipfile.BadZipFile,
    tarfile.TarError,
    lzma.LZMAError,
    *set(READ_ERRORS) - {ValueError},
)


class DamagedArchive(ValueError):
    """What cannot be an archive that came whole."""


@contextmanager
def extracted(archive: Path, beside: Path) -> Iterator[Path]:
    """The archive's files in a temporary folder below `beside`, which is deleted after the block.

    Parent folders that were created for it are deleted too if they are empty. Raises DamagedArchive
    for a corrupt archive or another file, ValueError for one that would write elsewhere, holds more
    than files and folders, or exceeds a limit, and OSError for a full disk.
    """
    made = [place for place in (beside, *beside.parents) if not place.exists()]
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=beside))
    try:
        _extract(archive, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for place in made:
            if place.is_dir() and not any(place.iterdir()):
                place.rmdir()


def _extract(archive: Path, folder: Path) -> None:
    room = shutil.disk_usage(folder).free - MIN_FREE_BYTES
    no_room = OSError(errno.ENOSPC, f"no room to unpack {archive} in {folder.parent}")
    try:
        for name, size, content in _iter_files(archive, room, no_room):
            room -= size
            if room < 0:
                raise no_room
            target = folder / _safe_name(name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                shutil.copyfileobj(content, file, BLOCK)
                if file.tell() != size:
                    raise DamagedArchive(
                        f"{archive} is damaged: {name} has {file.tell()} bytes, not {size}"
                    )
    except ARCHIVE_ERRORS as error:
        raise DamagedArchive(f"{archive} is damaged: {error_line(error)}") from None
    except FileExistsError as error:
        twice = Path(error.filename).relative_to(folder)
        raise DamagedArchive(f"{archive} holds {twice} twice") from None
    except OSError as error:
        if error.errno is None:  # of a decompressor
            raise DamagedArchive(f"{archive} is damaged: {error_line(error)}") from None
        raise


def _iter_files(archive: Path, room: int, no_room: OSError) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each file of an archive, one after another."""
    if zipfile.is_zipfile(archive):
        yield from _iter_zip(archive, room, no_room)
    else:
        yield from _iter_tar(archive)


def _iter_zip(archive: Path, room: int, no_room: OSError) -> Iterator[tuple[str, int, IO[bytes]]]:
    with _named(archive), opened_zip(archive, MAX_FILES) as opened:
        entries = [entry for entry in opened.infolist() if not entry.is_dir()]
        if sum(entry.file_size for entry in entries) > room:
            raise no_room
        for entry in tqdm(entries, one_line(archive.name), unit=" files", disable=None):
            if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG):
                raise ValueError(f"{archive} holds more than files: {_shown(entry.filename)}")
            with opened.open(entry) as content:
                yield entry.filename, entry.file_size, content


def _iter_tar(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    with _named(archive), opened_tar(archive) as (opened, stream):
        entries = tqdm(
            tar_files(opened, stream), one_line(archive.name), unit=" files", disable=None
        )
        for number, entry in enumerate(entries):
            if number >= MAX_FILES:
                raise ValueError(f"{archive} holds more than {MAX_FILES} files and folders")
            if entry.isdir():
                continue
            if not entry.isreg() or entry.issparse():
                raise ValueError(f"{archive} holds more than files: {_shown(entry.name)}")
            with opened.extractfile(entry) as content:
                yield entry.name, entry.size, content
        stream.allow(MAX_END_BYTES)
        _check_tar_end(stream, archive)


@contextmanager
def _named(archive: Path) -> Iterator[None]:
    """Inside, what is refused without the archive's name gets it."""
    try:
        yield
    except NoArchive:
        raise DamagedArchive(f"{archive} is neither a zip nor a tar archive") from None
    except ValueError as error:
        if str(archive) in str(error):
            raise
        raise ValueError(f"{archive} is refused: {error}") from None


def _is_wanted(path: Path, endings: Collection[str]) -> bool:
    """Whether a file, by its path in the archive, is not hidden and has one of the endings."""
    is_hidden = any(part.startswith(".") for part in path.parts)
    return not is_hidden and path.suffix.lower() in endings


def _check_tar_end(rest: MeteredReader, archive: Path) -> None:
    """Raise DamagedArchive unless the tar ends with zeros.

    `tarfile` takes a corrupt header for the end of the archive.
    """
    zeros = 0
    while block := rest.read(BLOCK):
        if block.strip(b"\0"):
            raise DamagedArchive(f"{archive} is damaged: something in it makes no sense")
        zeros += len(block)
    if zeros < tarfile.BLOCKSIZE:
        raise DamagedArchive(f"{archive} is damaged: it is cut short")


def _safe_name(name: str, archive: Path) -> str:
    """The name, if it stays below its folder and is one that a dataset may have."""
    parts = name.replace("\\", "/").split("/")
    is_absolute = name.startswith(("/", "\\")) or ":" in parts[0]
    if is_absolute or ".." in parts or "\0" in name or not parts[-1]:
        raise ValueError(f"{archive} would write outside its folder: {_shown(name)}")
    if has_control_characters(name):
        raise ValueError(f"{archive} holds a name with control characters: {_shown(name)}")
    parts = [part for part in parts if part not in ("", ".")]
    if not parts:
        raise ValueError(f"{archive} holds a file without a name: {_shown(name)}")
    longest = max(len(os.fsencode(part)) for part in parts)
    if len(os.fsencode(name)) > MAX_PATH_BYTES or longest > MAX_NAME_BYTES:
        raise ValueError(f"{archive} holds a name that is too long: {_shown(name)}")
    if len(parts) > MAX_FOLDERS:
        raise ValueError(f"{archive} holds folders more than {MAX_FOLDERS} deep: {_shown(name)}")
    return "/".join(parts)


def _shown(name: str) -> str:
    """A name of an archive's in a message."""
    line = one_line(name)
    return line if len(line) <= MAX_SHOWN_NAME else f"{line[: MAX_SHOWN_NAME - 1]}…"


def move_into(source: Path, target: Path, endings: Collection[str]) -> int:
    """Move the files below `source` whose names have one of `endings`, such as ".jpg", to `target`.

    Returns how many there are. Hidden files and other kinds, such as programs, are not moved. Files
    that `target` has already are kept; ValueError if one has another size.
    """
    found = [Path(root, name) for root, _, names in os.walk(source) for name in names]
    files = [file for file in found if _is_wanted(file.relative_to(source), endings)]
    places = {file: target / file.relative_to(source) for file in files}
    for file, place in places.items():
        is_same = place.is_file() and place.stat().st_size == file.stat().st_size
        if place.exists() and not is_same:
            way_out = "move it away, or give --to another folder"
            raise ValueError(f"{place} is there already, and another than the archive's: {way_out}")
    for file, place in places.items():
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    return len(files)
