"""Zip and tar files of others, opened so that no list, name or header in them takes memory or time
that has not been looked at before."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from system.files import BLOCK

# Bytes of a zip's central directory. An entry of it takes some 600 bytes in memory.
MOST_DIRECTORY = 24 << 20


MOST_HEADERS = 1 << 20  # bytes of a tar between the content of one file and that of the next


MOST_DICTIONARY = 256 << 20  # bytes that unpacking xz may take; xz -9 needs 65 MiB


# For these alone zipfile decompresses no more at a time than it is asked for.
BOUNDED_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


# By a file's first bytes.
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}


class NoArchive(ValueError):
    """What is no archive of the kind that is opened."""


class BoundedReader:
    """A binary file for `zipfile`, of which no read may give more than `most` bytes at once."""

    def __init__(self, file: IO[bytes], most: int) -> None:
        self._file = file
        self._most = most

    def read(self, size: int = -1) -> bytes:
        """As a file's; ValueError for too much."""
        content = (
            b"" if size > self._most else self._file.read(self._most + 1 if size < 0 else size)
        )
        if size > self._most or len(content) > self._most:
            raise ValueError(f"a part of it that is read at once has more than {self._most} bytes")
        return content

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """As a file's."""
        return self._file.seek(place, whence)

    def tell(self) -> int:
        """As a file's."""
        return self._file.tell()

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Whoever opened the file closes it."""


@contextmanager
def opened_zip(path: Path, most_entries: int) -> Iterator[zipfile.ZipFile]:
    """A zip to read. ValueError where it lists too much, BadZipFile or OSError where it is none."""
    with open(path, "rb") as file, zipfile.ZipFile(BoundedReader(file, MOST_DIRECTORY)) as archive:
        entries = archive.infolist()
        if len(entries) > most_entries:
            raise ValueError(f"it has more than {most_entries} entries")
        if any(entry.compress_type not in BOUNDED_METHODS for entry in entries):
            raise ValueError("its entries are compressed in a way that is not read here")
        yield archive


def read_into(archive: zipfile.ZipFile, name: str) -> bytearray:
    """The whole content of an entry. Raises KeyError where there is none, ValueError for another
    size than the directory gives."""
    entry = archive.getinfo(name)
    content = bytearray(entry.file_size)
    rest = memoryview(content)
    with archive.open(entry) as stream:
        while rest and (count := stream.readinto(rest[:BLOCK])):
            rest = rest[count:]
        if rest or stream.read(1):
            raise ValueError(f"{name} has another size than the list says")
    return content


class MeteredReader:
    """A stream that is read forward, for `tarfile`; each part of it has to be allowed before."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._place = 0
        self._left = 0

    def allow(self, size: int) -> None:
        """Set how many bytes may be read or skipped from here on."""
        self._left = size

    def read(self, size: int = -1) -> bytes:
        """As a file's; ValueError for more than was allowed."""
        if size < 0 or size > self._left:
            raise ValueError(f"a header or a name in it has more than {MOST_HEADERS} bytes")
        content = self._stream.read(size)
        self._place += len(content)
        self._left -= len(content)
        return content

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        """Pass over what lies before a place; ValueError for going back, or over too much."""
        distance = place - self._place
        if whence != io.SEEK_SET or distance < 0 or distance > self._left:
            raise ValueError("its parts do not lie one after another")
        while distance and (block := self.read(min(distance, BLOCK))):
            distance -= len(block)
        return self._place

    def tell(self) -> int:
        """How much has been read."""
        return self._place

    def seekable(self) -> bool:
        """Forward."""
        return True


class _XzStream(io.RawIOBase):
    """An xz file's content. lzma.open would take whatever memory the file asks for."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = lzma.LZMADecompressor(memlimit=MOST_DICTIONARY)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while True:
            if self._decoder.eof:
                return 0
            packed = self._file.read(BLOCK) if self._decoder.needs_input else b""
            content = self._decoder.decompress(packed, len(buffer))
            if content or self._decoder.eof:
                break
            if not packed and self._decoder.needs_input:
                raise EOFError("it is cut short")
        buffer[: len(content)] = content
        return len(content)


@contextmanager
def opened_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, MeteredReader]]:
    """A tar to read from its first file to its last, compressed or not, and the stream that it is
    read from, in which `MOST_HEADERS` bytes are allowed at first. Raises what `tarfile` and the
    decompressors raise, and ValueError for a header that has too many bytes."""
    with open(path, "rb") as file, _decompressed(file) as stream:
        metered = MeteredReader(stream)
        metered.allow(MOST_HEADERS)
        try:
            archive = tarfile.open(fileobj=metered, mode="r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError as error:
            raise NoArchive(str(error)) from None
        with archive:
            yield archive, metered


def _decompressed(file: IO[bytes]) -> IO[bytes]:
    head = file.read(6)
    file.seek(0)
    kind = next((kind for magic, kind in COMPRESSIONS.items() if head.startswith(magic)), None)
    if kind == "gzip":
        return gzip.GzipFile(fileobj=file)
    if kind == "bzip2":
        return bz2.BZ2File(file)
    if kind == "xz":
        return io.BufferedReader(_XzStream(file), BLOCK)
    return file


def tar_files(archive: tarfile.TarFile, stream: MeteredReader) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's entries in order, without keeping them in memory.

    Read an entry's content before asking for the next one; what is left of it is skipped.
    """
    stream.allow(MOST_HEADERS)
    while (entry := archive.next()) is not None:
        archive.members.clear()
        archive.pax_headers.clear()  # global ones would be kept, and copied for each entry
        stream.allow(entry.size + MOST_HEADERS)
        yield entry
        stream.allow(MOST_HEADERS)
