"""Which image formats are opened, and how a file is decoded. Needs no torch."""

import warnings
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from system.escaping import summarize_error
from system.files import READ_ERRORS

# The formats of datasets and cameras. Left out on purpose: formats that run a program (PostScript,
# WMF), formats that contain another one (IPTC, FPX, MIC), videos, and formats Pillow cannot decode.
FORMATS = (
    "AVIF",
    "BMP",
    "DDS",
    "GIF",
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


class ImageTooLarge(ValueError):
    """An image that is larger than its reader wants."""


@cache
def known_formats() -> tuple[str, ...]:
    """Those of FORMATS that this Pillow can open."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


@cache
def picture_endings() -> frozenset[str]:
    """The file extensions of `known_formats`, in lower case, such as ".jpg"."""
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, name in endings if name in known_formats())


def read_image(
    path: str | Path, max_pixels: int | None = None, max_side: int | None = None
) -> Image.Image:
    """Decode an image file to RGB, rotated as its EXIF data says.

    Errors name the file. Raises FileNotFoundError for no file, ValueError for one that cannot be
    decoded, and ImageTooLarge, before decoding, for more than `max_pixels`, a side above
    `max_side`, or more pixels than Pillow accepts.
    """
    try:
        with Image.open(path, formats=known_formats()) as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ImageTooLarge(_too_many(path, max_pixels))
            if max_side is not None and max(image.size) > max_side:
                raise ImageTooLarge(
                    f"cannot read the image {path}: a side of more than {max_side} pixels"
                )
            return to_rgb(ImageOps.exif_transpose(image))
    except FileNotFoundError:
        raise FileNotFoundError(f"no image {path}") from None
    except ImageTooLarge:
        raise
    except Image.DecompressionBombError:
        raise ImageTooLarge(_too_many(path, 2 * Image.MAX_IMAGE_PIXELS)) from None
    except UnidentifiedImageError:
        formats = ", ".join(known_formats())
        raise ValueError(
            f"cannot read the image {path}: not an image in a supported format ({formats})"
        ) from None
    except (OSError, SyntaxError, *READ_ERRORS) as error:
        raise ValueError(f"cannot read the image {path}: {summarize_error(error)}") from None


def _too_many(path: str | Path, limit: int) -> str:
    return f"cannot read the image {path}: more than {limit / 1e6:.0f} million pixels"


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. 16-bit gray keeps its high byte; Pillow alone would clip it at 255."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")
