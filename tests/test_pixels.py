"""Pixels of every kind: the formulas of docs/reference.md, and what OpenCV reads."""

import io
import logging
import os
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest
from PIL import Image, ImageCms

from dataloaders import picture_files, pixels
from dataloaders.picture_files import EnvironmentProblem, UnknownFormat, read_image
from dataloaders.storage.image_check import unreadable_images
from tests.conftest import ROOT

RAMP = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
ORIENTATION = 0x0112


@pytest.fixture(autouse=True)
def _tell_anew():
    pixels._tell_about_range.cache_clear()


def read(folder: Path, image: Image.Image, name: str = "a.png", **options: Any) -> np.ndarray:
    """The RGB (H, W, 3) of an image that was written to a file."""
    image.save(folder / name, **options)
    return np.asarray(read_image(folder / name)).astype(int)


def gray(folder: Path, image: Image.Image, name: str = "a.tif", **options: Any) -> np.ndarray:
    """As `read`, for an image that must come out gray (H, W)."""
    rgb = read(folder, image, name, **options)
    assert (rgb == rgb[..., :1]).all()
    return rgb[..., 0]


def rounded(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5).astype(int)


SCALED_RAMP = rounded(RAMP.astype(float) * 255 / 65535)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jp2"])
def test_16_bits_are_scaled(tmp_path, name):
    found = gray(tmp_path, Image.fromarray(RAMP), name)
    assert np.array_equal(found, SCALED_RAMP)


def test_16_bits_in_the_other_byte_order(tmp_path):
    big = Image.frombytes("I;16B", (30, 20), RAMP.astype(">u2").tobytes())
    assert np.array_equal(gray(tmp_path, big), SCALED_RAMP)


def test_a_pgm_of_16_bits(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 30 20 65535\n" + RAMP.astype(">u2").tobytes())
    found = np.asarray(read_image(tmp_path / "a.pgm"))[..., 0]
    assert np.array_equal(found, SCALED_RAMP)


def test_fewer_bits_that_the_file_states(tmp_path):
    ten_bits = RAMP >> 6
    found = gray(tmp_path, Image.fromarray(ten_bits), tiffinfo={281: 1023})
    assert np.array_equal(found, rounded(ten_bits * 255.0 / 1023))
    untrue = gray(tmp_path, Image.fromarray(RAMP), tiffinfo={281: 1023})
    assert np.array_equal(untrue, SCALED_RAMP)


def test_a_tiff_in_which_zero_is_white(tmp_path):
    found = gray(tmp_path, Image.fromarray(RAMP), tiffinfo={262: 0})
    assert np.array_equal(found, 255 - SCALED_RAMP)


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_wide_values_from_0_to_255_stay(tmp_path, kind, caplog):
    values = (RAMP >> 8).astype(kind)
    assert np.array_equal(gray(tmp_path, Image.fromarray(values)), values)
    assert caplog.messages == []


def test_floats_from_0_to_1(tmp_path):
    values = (RAMP / 65535).astype(np.float32)
    found = gray(tmp_path, Image.fromarray(values))
    assert np.array_equal(found, rounded(values.astype(float) * 255))


@pytest.mark.parametrize(
    ("low", "high", "kind"),
    [(-40.0, 85.5, np.float32), (0, 4095, np.int32), (-1000, 3000, np.int32), (0, 1e9, np.float32)],
)
def test_other_ranges_are_told_once(tmp_path, caplog, low, high, kind):
    values = (low + RAMP / 65535 * (high - low)).astype(kind)
    exact = values.astype(float)
    expected = rounded((exact - exact.min()) / (exact.max() - exact.min()) * 255)
    for _ in range(2):
        assert np.array_equal(gray(tmp_path, Image.fromarray(values)), expected)
    (line,) = caplog.messages
    assert "the smallest becomes black and the largest white" in line


def test_a_stated_range_of_floats(tmp_path, caplog):
    values = (RAMP / 65535 * 50).astype(np.float32)
    stated = {340: -100.0, 341: 100.0}
    found = gray(tmp_path, Image.fromarray(values), tiffinfo=stated)
    assert np.array_equal(found, rounded((values.astype(float) + 100) / 200 * 255))
    assert caplog.messages == []


def test_unsigned_32_bits(tmp_path):
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    signed = encode(Image.fromarray(values.view(np.int32)), "TIFF")
    sample_format = struct.pack("<HHIH", 339, 3, 1, 2)
    assert signed.count(sample_format) == 1
    unsigned = signed.replace(sample_format, struct.pack("<HHIH", 339, 3, 1, 1))
    (tmp_path / "a.tif").write_bytes(unsigned)
    assert np.asarray(read_image(tmp_path / "a.tif"))[..., 0].tolist() == [[0, 128, 255]]


def test_what_is_no_number(tmp_path):
    values = np.array([[np.nan, 0.5, np.inf, -np.inf, 1.0]], np.float32)
    assert gray(tmp_path, Image.fromarray(values)).tolist() == [[0, 128, 255, 0, 255]]
    Image.fromarray(np.full((3, 3), np.nan, np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: no pixel is a number"):
        read_image(tmp_path / "a.tif")


def on_white(values: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """docs/reference.md: (a·v + (255 − a)·255) / 255, rounded."""
    weights = alpha.astype(int)[..., None]
    return rounded((weights * values + (255 - weights) * 255) / 255)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 4), dtype=np.uint8)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.tga"])
def test_transparent_pixels_are_laid_on_white(tmp_path, noise, name):
    found = read(tmp_path, Image.fromarray(noise), name)
    assert np.array_equal(found, on_white(noise[..., :3], noise[..., 3]))


def test_what_lies_hidden_below_makes_no_difference(tmp_path, noise):
    noise[..., 3] = np.where(noise[..., 3] > 128, 255, 0)
    found = read(tmp_path, Image.fromarray(noise))
    noise[noise[..., 3] == 0, :3] = 77
    assert np.array_equal(found, read(tmp_path, Image.fromarray(noise)))
    assert (found[noise[..., 3] == 0] == 255).all()


def test_opaque_pixels_keep_every_bit(tmp_path, noise):
    noise[..., 3] = 255
    assert np.array_equal(read(tmp_path, Image.fromarray(noise)), noise[..., :3])


def test_gray_with_alpha(tmp_path, noise):
    image = Image.merge("LA", [Image.fromarray(noise[..., n]) for n in (0, 3)])
    expected = on_white(noise[..., :1].repeat(3, axis=2), noise[..., 3])
    assert np.array_equal(read(tmp_path, image), expected)


@pytest.mark.parametrize("name", ["a.png", "a.gif"])
def test_palettes_with_transparent_colors(tmp_path, name):
    image = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2), "P")
    image.putpalette([9, 8, 7, 200, 0, 0, 0, 200, 0, 0, 0, 200])
    found = read(tmp_path, image, name, transparency=1)
    assert found.tolist() == [[[9, 8, 7], [255, 255, 255]], [[0, 200, 0], [0, 0, 200]]]


def test_a_palette_with_half_transparent_colors(tmp_path):
    image = Image.fromarray(np.arange(2, dtype=np.uint8).reshape(1, 2), "P")
    image.putpalette([100, 0, 0, 0, 0, 50])
    found = read(tmp_path, image, transparency=bytes([51, 255]))
    assert found.tolist() == [[[224, 204, 204], [0, 0, 50]]]


@pytest.mark.parametrize(("mode", "clear"), [("L", 7), ("RGB", (7, 7, 7))])
def test_one_transparent_color(tmp_path, mode, clear):
    image = Image.fromarray(np.array([[7, 8]], np.uint8)).convert(mode)
    found = read(tmp_path, image, transparency=clear)
    assert found.tolist() == [[[255] * 3, [8] * 3]]


def test_one_transparent_gray_of_16_bits(tmp_path):
    image = Image.fromarray(np.array([[0, 25700]], np.uint16))
    assert read(tmp_path, image, transparency=0).tolist() == [[[255] * 3, [100] * 3]]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientations_are_those_of_opencv(tmp_path, noise, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    found = read(tmp_path, Image.fromarray(noise[..., :3]), "a.jpg", quality=95, exif=exif)
    theirs = cv2.imread(str(tmp_path / "a.jpg"))[..., ::-1]
    assert found.shape == theirs.shape
    assert np.abs(found - theirs).max() <= 2


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0This is no EXIF at all",
        b"\0\x08\0\x02\x01",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4s", 1, ORIENTATION, 2, 4, b"top\0"),
        b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<HHHI4s", 1, ORIENTATION, 3, 1, b"\x63\0\0\0"),
    ],
)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_broken_exif_data_are_ignored(tmp_path, noise, exif, name):
    plain = read(tmp_path, Image.fromarray(noise[..., :3]), name)
    assert np.array_equal(read(tmp_path, Image.fromarray(noise[..., :3]), name, exif=exif), plain)


def profile_with(change: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """sRGB's profile with its three primaries exchanged, and another name."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    (count,) = struct.unpack_from(">I", data, 128)
    for number in range(count):
        kind, place, size = struct.unpack_from(">4sII", data, 132 + 12 * number)
        tags[kind] = data[place : place + size], place
    order = change(np.array([b"rXYZ", b"gXYZ", b"bXYZ"]))
    for name, source in zip((b"rXYZ", b"gXYZ", b"bXYZ"), order, strict=True):
        content, _ = tags[bytes(source)]
        data[tags[name][1] : tags[name][1] + len(content)] = content
    return bytes(data).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))


def test_colors_follow_the_profile_of_the_image(tmp_path):
    """In this profile what is called red is shown green, and so on."""
    swapped = profile_with(lambda names: names[[1, 2, 0]])
    colors = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [128, 128, 128]]], np.uint8)
    found = read(tmp_path, Image.fromarray(colors), icc_profile=swapped)
    expected = [[[0, 255, 0], [0, 0, 255], [255, 0, 0], [128, 128, 128]]]
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("profile", [b"no profile", b"", bytes(5 << 20)])
def test_broken_profiles_are_ignored(tmp_path, noise, profile):
    found = read(tmp_path, Image.fromarray(noise[..., :3]), "a.tif", icc_profile=profile)
    assert np.array_equal(found, noise[..., :3])


def test_srgbs_own_profile_changes_no_bit(tmp_path, noise):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = read(tmp_path, Image.fromarray(noise[..., :3]), icc_profile=profile)
    assert np.array_equal(found, noise[..., :3])


def test_lab_of_a_tiff(tmp_path):
    lab = ImageCms.createProfile("LAB")
    srgb = ImageCms.createProfile("sRGB")
    colors = Image.fromarray(np.array([[[200, 30, 10], [255, 255, 255]]], np.uint8))
    converted = ImageCms.profileToProfile(colors, srgb, lab, outputMode="LAB")
    assert np.abs(read(tmp_path, converted, "a.tif") - np.asarray(colors)).max() <= 4


def chunk(kind: bytes, content: bytes) -> bytes:
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


@pytest.mark.parametrize(
    "added",
    [
        chunk(b"zTXt", b"workflow\0\0" + zlib.compress(b"x" * 3_000_000)),
        chunk(b"iTXt", b"workflow\0\1\0en\0\0" + zlib.compress(b"x" * 3_000_000)),
        chunk(b"iCCP", b"name\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"zTXt", b"note\0\0" + zlib.compress(b"x" * 1_000_000)) * 80,
        chunk(b"tEXt", b"workflow\0" + b"x" * 3_000_000),
    ],
)
def test_large_texts_in_a_png_do_not_matter(tmp_path, noise, added):
    plain = read(tmp_path, Image.fromarray(noise[..., :3]))
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(content[:33] + added + content[33:])
    assert np.array_equal(np.asarray(read_image(tmp_path / "a.png")), plain)


HEIC_HEAD = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic\0\0\0\x08mdat"


def test_heic_names_the_package_that_reads_it(tmp_path, monkeypatch):
    (tmp_path / "a.heic").write_bytes(HEIC_HEAD)
    with pytest.raises(UnknownFormat, match=r"a\.heic: HEIC pictures need .* pip install pi-heif"):
        read_image(tmp_path / "a.heic")


def test_a_passing_fault_is_not_the_files(tmp_path, monkeypatch):
    """It is found again by the next check, unlike a fault in the bytes."""
    image, broken, unknown = (tmp_path / name for name in ("a.png", "b.png", "c.png"))
    Image.effect_noise((64, 64), 50).save(image)
    broken.write_bytes(image.read_bytes()[:2000])
    unknown.write_bytes(b"no image")
    paths = [str(path) for path in (image, broken, unknown)]
    looked_at = []
    decode = picture_files._decode

    def refuse(path, limits):
        looked_at.append(path)
        if path == str(image):
            raise PermissionError(13, "Permission denied", path)
        return decode(path, limits)

    monkeypatch.setattr(picture_files, "_decode", refuse)
    with pytest.raises(EnvironmentProblem, match=r"a\.png: .*Permission denied"):
        read_image(str(image))

    def check() -> list[str]:
        looked_at.clear()
        return sorted(unreadable_images(paths, str(tmp_path / "cache"), lambda items, *_: items))

    assert check() == paths
    assert check() == paths
    assert sorted(looked_at) == [str(image), str(unknown)]
    monkeypatch.setattr(picture_files, "_decode", decode)
    assert check() == paths[1:]
    assert check() == paths[1:]


class Drawn(NamedTuple):
    """A file and the RGB that it must give, within `tolerance`."""

    content: bytes
    expected: np.ndarray
    tolerance: int = 0


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_opencv(content: bytes) -> Drawn:
    found = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return Drawn(content, found[..., ::-1].astype(int), tolerance=2)


def draw_eight_bits(rng: random.Random, values: np.ndarray) -> Drawn:
    mode = rng.choice(["RGB", "L", "P", "1"])
    image = Image.fromarray(values[..., :3]).convert(mode)
    kind = rng.choice(["PNG", "BMP", "TIFF"] + (["JPEG", "PPM"] if mode in ("RGB", "L") else []))
    options: dict[str, Any] = {}
    if kind == "JPEG":
        options["exif"] = Image.Exif()
        options["exif"][ORIENTATION] = rng.randint(1, 8)
    return as_opencv(encode(image, kind, **options))


def draw_alpha(rng: random.Random, values: np.ndarray) -> Drawn:
    kind = rng.choice(["PNG", "TIFF", "TGA", "WEBP"])
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    content = encode(Image.fromarray(values), kind, **options)
    return Drawn(content, on_white(values[..., :3], values[..., 3]))


def draw_deep(rng: random.Random, values: np.ndarray) -> Drawn:
    deep = values[..., 0].astype(np.uint16) * 256 + values[..., 1]
    kind = rng.choice(["PNG", "TIFF", "JPEG2000"])
    if kind == "JPEG2000" and min(deep.shape) < 2:
        kind = "PNG"
    return Drawn(encode(Image.fromarray(deep), kind), to_gray(deep, 0, 65535))


def draw_wide(rng: random.Random, values: np.ndarray) -> Drawn:
    """32-bit integers or floats of any range."""
    low, high = sorted(rng.uniform(-1e5, 1e5) for _ in range(2))
    low = rng.choice([0.0, low])
    high = max(rng.choice([1.0, 255.0, high]), low + 1)
    kind = rng.choice([np.int32, np.float32])
    wide = (low + values[..., 0] / 255 * (high - low)).astype(kind)
    least, most = float(wide.min()), float(wide.max())
    if kind is np.float32 and least >= 0 and most <= 1:
        least, most = 0, 1
    elif least >= 0 and most <= 255:
        least, most = 0, 255
    return Drawn(encode(Image.fromarray(wide), "TIFF"), to_gray(wide, least, most))


def to_gray(values: np.ndarray, low: float, high: float) -> np.ndarray:
    shares = (values.astype(float) - low) / ((high - low) or 1)
    return rounded(255 * np.clip(shares, 0, 1))[..., None].repeat(3, axis=2)


DRAWERS = (draw_eight_bits, draw_alpha, draw_deep, draw_wide)


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_drawn_pictures_of_every_kind(tmp_path, count):
    logging.disable(logging.WARNING)
    try:
        for number in range(count):
            rng = random.Random(number)
            draw = DRAWERS[number % len(DRAWERS)]
            shape = rng.randint(1, 40), rng.randint(1, 40), 4
            values = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
            drawn = draw(rng, values)
            path = tmp_path / "a.picture"
            path.write_bytes(drawn.content)
            found = np.asarray(read_image(path)).astype(int)
            assert found.shape == drawn.expected.shape, (number, draw)
            assert np.abs(found - drawn.expected).max() <= drawn.tolerance, (number, draw)
    finally:
        logging.disable(logging.NOTSET)


def test_heic_is_read_once_its_package_is_installed(tmp_path):
    """A stand-in for pi_heif, which registers its decoder with Pillow."""
    package = tmp_path / "site" / "pi_heif.py"
    package.parent.mkdir()
    package.write_text(
        "from PIL import Image\n"
        "def register_heif_opener():\n"
        "    Image.register_open('HEIF', lambda file, name: Image.new('RGB', (3, 2), 'red'))\n"
        "    Image.register_extensions('HEIF', ['.heic', '.heif'])\n"
    )
    (tmp_path / "a.heic").write_bytes(HEIC_HEAD)
    code = (
        "from dataloaders.picture_files import picture_endings, read_image; "
        "assert '.heic' in picture_endings(); "
        f"print(read_image({str(tmp_path / 'a.heic')!r}).size)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(package.parent), str(ROOT)])}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "(3, 2)\n"


# ---- found by a hunt ----


@pytest.mark.parametrize("ending", ["tif", "png", "jpg", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_each_format_is_turned_once(ending, orientation, tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:8, :8] = 255
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"x.{ending}"
    Image.fromarray(pixels).save(path, exif=exif, quality=100)
    found = np.asarray(read_image(path)).mean(axis=2) > 127
    corners = found[2, 2], found[2, -3], found[-3, 2], found[-3, -3]
    white = {1: 0, 2: 1, 3: 3, 4: 2, 5: 0, 6: 1, 7: 3, 8: 2}[orientation]
    assert corners == tuple(n == white for n in range(4))
    assert found.shape == ((16, 32) if orientation < 5 else (32, 16))


@pytest.mark.parametrize("bits", [2, 4])
def test_the_transparent_value_of_shallow_grays(bits, tmp_path):
    key = 1
    rows = np.array([[key << (8 - bits)], [0]], np.uint8)  # a column of one transparent pixel
    path = tmp_path / "x.png"
    path.write_bytes(png_of(1, 2, bits, 0, rows, trns=struct.pack(">H", key)))
    assert np.asarray(read_image(path))[:, 0, 0].tolist() == [255, 0]


def test_the_transparent_color_of_deep_pngs(tmp_path):
    color = (0x1234, 0x5678, 0x9ABC)
    rows = np.frombuffer(struct.pack(">6H", *color, 0, 0, 0), np.uint8).reshape(2, 6)
    path = tmp_path / "x.png"
    path.write_bytes(png_of(1, 2, 16, 2, rows, trns=struct.pack(">3H", *color)))
    assert np.asarray(read_image(path))[:, 0].tolist() == [[255] * 3, [0] * 3]


def png_of(width, height, bits, kind, rows, trns) -> bytes:
    """A PNG of these packed rows with a tRNS chunk."""

    def chunk(name, content):
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    chunks = (b"IHDR", header), (b"tRNS", trns), (b"IDAT", data), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks)


def test_float_pictures_of_ppm_are_not_black(tmp_path):
    values = np.linspace(0, 1, 16, dtype="<f4").reshape(4, 4)
    path = tmp_path / "x.pfm"
    path.write_bytes(b"Pf\n4 4\n-1.0\n" + values[::-1].tobytes())
    found = np.asarray(read_image(path))[..., 0]
    np.testing.assert_allclose(found, values * 255, atol=0.51)
