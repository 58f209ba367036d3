"""Which image formats are opened, and how a file is decoded. Needs no torch."""

import errno
import importlib.util
import io
import struct
import warnings
from functools import cache
from pathlib import Path
from typing import BinaryIO, NamedTuple

from PIL import Image, UnidentifiedImageError

from dataloaders.file_names import refuse_address
from dataloaders.pixels import to_rgb
from system.escaping import summarize_error
from system.files import READ_ERRORS

# The formats of datasets and cameras. Left out on purpose: formats that run a program (PostScript,
# WMF), formats that contain another one (IPTC, FPX, MIC), videos, and formats Pillow cannot decode.
FORMATS = (
    "AVIF",
    "BMP",
    "DDS",
    "GIF",
    "HEIF",
    "JPEG",
    "JPEG2000",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
)


# Pillow warns at half of the size that it refuses. This silences it for the whole process, since
# images are decoded in threads, and Python's warnings cannot be changed for one thread alone.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Broken metadata do not matter for the pixels.
warnings.filterwarnings("ignore", module="PIL.TiffImagePlugin")


# HEIC, the format of phones, is read if this package is installed.
NO_HEIF = "HEIC pictures need one more package: pip install pi-heif"
HEIF_ENDINGS = frozenset({".heic", ".heif", ".hif"})
HEIF_BRANDS = frozenset(b"heic heix heim heis hevc hevx mif1 msf1".split())

# Part of what Pillow says about a text or a color profile that is large once it is unpacked.
TEXT_TOO_LARGE = "MAX_TEXT"
PNG_HEADER = 8
PNG_CHUNK_FRAME = 12  # bytes of a chunk besides its content
PNG_TEXTS = frozenset((b"tEXt", b"zTXt", b"iTXt", b"iCCP"))

# Errors of the moment, not of the file: a later try may succeed.
PASSING_ERRNOS = frozenset(
    {errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.EIO, errno.ENOMEM, errno.EAGAIN}
    | {errno.EINTR, errno.ETIMEDOUT, errno.EBUSY, errno.ENETDOWN, errno.ENETUNREACH, errno.ESTALE}
)


class ImageTooLarge(ValueError):
    """An image that is larger than its reader wants."""


class UnknownFormat(ValueError):
    """An image that none of the decoders installed here knows."""


class EnvironmentProblem(OSError):
    """A file cannot be read for a reason that does not lie in it, such as a permission."""


def is_environments_fault(error: BaseException) -> bool:
    """Whether an error says nothing about the file: a permission, the disk, the memory."""
    return isinstance(error, MemoryError) or getattr(error, "errno", None) in PASSING_ERRNOS


@cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that can be opened here."""
    Image.init()
    if importlib.util.find_spec("pi_heif") is not None:
        import pi_heif

        pi_heif.register_heif_opener()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def picture_endings() -> frozenset[str]:
    """The file extensions of `known_formats`, in lower case, such as ".jpg"."""
    formats = known_formats()
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, name in endings if name in formats)


def read_image(
    path: str | Path, max_pixels: int | None = None, max_side: int | None = None
) -> Image.Image:
    """Decode an image file to RGB, as `to_rgb` does.

    Errors name the file. Raises FileNotFoundError for no file, OSError for one that cannot be read
    at present (EnvironmentProblem), ValueError for one that cannot be decoded (UnknownFormat where
    no decoder knows it), and ImageTooLarge, before decoding, for more than `max_pixels`, a side
    above `max_side`, or more pixels than Pillow accepts.
    """
    limits = _Limits(max_pixels, max_side)
    try:
        try:
            return _decode(path, limits)
        except ValueError as error:
            if TEXT_TOO_LARGE not in str(error):
                raise
            return _decode(_drop_png_texts(path), limits)
    except FileNotFoundError:
        refuse_address(path)
        raise FileNotFoundError(f"no image {path}") from None
    except _OverLimit as error:
        raise ImageTooLarge(f"cannot read the image {path}: {error}") from None
    except Image.DecompressionBombError:
        reason = _too_many(2 * Image.MAX_IMAGE_PIXELS)
        raise ImageTooLarge(f"cannot read the image {path}: {reason}") from None
    except UnidentifiedImageError:
        raise UnknownFormat(f"cannot read the image {path}: {_name_format(path)}") from None
    except (OSError, SyntaxError, *READ_ERRORS) as error:
        message = f"cannot read the image {path}: {summarize_error(error)}"
        if is_environments_fault(error):
            raise EnvironmentProblem(message) from None
        raise ValueError(message) from None


class _OverLimit(Exception):
    """An image is larger than its reader wants; says in which way."""


class _Limits(NamedTuple):
    max_pixels: int | None
    max_side: int | None

    def check(self, image: Image.Image) -> None:
        """Raise _OverLimit for an image that is too large; only its header has been read."""
        width, height = image.size
        if self.max_pixels is not None and width * height > self.max_pixels:
            raise _OverLimit(_too_many(self.max_pixels))
        if self.max_side is not None and max(image.size) > self.max_side:
            raise _OverLimit(f"a side of more than {self.max_side} pixels")


def _decode(source: str | Path | BinaryIO, limits: _Limits) -> Image.Image:
    with Image.open(source, formats=known_formats()) as image:
        limits.check(image)
        return to_rgb(image)


def _too_many(limit: int) -> str:
    return f"more than {limit / 1e6:.0f} million pixels"


def _drop_png_texts(path: str | Path) -> BinaryIO:
    """A PNG without the chunks that may hold large texts, which Pillow refuses."""
    content = Path(path).read_bytes()
    kept = [content[:PNG_HEADER]]
    start = PNG_HEADER
    while start + PNG_CHUNK_FRAME <= len(content):
        length, kind = struct.unpack_from(">I4s", content, start)
        end = start + PNG_CHUNK_FRAME + length
        if kind not in PNG_TEXTS:
            kept.append(content[start:end])
        start = end
    return io.BytesIO(b"".join(kept))


def _name_format(path: str | Path) -> str:
    """What is wrong with a file that no decoder knows; for HEIC, which package decodes it."""
    with open(path, "rb") as file:
        head = file.read(12)
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS:
        return NO_HEIF
    return f"not an image in a supported format ({', '.join(known_formats())})"
