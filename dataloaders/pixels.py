"""Pixels of any kind → 8-bit RGB, as a viewer shows them (docs/reference.md, Images).

Dimensions: H rows, W columns.
"""

import io
import logging
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms

from system.files import READ_ERRORS

log = logging.getLogger(__name__)

ORIENTATION = 0x0112  # the EXIF tag
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# TIFF's tags for the range of the values: of unsigned integers, and of all kinds.
RANGE_TAGS = ((340, 341), (280, 281))
PHOTOMETRIC = 262  # a TIFF tag; 0: the smallest value is white
BITS_PER_SAMPLE = 258
SAMPLE_FORMAT = 339
UNSIGNED = 1
WHITE = 255
# Pillow reads these formats' 16-bit grays as 32-bit integers.
DEEP_FORMATS = ("PNG", "PPM")
# How Pillow reads PNG's grays of 2 and 4 bits, and colors of 16, and with which factor.
PNG_KEY_SCALES = {"L;2": 85, "L;4": 17, "RGB;16B": 1 / 256}
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
MAX_PROFILE = 4 << 20  # bytes
# What a color profile must be about, by the mode of the pixels.
PROFILE_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}
METADATA_ERRORS = (OSError, SyntaxError, *READ_ERRORS)


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB, turned as its EXIF data says.

    Grays of more than 8 bits are scaled, transparent pixels are laid on white, and colors follow
    the image's own profile. Broken EXIF data and profiles are ignored. Raises ValueError for pixels
    that are no numbers.
    """
    scale = _scale_of_key(image)
    image.load()
    # Only now: Pillow itself turns TIFF as it loads it, and then forgets the orientation.
    turn = TURNS.get(_read_orientation(image))
    rgb = _convert(_scale_transparency(image, scale))
    return rgb if turn is None else rgb.transpose(turn)


def _scale_of_key(image: Image.Image) -> float:
    """By what a PNG's transparent value must be multiplied, as Pillow does with the pixels."""
    tiles = getattr(image, "tile", None)
    is_png = image.format == "PNG" and tiles
    return PNG_KEY_SCALES.get(tiles[0][3], 1) if is_png else 1


def _scale_transparency(image: Image.Image, scale: float) -> Image.Image:
    """The image, or a copy of it whose transparent value is in the range of its pixels."""
    clear = image.info.get("transparency")
    if scale == 1 or clear is None:
        return image
    scaled = image.copy()
    if isinstance(clear, int):
        scaled.info["transparency"] = int(clear * scale)
    else:
        scaled.info["transparency"] = tuple(int(value * scale) for value in clear)
    return scaled


def _read_orientation(image: Image.Image) -> int | None:
    try:
        value = image.getexif().get(ORIENTATION)
    except METADATA_ERRORS:
        return None
    if isinstance(value, tuple) and value:
        value = value[0]
    return value if isinstance(value, int) else None


def _convert(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _lay_on_white(_scale_gray(image).convert("RGB"), _gray_alpha(image))
    if image.mode in ALPHA_MODES or "transparency" in image.info:
        opaque = _apply_profile(image.convert("RGBA").convert("RGB"), image)
        return _lay_on_white(opaque, image.convert("RGBA").getchannel("A"))
    if image.mode == "LAB":
        try:
            return ImageCms.profileToProfile(image, _lab(), _srgb(), outputMode="RGB")
        except ImageCms.PyCMSError as error:
            raise ValueError(f"its LAB colors cannot be converted: {error}") from None
    return _apply_profile(image, image).convert("RGB")


def _lay_on_white(rgb: Image.Image, alpha: Image.Image | None) -> Image.Image:
    """(a·v + (255 − a)·255) / 255, rounded, where `alpha` is below 255."""
    if alpha is None or alpha.getextrema() == (WHITE, WHITE):
        return rgb
    values = np.asarray(rgb).astype(np.uint16)
    weights = np.asarray(alpha).astype(np.uint16)[..., None]
    mixed = weights * values + (WHITE - weights) * WHITE
    return Image.fromarray(((mixed + WHITE // 2) // WHITE).astype(np.uint8))


def _read_values(image: Image.Image) -> np.ndarray:
    """The grays (H, W). Pillow shows TIFF's unsigned 32-bit integers as signed ones."""
    values = np.asarray(image)
    is_unsigned = _stated(image, SAMPLE_FORMAT) in (None, UNSIGNED)
    if image.mode == "I" and _stated(image, BITS_PER_SAMPLE) == 32 and is_unsigned:
        return values.view(np.uint32)
    return values


class _Range(NamedTuple):
    """The values that become black and white."""

    low: float
    high: float
    is_found: bool = False
    """Whether they are the image's own extremes, for want of anything better."""


def _scale_gray(image: Image.Image) -> Image.Image:
    """255·(v − low) / (high − low), rounded, as 8-bit gray."""
    values = _read_values(image)
    finite = values[np.isfinite(values)] if image.mode == "F" else values
    if not finite.size:
        raise ValueError("no pixel is a number")
    chosen = _choose_range(image, finite)
    if chosen.is_found:
        _tell_about_range()
    width = chosen.high - chosen.low or 1.0
    # Doubles hold all 32-bit integers. What is no number becomes black.
    shares = np.nan_to_num((values.astype(np.float64) - chosen.low) / width, nan=0.0)
    scaled = np.floor(255 * np.clip(shares, 0, 1) + 0.5).astype(np.uint8)
    if _stated(image, PHOTOMETRIC) == 0:
        scaled = WHITE - scaled
    return Image.fromarray(scaled)


def _choose_range(image: Image.Image, finite: np.ndarray) -> _Range:
    """What the file states; else 16 bits' range, 0 to 1 or 0 to 255 if all values are in it; else
    the values' own extremes."""
    low, high = float(finite.min()), float(finite.max())
    for low_tag, high_tag in RANGE_TAGS:
        stated_low = _stated(image, low_tag) or 0.0
        stated_high = _stated(image, high_tag)
        if stated_high is not None and stated_low <= low <= high <= stated_high > stated_low:
            return _Range(stated_low, stated_high)
    is_deep = image.mode == "I" and image.format in DEEP_FORMATS
    if image.mode.startswith("I;16") or is_deep:
        bits = min(_stated(image, BITS_PER_SAMPLE) or 16, 16)
        return _Range(0.0, 2**bits - 1)
    if image.mode == "F" and low >= 0 and high <= 1:
        return _Range(0.0, 1.0)
    if low >= 0 and high <= WHITE:
        return _Range(0.0, WHITE)
    return _Range(low, high, is_found=True)


def _stated(image: Image.Image, tag: int) -> float | None:
    """A number that a TIFF file states about its only channel."""
    try:
        value = getattr(image, "tag_v2", {}).get(tag)
        value = value[0] if isinstance(value, tuple) else value
        number = None if value is None else float(value)
    except METADATA_ERRORS:
        return None
    return number if number is None or np.isfinite(number) else None


@cache
def _tell_about_range() -> None:
    """Say, once, what is made of unusual ranges of values."""
    log.warning(
        "some gray images have values outside 0 to 255 and do not say which are black and white: "
        "in each, the smallest becomes black and the largest white"
    )


def _gray_alpha(image: Image.Image) -> Image.Image | None:
    """The alpha of a gray in which one value is transparent."""
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return None
    return Image.fromarray(np.where(np.asarray(image) == clear, 0, WHITE).astype(np.uint8))


def _apply_profile(pixels: Image.Image, image: Image.Image) -> Image.Image:
    """The pixels in sRGB, by the profile that the image brings; as they are if it brings none."""
    data = image.info.get("icc_profile")
    space = PROFILE_SPACES.get(pixels.mode)
    if not isinstance(data, bytes) or space is None or len(data) > MAX_PROFILE:
        return pixels
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if profile.profile.xcolor_space != space or "sRGB" in _describe(profile):
            return pixels
        return ImageCms.profileToProfile(pixels, profile, _srgb(), outputMode="RGB")
    except (ImageCms.PyCMSError, *METADATA_ERRORS):
        return pixels


def _describe(profile: ImageCms.ImageCmsProfile) -> str:
    return profile.profile.profile_description or ""


@cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("sRGB")


@cache
def _lab() -> ImageCms.ImageCmsProfile:
    return ImageCms.createProfile("LAB")
