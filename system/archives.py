"""Zip and tar files from others, read so that memory stays bounded whatever their headers claim."""

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

from system.files import READ_BYTES

# Limit for a zip's central directory; each entry takes about 600 bytes in memory.
MAX_DIRECTORY_BYTES = 24 << 20

# Limit for the headers and names between two files of a tar.
MAX_HEADER_BYTES = 1 << 20
TOO_LONG_HEADER = f"a header or a name in it has more than {MAX_HEADER_BYTES} bytes"

# Memory limit for decompressing xz; `xz -9` needs 65 MiB.
MAX_XZ_MEMORY = 256 << 20

# The decoder copies what is left of a read at the end of each xz stream, and streams can be tiny.
XZ_READ_BYTES = 1 << 14

# For other methods, zipfile decompresses more at a time than it is asked for.
BOUNDED_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

# The compression of a tar, by the file's first bytes.
COMPRESSIONS = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz"}
MAGIC_BYTES = max(map(len, COMPRESSIONS))


class NotAnArchive(ValueError):
    """The file is not an archive of the expected format."""


class BoundedReader:
    """A binary file for `zipfile` in which no read may return more than `max_bytes`."""

    def __init__(self, file: IO[bytes], max_bytes: int) -> None:
        self._file = file
        self._max_bytes = max_bytes

    def read(self, size: int = -1) -> bytes:
        """Like `file.read`. Raises ValueError for too much."""
        self._check(size)
        content = self._file.read(self._max_bytes + 1 if size < 0 else size)
        self._check(len(content))
        return content

    def _check(self, size: int) -> None:
        if size > self._max_bytes:
            raise ValueError(f"a single read of it takes more than {self._max_bytes} bytes")

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Like `file.seek`."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """Like `file.tell`."""
        return self._file.tell()

    def seekable(self) -> bool:
        """Like `file.seekable`."""
        return True

    def close(self) -> None:
        """Do nothing: whoever opened the file closes it."""


@contextmanager
def open_zip(path: Path, max_entries: int) -> Iterator[zipfile.ZipFile]:
    """Open a zip for reading.

    Raises ValueError for too many entries or a compression that is not read here, and BadZipFile or
    OSError for a file that is not a zip.
    """
    with open(path, "rb") as file:
        bounded = BoundedReader(file, MAX_DIRECTORY_BYTES)
        with zipfile.ZipFile(bounded) as archive:
            entries = archive.infolist()
            if len(entries) > max_entries:
                raise ValueError(f"it has more than {max_entries} entries")
            if any(entry.compress_type not in BOUNDED_METHODS for entry in entries):
                raise ValueError("its entries are compressed in a way that is not read here")
            yield archive


def read_entry(archive: zipfile.ZipFile, name: str) -> bytearray:
    """The whole content of a zip's entry.

    Raises KeyError if there is none, ValueError if its size is not what its header says.
    """
    entry = archive.getinfo(name)
    content = bytearray(entry.file_size)
    rest = memoryview(content)
    with archive.open(entry) as stream:
        while rest and (count := stream.readinto(rest[:READ_BYTES])):
            rest = rest[count:]
        if rest or stream.read(1):
            raise ValueError(f"{name} has another size than its header says")
    return content


class MeteredReader:
    """A stream for `tarfile` that is read forward, and only as far as `allow` says."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._offset = 0
        self._allowed = 0
        self._refusal = ""

    def allow(self, size: int, refusal: str = TOO_LONG_HEADER) -> None:
        """Set how many bytes may be read or skipped from here on, and the message for more."""
        self._allowed = size
        self._refusal = refusal

    def read(self, size: int = -1) -> bytes:
        """Like `file.read`. Raises ValueError for more than is allowed."""
        if size < 0 or size > self._allowed:
            raise ValueError(self._refusal)
        content = self._stream.read(size)
        self._offset += len(content)
        self._allowed -= len(content)
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Skip forward to an offset. Raises ValueError for going back, or for skipping too much."""
        distance = offset - self._offset
        if whence != io.SEEK_SET or distance < 0 or distance > self._allowed:
            raise ValueError("its entries do not follow one another")
        while distance and (block := self.read(min(distance, READ_BYTES))):
            distance -= len(block)
        return self._offset

    def tell(self) -> int:
        """How many bytes have been read or skipped."""
        return self._offset

    def seekable(self) -> bool:
        """True: it can seek forward."""
        return True


class _XzStream(io.RawIOBase):
    """The content of an xz file. `lzma.open` would use as much memory as the file asks for.

    The file may hold several xz streams, one after another, with zeros between them.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._decoder = _make_xz_decoder()
        self._packed = b""  # read from the file, not decompressed yet

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        content = b""
        while not content:
            if self._decoder.eof and not self._start_next_stream():
                return 0
            content = self._decoder.decompress(self._next_packed(), len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def _next_packed(self) -> bytes:
        """What to give to the decoder: nothing while it still has input."""
        if not self._decoder.needs_input:
            return b""
        packed = self._packed or self._file.read(XZ_READ_BYTES)
        self._packed = b""
        if not packed:
            raise EOFError("it is cut short")
        return packed

    def _start_next_stream(self) -> bool:
        """Go on to the next stream in the file; returns whether there is one."""
        packed = self._decoder.unused_data.lstrip(b"\0")
        while not packed and (block := self._file.read(XZ_READ_BYTES)):
            packed = block.lstrip(b"\0")
        if not packed:
            return False
        self._decoder = _make_xz_decoder()
        self._packed = packed
        return True


def _make_xz_decoder() -> lzma.LZMADecompressor:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_XZ_MEMORY)


@contextmanager
def open_tar(path: Path) -> Iterator[tuple[tarfile.TarFile, MeteredReader]]:
    """Open a tar, compressed or not, for reading from its first file to its last.

    Also yields the stream that it is read from, in which MAX_HEADER_BYTES are allowed at first.
    Raises what `tarfile` and the decompressors raise, and ValueError for headers that are too long.
    """
    with open(path, "rb") as file, _open_decompressed(file) as stream:
        metered = MeteredReader(stream)
        metered.allow(MAX_HEADER_BYTES)
        try:
            archive = tarfile.open(fileobj=metered, mode="r:")  # noqa: SIM115 (closed below)
        except tarfile.ReadError as error:
            raise NotAnArchive(str(error)) from None
        with archive:
            yield archive, metered


def _open_decompressed(file: IO[bytes]) -> IO[bytes]:
    """A stream of the file's decompressed content, or the file if it is not compressed."""
    head = file.read(MAGIC_BYTES)
    file.seek(0)
    compression = _find_compression(head)
    if compression == "gzip":
        return gzip.GzipFile(fileobj=file)
    if compression == "bzip2":
        return bz2.BZ2File(file)
    if compression == "xz":
        return io.BufferedReader(_XzStream(file), READ_BYTES)
    return file


def _find_compression(head: bytes) -> str | None:
    for magic, compression in COMPRESSIONS.items():
        if head.startswith(magic):
            return compression
    return None


def iter_entries(archive: tarfile.TarFile, stream: MeteredReader) -> Iterator[tarfile.TarInfo]:
    """Yield a tar's entries in order, without keeping them in memory.

    Read an entry's content before asking for the next one; what is left of it is skipped.
    """
    stream.allow(MAX_HEADER_BYTES)
    while (entry := archive.next()) is not None:
        archive.members.clear()
        archive.pax_headers.clear()  # global ones would be kept, and copied for each entry
        stream.allow(entry.size + MAX_HEADER_BYTES)
        yield entry
        stream.allow(MAX_HEADER_BYTES)
