"""The cache of resized images: same pixels, decoded once, intact after builds cut short."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.batches import build_batches
from dataloaders.datasets import open_dataset
from dataloaders.images import ImageFiles
from dataloaders.samples import EvaluationPairs
from dataloaders.storage import image_cache
from dataloaders.storage.image_cache import ImageCache, open_image_cache
from tests.conftest import make_clevr

read_small = ImageFiles(32)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    noise = np.random.default_rng(0)
    paths = [str(tmp_path / f"{number}.png") for number in range(3)]
    for path in paths:
        Image.fromarray(noise.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return paths


def open_cache(folder: Path, paths: list[str]) -> tuple[ImageCache, list[str]]:
    """The cache, and which paths had to be decoded for it."""
    decoded: list[str] = []

    def progress(iterable: Iterable, what: str, unit: str) -> Iterable:
        decoded.extend(iterable)
        return iterable

    return open_image_cache(folder, paths, 32, progress), decoded


def test_it_gives_what_the_files_give_and_decodes_once(tmp_path: Path, pictures: list[str]) -> None:
    cache, decoded = open_cache(tmp_path / "cache", pictures[:2])
    assert decoded == pictures[:2]
    assert torch.equal(cache(pictures[1::-1]), read_small(pictures[1::-1]))
    ends = [pictures[2], pictures[0]]
    grown, decoded = open_cache(tmp_path / "cache", ends)
    assert decoded == pictures[2:]
    assert torch.equal(grown(ends), read_small(ends))
    assert open_cache(tmp_path / "cache", pictures)[1] == []


def test_it_notices_a_changed_source(tmp_path: Path, pictures: list[str]) -> None:
    open_cache(tmp_path / "cache", pictures)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(pictures[1])
    cache, decoded = open_cache(tmp_path / "cache", pictures)
    assert decoded == [pictures[1]]
    assert torch.equal(cache(pictures), read_small(pictures))


def test_a_build_that_fails_keeps_what_it_has(tmp_path: Path, pictures: list[str]) -> None:
    file = Path(pictures[2])
    intact = file.read_bytes()
    file.write_bytes(intact[: len(intact) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*2\.png"):
        open_cache(tmp_path / "cache", pictures)
    file.write_bytes(intact)
    with open(tmp_path / "cache" / "images-32.uint8", "ab") as data:
        data.write(b"half a row of a killed build")
    # For two of the images nothing is missing, so the half row stays.
    complete, decoded = open_cache(tmp_path / "cache", pictures[:2])
    assert decoded == []
    assert torch.equal(complete(pictures[:2]), read_small(pictures[:2]))
    cache, decoded = open_cache(tmp_path / "cache", pictures)
    assert decoded == pictures[2:]
    assert torch.equal(cache(pictures), read_small(pictures))


def test_a_killed_build_keeps_all_but_the_last_images(
    tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_cache, "CHUNK_IMAGES", 2)
    append = image_cache._append

    def killed(files: image_cache.CacheFiles, first: int, paths: list[str]) -> Iterable:
        if first == 2:
            os._exit(9)
        return append(files, first, paths)

    monkeypatch.setattr(image_cache, "_append", killed)
    child = os.fork()
    if child == 0:
        open_cache(tmp_path / "cache", pictures)
    assert os.waitpid(child, 0)[1] == 9 << 8
    monkeypatch.setattr(image_cache, "_append", append)
    assert open_cache(tmp_path / "cache", pictures)[1] == pictures[2:]


def test_a_cache_that_lost_rows_is_built_again(tmp_path: Path, pictures: list[str]) -> None:
    open_cache(tmp_path / "cache", pictures)
    os.truncate(tmp_path / "cache" / "images-32.uint8", 100)
    cache, decoded = open_cache(tmp_path / "cache", pictures)
    assert decoded == pictures
    assert torch.equal(cache(pictures), read_small(pictures))


def test_a_lost_data_file_is_built_again_and_said_to_be_missing(
    tmp_path: Path, pictures: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    open_cache(tmp_path / "cache", pictures)
    (tmp_path / "cache" / "images-32.uint8").unlink()
    assert open_cache(tmp_path / "cache", pictures)[1] == pictures
    assert "images-32.uint8 is missing" in caplog.text


@pytest.mark.parametrize(
    "content",
    [
        '{"images": {"a.png": 3}}',
        "no JSON",
        "[]",
        '{"resolution": 64, "images": {}}',
        '{"resolution": 32, "images": {"a.png": [0, -1, 1]}}',
        '{"resolution": 32, "images": {"a.png": [0, 1, true]}}',
    ],
)
def test_an_index_of_something_else_is_refused(
    tmp_path: Path, pictures: list[str], content: str
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "images-32.json").write_text(content)
    with pytest.raises(ValueError, match=r"images-32.json.*delete it"):
        open_cache(tmp_path / "cache", pictures)


def test_a_folder_that_cannot_be_written(tmp_path: Path, pictures: list[str]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot build the image cache in .*file.*--image_cache"):
        open_cache(tmp_path / "file" / "below", pictures)


def test_an_error_without_a_number_names_the_folder(
    tmp_path: Path, pictures: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no lock")

    monkeypatch.setattr(image_cache, "_append", fail)
    with pytest.raises(OSError, match=r"cannot build the image cache in .*: no lock"):
        open_cache(tmp_path / "cache", pictures)


def test_an_image_that_it_was_not_opened_for(tmp_path: Path, pictures: list[str]) -> None:
    cache, _ = open_cache(tmp_path / "cache", pictures[:2])
    with pytest.raises(KeyError, match="2.png"):
        cache([pictures[0], pictures[2]])


def test_workers_read_it(tmp_path: Path) -> None:
    root = make_clevr(tmp_path / "clevr", {"train": 1, "val": 1, "test": 3})
    pairs = open_dataset("clevr", root).checked_pairs("test")
    paths = [path for pair in pairs for path in pair.image_paths]
    cache, _ = open_cache(tmp_path / "cache", paths)

    def batches(images: ImageCache | ImageFiles, workers: int) -> list[torch.Tensor]:
        samples = EvaluationPairs(pairs, images, distractors=True)
        return [batch["images"] for batch in build_batches(samples, 2, False, workers)]

    for cached, decoded in zip(batches(cache, 2), batches(read_small, 0), strict=True):
        assert torch.equal(cached, decoded)


def test_a_picture_of_before_1970(tmp_path: Path, pictures: list[str]) -> None:
    os.utime(pictures[0], ns=(-(10**18), -(10**18)))
    for _ in range(2):
        cache, _ = open_cache(tmp_path / "cache", pictures)
        assert torch.equal(cache(pictures[:1]), read_small(pictures[:1]))
