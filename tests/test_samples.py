"""Samples and batches: random draws, order, and padding; workers and processes change nothing."""

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.batches import build_batches, trim_padding
from dataloaders.datasets import open_dataset
from dataloaders.images import ImageFiles, load_image
from dataloaders.pairs import ImagePair
from dataloaders.samples import CaptionSamples, EvaluationPairs, RetrievalSamples
from dataloaders.storage.packed_list import PackedList
from modules.tokenizer import decode, tokenize_caption
from tests.conftest import make_clevr, make_spot

tokenize = partial(tokenize_caption, max_words=12)
read_small = ImageFiles(32)


@pytest.fixture
def clevr(tmp_path: Path) -> Path:
    return make_clevr(tmp_path / "clevr", {"train": 6, "val": 2, "test": 3})


@pytest.fixture
def clevr_train(clevr: Path) -> list[ImagePair]:
    return open_dataset("clevr", clevr).checked_pairs("train")


@pytest.fixture
def spot_test(tmp_path: Path) -> list[ImagePair]:
    root = make_spot(tmp_path / "spot", {"train": 5, "val": 2, "test": 3})
    return open_dataset("spot", root, root / "images_test").checked_pairs("test")


def test_a_distractor_takes_the_place_of_before_half_of_the_time(
    clevr_train: list[ImagePair],
) -> None:
    samples = RetrievalSamples(clevr_train, read_small, tokenize, seed=1)
    assert len(samples) == 12
    # Before and distractor of drawn squares are alike: one is painted black to tell them apart.
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(clevr_train[0].distractor)

    def is_swapped(epoch: int) -> bool:
        images = samples[(epoch, 0)]["images"]
        assert torch.equal(images[1], load_image(clevr_train[0].after, 32))
        return bool(images[0].max() == 0)

    swapped = [is_swapped(epoch) for epoch in range(200)]
    assert 70 < sum(swapped) < 130
    assert swapped == [is_swapped(epoch) for epoch in range(200)]


def test_each_caption_of_a_change_is_a_sample_of_adaptation(clevr_train: list[ImagePair]) -> None:
    samples = RetrievalSamples(clevr_train, read_small, tokenize, seed=1)
    for index in range(12):
        pair = clevr_train[index // 2]
        sample = samples[(0, index)]
        arrays = tokenize(pair.captions[index % 2])
        assert sample["id"] == pair.id
        assert sample["text_ids"].tolist() == arrays["retrieval_text_ids"].tolist()
        assert sample["text_mask"].tolist() == arrays["retrieval_text_mask"].tolist()


def test_finetuning_draws_a_caption_of_each_kind(clevr_train: list[ImagePair]) -> None:
    samples = CaptionSamples(clevr_train, read_small, tokenize, seed=1)
    seen = [set(), set()]
    for epoch in range(30):
        sample = samples[(epoch, 2)]
        assert sample["images"].shape == (3, 3, 32, 32)
        assert sample["index"] == 2
        for kind in range(2):
            seen[kind].add(decode(sample["caption_input_ids"][kind].tolist()))
    assert seen == [
        {"a blue square has appeared", "someone added a blue square"},
        {"no change was made", "nothing has changed"},
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_order_and_draws_do_not_depend_on_workers_or_processes(
    clevr_train: list[ImagePair], world: int, workers: int
) -> None:
    samples = CaptionSamples(clevr_train, read_small, tokenize, seed=1)
    loaders = [
        build_batches(samples, 1, True, workers, rank, world, seed=7) for rank in range(world)
    ]
    orders = []
    for epoch in (0, 1):
        expected = {
            pair.id: samples[(epoch, index)]["caption_input_ids"]
            for index, pair in enumerate(clevr_train)
        }
        seen = []
        for loader in loaders:
            loader.set_epoch(epoch)
            for batch in loader:
                seen += batch["id"]
                whole = expected[batch["id"][0]]
                ids = batch["caption_input_ids"][0]
                # A batch ends with its longest sentence.
                assert torch.equal(ids, whole[..., : ids.shape[-1]])
                assert not whole[..., ids.shape[-1] :].any()
        assert sorted(seen) == sorted(pair.id for pair in clevr_train)
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_is_in_file_order_with_nothing_left_out_or_twice(
    clevr: Path, world: int
) -> None:
    pairs = open_dataset("clevr", clevr).checked_pairs("test")
    samples = EvaluationPairs(pairs, read_small, distractors=False)
    merged = [None] * 3
    for rank in range(world):
        batches = build_batches(samples, 2, False, 0, rank, world)
        merged[rank::world] = [pair_id for batch in batches for pair_id in batch["id"]]
    assert merged == ["000008.png", "000009.png", "000010.png"]


def test_a_split_smaller_than_a_batch_names_both_numbers(clevr_train: list[ImagePair]) -> None:
    samples = CaptionSamples(clevr_train, read_small, tokenize)
    with pytest.raises(ValueError, match=r"6 samples.*batch of 8"):
        build_batches(samples, 4, True, 0, 0, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_clear_error(spot_test: list[ImagePair], workers: int) -> None:
    path = spot_test[1].after
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    samples = EvaluationPairs(spot_test, read_small, distractors=False)
    loader = build_batches(samples, 2, False, workers)
    with pytest.raises(ValueError, match=rf"cannot read the image {path}") as error:
        list(loader)
    assert "\n" not in str(error.value)


def test_trimmed_batches_end_with_their_longest_text_and_lose_nothing() -> None:
    texts = ("a red car", "a red car has left the parking lot")
    arrays = [tokenize_caption(text, 16) for text in texts]
    whole = {}
    for name in arrays[0]:
        whole[name] = torch.stack([torch.from_numpy(array[name]) for array in arrays])
    text = {
        "text_ids": whole["retrieval_text_ids"],
        "text_mask": whole["retrieval_text_mask"],
        "id": ["0", "1"],
    }
    captions = {
        name: whole[name][:, None]
        for name in ("caption_input_ids", "caption_mask", "caption_target_ids")
    }
    trimmed = trim_padding({**text, **captions})
    assert trimmed["id"] == ["0", "1"]
    assert trimmed["text_ids"].shape == trimmed["text_mask"].shape == (2, 10)  # with SOT and EOT
    assert torch.equal(trimmed["text_ids"], text["text_ids"][:, :10])
    assert not text["text_ids"][:, 10:].any()
    for name, array in captions.items():
        assert torch.equal(trimmed[name], array[..., :9])
        assert not array[..., 9:].any()


def test_a_packed_list_is_the_list() -> None:
    items = [("a", ("b", "ü")), None, 7, "x" * 1000]
    packed = PackedList(items)
    assert list(packed) == items
    assert packed[-1] == items[-1]
    assert packed[1::2] == items[1::2]
    assert len(packed) == 4
    assert list(PackedList([])) == []
    with pytest.raises(IndexError):
        packed[4]
