"""Hostile pictures: read, or refused in one line; no program starts, no other format opens."""

import io
import os
import random
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from dataloaders.images import load_image, read_image
from dataloaders.picture_files import picture_endings
from tests.conftest import ROOT
from tests.hostile import (
    Source,
    audited,
    mutate,
    stays_inside,
)

POSTSCRIPT = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto\n%%EOF\n"
)
NOT_READ_HERE = r"a\.png: not an image in a supported format"


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_checksums(png: bytes) -> bytes:
    """A PNG whose chunks' checksums are right again."""
    whole, place = bytearray(png), 8
    while place + 12 <= len(whole):
        end = place + 8 + int.from_bytes(whole[place : place + 4], "big")
        if end + 4 > len(whole):
            break
        whole[end : end + 4] = zlib.crc32(whole[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
    return bytes(whole)


def image_files() -> dict[str, bytes]:
    """An intact picture of each format."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    deep = Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    flat = noise.convert("P")
    return {
        "JPEG": encoded(noise, "JPEG", exif=exif),
        "CMYK JPEG": encoded(noise.convert("CMYK"), "JPEG"),
        "PNG": encoded(noise, "PNG", exif=exif),
        "GIF": encoded(flat, "GIF", save_all=True, append_images=[flat.rotate(90)]),
        "TIFF": encoded(noise, "TIFF"),
        "BMP": encoded(noise, "BMP"),
        "TIFF by LZW": encoded(noise, "TIFF", compression="tiff_lzw"),
        "WebP": encoded(noise, "WEBP"),
        "QOI": encoded(noise, "QOI"),
        "JPEG 2000": encoded(noise, "JPEG2000"),
        "DDS": encoded(noise, "DDS"),
        "16 bits": encoded(deep, "PNG"),
        "palette": encoded(flat, "PNG"),
    }


def image_sources() -> dict[str, Source]:
    """Mutated pictures of each format; of PNGs also such with valid checksums."""
    sources = {}
    for name, content in image_files().items():
        sources[name] = partial(mutate, content)
        if name in ("PNG", "16 bits", "palette"):
            sources[f"{name}, valid checksums"] = partial(mutated_png, content)
    return sources


def mutated_png(content: bytes, draw: random.Random) -> bytes:
    """A mutated PNG whose checksums are right again."""
    return with_checksums(mutate(content, draw))


def read_picture(path: Path) -> None:
    """Decode and resize."""
    assert load_image(path, 16).shape == (3, 16, 16)


def damaged_pictures() -> dict[str, tuple[bytes, str]]:
    """By file name: the content, and what the refusal says of it."""
    dot = Image.new("RGB", (1, 1))
    bomb = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    animated = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    animated[6:10] = struct.pack("<HH", 65535, 65535)
    intact = encoded(Image.new("RGB", (30, 20), "red"), "PNG")
    flags = bytearray(encoded(Image.new("RGB", (8, 8)), "DDS"))
    flags[80:84] = bytes(4)
    flat = encoded(dot, "BMP").replace(struct.pack("<ii", 1, 1), bytes(8))
    return {
        "empty.png": (b"", "not an image"),
        "text.png": (b"no image", "not an image"),
        "page.jpg": (b"<html></html>", "not an image"),
        "bomb.png": (with_checksums(bytes(bomb)), "more than 179 million pixels"),
        "bomb.gif": (bytes(animated), "more than 179 million pixels"),
        "cut.png": (intact[: len(intact) // 2], ""),
        "head.png": (intact[:20], ""),
        "flags.dds": (bytes(flags), "Unknown pixel format"),
        "flat.bmp": (flat, ""),
    }


@pytest.mark.parametrize("name", damaged_pictures())
def test_damaged_pictures_are_refused_in_one_line(name, tmp_path):
    content, reason = damaged_pictures()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read the image .*{name}.*{reason}") as error:
        load_image(tmp_path / name)
    assert "\n" not in str(error.value)


def test_folders_and_impossible_names_are_refused_as_pictures(tmp_path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="folder.png"):
        load_image(tmp_path / "folder.png")
    with pytest.raises(ValueError, match="cannot read the image"):
        load_image("a\0.png")


def test_pictures_that_are_unusual_but_sound_are_read(tmp_path):
    color = (200, 30, 10)
    red = Image.new("RGB", (30, 20), color)
    palette = red.quantize(4)
    second = Image.new("P", (30, 20), 1)
    files = {
        "cmyk.jpg": encoded(red.convert("CMYK"), "JPEG"),
        "one.png": encoded(red.resize((1, 1)), "PNG"),
        "two.gif": encoded(palette, "GIF", save_all=True, append_images=[second]),
        "clear2.png": encoded(red.convert("RGBA"), "PNG"),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        pixels = np.asarray(read_image(tmp_path / name)).astype(int)
        assert np.abs(pixels - color).max() < 12, name
        assert load_image(tmp_path / name).shape == (3, 224, 224)


def test_postscript_under_a_pictures_name_runs_no_program(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(POSTSCRIPT)
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with audited() as events, pytest.raises(ValueError, match=NOT_READ_HERE):
        load_image(tmp_path / "a.png")
    assert stays_inside(events, tmp_path)
    assert not (tmp_path / "ran").exists()


def iptc_with(content: bytes) -> bytes:
    """An IPTC file of ten by ten pixels that holds another file."""
    side = struct.pack(">H", 10)
    fields = {
        (3, 60): b"\1\0",
        (3, 20): side,
        (3, 30): side,
        (3, 120): b"\5",
        (8, 10): content,
    }
    parts = (
        b"\x1c" + bytes(kind) + struct.pack(">H", len(part)) + part for kind, part in fields.items()
    )
    return b"".join(parts)


@pytest.mark.parametrize("kind", ["IPTC", "PostScript", "ICO", "ICNS", "PCX", "SGI", "PDF", "IM"])
def test_formats_that_hold_others_or_run_programs_are_not_opened(kind, tmp_path):
    if kind == "IPTC":
        content = iptc_with(POSTSCRIPT)
    elif kind == "PostScript":
        content = POSTSCRIPT
    else:
        content = encoded(Image.new("RGB", (16, 16), "red"), kind)
    (tmp_path / "a.png").write_bytes(content)
    expected = rf"{NOT_READ_HERE} \((AVIF|BMP)"
    with audited() as events, pytest.raises(ValueError, match=expected):
        read_image(tmp_path / "a.png")
    assert stays_inside(events, tmp_path)


def test_folders_are_searched_for_pictures_of_the_formats_that_are_read():
    endings = picture_endings()
    assert {".png", ".jpg", ".webp", ".tif", ".gif", ".bmp", ".jp2"} <= endings
    holds_others = {".eps", ".ps", ".iim", ".wmf", ".emf", ".pdf", ".ico", ".psd"}
    assert not endings & (holds_others | {".mpg", ".h5", ".fits"})


def test_every_reader_of_pictures_opens_the_same_formats():
    """`Image.open` is called in one place."""
    folders = ("system", "modules", "dataloaders", "preprocess", "gt", "scripts", "benchmarks")
    files = [*ROOT.glob("*.py")]
    for folder in folders:
        files += (ROOT / folder).rglob("*.py")
    places = [path for path in files if "Image.open(" in path.read_text()]
    assert places == [ROOT / "dataloaders" / "picture_files.py"]
