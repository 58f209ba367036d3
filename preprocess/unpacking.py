"""Archives of others, unpacked so that nothing lands outside their folder: zip and tar (also compressed)."""

import errno
import lzma
import os
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from tqdm import tqdm

from modules.files import BLOCK, DAMAGED, short

SPARE = 1 << 28  # bytes of the disk that unpacking leaves free
BROKEN = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, *set(DAMAGED) - {ValueError})


class DamagedArchive(ValueError):
    """What cannot be an archive that came whole."""


@contextmanager
def unpacked(archive: Path, beside: Path) -> Iterator[Path]:
    """The archive's files in a folder of their own below `beside`, which is gone after the block.

    Raises DamagedArchive for what is none or is damaged, ValueError for what would write elsewhere or holds more than files and
    folders, OSError where the disk has no room for it.
    """
    beside.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=beside))
    try:
        _unpack(archive, folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _unpack(archive: Path, folder: Path) -> None:
    room = shutil.disk_usage(folder).free - SPARE
    try:
        for name, size, content in _members(archive):
            room -= size
            if room < 0:
                raise OSError(errno.ENOSPC, f"no room to unpack {archive} in {folder.parent}")
            target = folder / _safe(name, archive)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open(target, "xb") as file:
                shutil.copyfileobj(content, file)
                if file.tell() != size:
                    raise DamagedArchive(f"{archive} is damaged: {name} has {file.tell()} bytes, not {size}")
    except BROKEN as error:
        raise DamagedArchive(f"{archive} is damaged: {short(error)}") from None
    except FileExistsError as error:
        raise DamagedArchive(f"{archive} holds {Path(error.filename).relative_to(folder)} twice") from None
    except OSError as error:
        if error.errno is None:  # of a decompressor
            raise DamagedArchive(f"{archive} is damaged: {short(error)}") from None
        raise


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Name, size and content of each file of an archive, one after another."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for entry in tqdm(opened.infolist(), archive.name, unit=" files", disable=None):
                kind = stat.S_IFMT(entry.external_attr >> 16)
                if entry.is_dir():
                    continue
                if kind not in (0, stat.S_IFREG):
                    raise ValueError(f"{archive} holds more than files: {entry.filename}")
                with opened.open(entry) as content:
                    yield entry.filename, entry.file_size, content
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as opened:
            for entry in tqdm(opened, archive.name, unit=" files", disable=None):
                if entry.isdir():
                    continue
                if not entry.isreg():
                    raise ValueError(f"{archive} holds more than files: {entry.name}")
                with opened.extractfile(entry) as content:
                    yield entry.name, entry.size, content
            _check_end(opened.fileobj, archive)
    else:
        raise DamagedArchive(f"{archive} is neither a zip nor a tar archive")


def _check_end(rest: IO[bytes], archive: Path) -> None:
    """DamagedArchive unless a tar archive ends as it must, with zeros: `tarfile` takes a header that makes no sense for the end."""
    zeros = 0
    while block := rest.read(BLOCK):
        if block.strip(b"\0"):
            raise DamagedArchive(f"{archive} is damaged: something in it makes no sense")
        zeros += len(block)
    if zeros < tarfile.BLOCKSIZE:
        raise DamagedArchive(f"{archive} is damaged: it is cut short")


def _safe(name: str, archive: Path) -> str:
    """The name, if it stays below the folder that it is put into."""
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\0" in name or not parts[-1]:
        raise ValueError(f"{archive} would write outside its folder: {name}")
    return "/".join(part for part in parts if part not in ("", "."))


def move_into(source: Path, target: Path) -> int:
    """Move a folder's files into another, whose own stay; returns their number. ValueError where one is there in another size."""
    files = [Path(root, name) for root, _, names in os.walk(source) for name in names]
    places = {file: target / file.relative_to(source) for file in files}
    for file, place in places.items():
        if place.exists() and not (place.is_file() and place.stat().st_size == file.stat().st_size):
            raise ValueError(f"{place} is there already, and another than the archive's: move it away, or give --to another folder")
    for file, place in places.items():
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            file.replace(place)
    return len(files)
