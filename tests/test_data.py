"""Loaders, preprocessing, ground truth: drawn and real files, order, draws, and what is refused."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataloaders.batches import build_loader, trim_padding
from dataloaders.coco_files import coco_ground_truth
from dataloaders.datasets import load_pairs
from dataloaders.images import ImageFiles, load_image
from dataloaders.samples import CaptionSamples, EvaluationPairs, RetrievalSamples
from dataloaders.storage.image_cache import open_image_cache
from dataloaders.storage.packed_list import PackedList
from gt import eval_utils
from modules.tokenizer import decode, tokenize_caption
from preprocess import reformat_dataset
from tests.conftest import make_clevr, make_spot


@pytest.fixture
def clevr(tmp_path):
    return make_clevr(tmp_path / "clevr", {"train": 6, "val": 2, "test": 3})


@pytest.fixture
def spot(tmp_path):
    return make_spot(tmp_path / "spot", {"train": 5, "val": 2, "test": 3})


def test_real_spot_annotations(real_data, tmp_path):
    annotations = real_data / "spot-the-diff" / "annotations"
    reformat_dataset.main(["--data_path", str(annotations), "--output", str(tmp_path)])
    lengths = [
        len(json.loads((tmp_path / f"reformat_{split}.json").read_text()))
        for split in ("train", "val", "test")
    ]
    assert lengths == [8566, 1493, 1270]
    merged = json.loads((tmp_path / "reformat_train.json").read_text())
    raw = json.loads((annotations / "train.json").read_text())
    assert Counter(s for e in merged for s in e["sentences"]) == Counter(
        s for e in raw for s in e["sentences"]
    )
    assert [e["img_id"] for e in merged] == list(dict.fromkeys(e["img_id"] for e in raw))
    eval_utils.main(["--data_path", str(annotations), "--output", str(tmp_path / "gt.json")])
    real = real_data / "spot-the-diff" / "gt" / "spot_total_change_captions_reformat.json"
    assert json.loads((tmp_path / "gt.json").read_text()) == json.loads(real.read_text())


def test_scripts_run_bare_in_a_data_folder(spot, monkeypatch):
    for name in ("reformat_train.json", "reformat_val.json", "reformat_test.json"):
        (spot / name).unlink()
    monkeypatch.chdir(spot)
    assert reformat_dataset.main([]) == 0
    assert eval_utils.main([]) == 0
    assert len(json.loads((spot / "reformat_train.json").read_text())) == 5
    assert json.loads((spot / "total_change_captions_reformat.json").read_text())["images"][0] == {
        "filename": "7.png",
        "id": "7.png",
    }


def test_real_clevr_scenes(real_data):
    root = real_data / "clevr-change" / "real48"
    sizes = {
        split: len(load_pairs("clevr", root, None, split)) for split in ("train", "val", "test")
    }
    assert sizes == {"train": 24, "val": 8, "test": 16}
    scenes = load_pairs("clevr", root, None, "test")
    truth = coco_ground_truth(eval_utils.clevr_captions(root))
    ids = {image["id"] for image in truth["images"]}
    assert len(truth["images"]) == 96
    assert {s.id for s in scenes} | {s.distractor_id for s in scenes} <= ids
    images = EvaluationPairs(scenes, ImageFiles(), distractors=True)[(0, 0)]["images"]
    assert images.shape == (3, 3, 224, 224)
    before, after, distractor = images.float()
    assert (before - after).abs().mean() > 1
    assert (before - distractor).abs().mean() > 1


def test_real_clevr_split_counts(real_data):
    from dataloaders.datasets.clevr_change import change_types, read_split

    root = real_data / "clevr-change"
    assert [len(read_split(root, split)) for split in ("train", "val", "test")] == [
        33830,
        1988,
        3985,
    ]
    assert {name: len(ids) for name, ids in change_types(root).items()} == {
        "color": 7958,
        "material": 7963,
        "move": 7955,
        "drop": 7961,
        "add": 7966,
    }


def test_adaptation_samples_swap_the_distractor_in_half_of_the_time(clevr):
    scenes = load_pairs("clevr", clevr, None, "train")
    samples = RetrievalSamples(scenes, ImageFiles(32), 12, seed=1)
    assert len(samples) == 12
    swapped = 0
    for epoch in range(20):
        for index in range(12):
            scene = scenes[index // 2]
            images = samples[(epoch, index)]["images"]
            before, distractor = load_image(scene.before, 32), load_image(scene.distractor, 32)
            assert torch.equal(images[1], load_image(scene.after, 32))
            assert torch.equal(images[0], before) or torch.equal(images[0], distractor)
    # the squares' before and distractor are alike: tell them apart by a marked file
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(scenes[0].distractor)
    draws = [bool(samples[(epoch, 0)]["images"][0].max() == 0) for epoch in range(200)]
    swapped = sum(draws)
    assert 70 < swapped < 130
    assert draws == [bool(samples[(epoch, 0)]["images"][0].max() == 0) for epoch in range(200)]


def test_finetuning_samples_draw_a_sentence_of_each_kind(clevr):
    samples = CaptionSamples(load_pairs("clevr", clevr, None, "train"), ImageFiles(32), 12, seed=1)
    seen = [set(), set()]
    for epoch in range(30):
        sample = samples[(epoch, 2)]
        assert sample["images"].shape == (3, 3, 32, 32)
        for kind in range(2):
            seen[kind].add(decode(sample["caption_input_ids"][kind].tolist()))
    assert seen == [
        {"a blue square has appeared", "someone added a blue square"},
        {"no change was made", "nothing has changed"},
    ]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_order_draws_and_shares_do_not_depend_on_workers_or_processes(clevr, world, workers):
    scenes = load_pairs("clevr", clevr, None, "train")
    samples = CaptionSamples(scenes, ImageFiles(32), 12, seed=1)
    reference = {
        epoch: {
            scene.id: samples[(epoch, i)]["caption_input_ids"] for i, scene in enumerate(scenes)
        }
        for epoch in (0, 1)
    }
    orders = []
    loaders = [
        build_loader(samples, 1, True, workers, rank, world, seed=7) for rank in range(world)
    ]
    for epoch in (0, 1):
        seen = []
        for loader in loaders:
            loader.set_epoch(epoch)
            for batch in loader:
                seen += batch["id"]
                for name, ids in zip(batch["id"], batch["caption_input_ids"], strict=True):
                    whole, length = (
                        reference[epoch][name],
                        ids.shape[-1],
                    )  # a batch ends with its longest sentence
                    assert torch.equal(ids, whole[..., :length])
                    assert not whole[..., length:].any()
        assert sorted(seen) == sorted(scene.id for scene in scenes)
        orders.append(seen)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_evaluation_is_in_file_order_with_nothing_dropped_or_twice(clevr, world):
    pairs = EvaluationPairs(
        load_pairs("clevr", clevr, None, "test"), ImageFiles(32), distractors=False
    )
    shares = [
        [name for batch in build_loader(pairs, 2, False, 0, rank, world) for name in batch["id"]]
        for rank in range(world)
    ]
    merged = [None] * 3
    for rank, share in enumerate(shares):
        merged[rank::world] = share
    assert merged == ["000008.png", "000009.png", "000010.png"]


def test_a_split_smaller_than_a_batch_names_both_numbers(spot):
    samples = CaptionSamples(
        load_pairs("spot", spot, spot / "images_test", "train"), ImageFiles(32), 12
    )
    with pytest.raises(ValueError, match=r"5 samples.*batch of 8"):
        build_loader(samples, 4, True, 0, 0, 2)


def test_empty_captions_are_counted(spot, caplog):
    entries = json.loads((spot / "reformat_val.json").read_text())
    entries[0]["sentences"][0] = ""
    (spot / "reformat_val.json").write_text(json.dumps(entries))
    with caplog.at_level("INFO"):
        load_pairs("spot", spot, spot / "images_test", "val")
    assert "4 captions, 1 of them empty" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_one_clear_error(spot, workers):
    scenes = load_pairs("spot", spot, spot / "images_test", "test")
    path = scenes[1].after
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)
    loader = build_loader(
        EvaluationPairs(scenes, ImageFiles(32), distractors=False), 2, False, workers
    )
    with pytest.raises(ValueError, match=rf"cannot read the image {path}") as error:
        list(loader)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"{}", "expected a list"),
        (b"[]", "lists no pairs"),
        (b'[{"img_id": "1"}]', "entry 0"),
        (b'[{"img_id": "1", "sentences": "x"}]', "entry 0"),
        (b'[{"img_id": "../1", "sentences": ["x"]}]', "no plain file name"),
        (b'[{"img_id": "999", "sentences": ["x"]}]', "999.png"),
        (b'[{"img_id": "5", "sentences": ["x"]}, {"img_id": "5", "sentences": ["x"]}]', "twice"),
        (b'[{"img_id": "5", "sentences": []}]', "no caption"),
    ],
)
def test_wrong_spot_annotations(spot, content, message):
    (spot / "reformat_val.json").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        load_pairs("spot", spot, spot / "images_test", "val")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("splits.json", {"train": ["a"]}, '"train" is not a list of scene numbers'),
        ("splits.json", {}, '"train" is not'),
        ("change_captions.json", {}, "no captions of CLEVR_default_000000.png"),
        ("no_change_captions.json", {"x": ["y"]}, "entry 'x'"),
        ("splits.json", {"train": [99]}, "000099"),
    ],
)
def test_wrong_clevr_annotations(clevr, file, content, message):
    (clevr / file).write_text(json.dumps(content))
    with pytest.raises((ValueError, OSError), match=message):
        load_pairs("clevr", clevr, None, "train")


def test_missing_image_and_folders(clevr, spot, tmp_path):
    (clevr / "sc_images" / "CLEVR_semantic_000001.png").unlink()
    with pytest.raises(FileNotFoundError, match="CLEVR_semantic_000001.png"):
        load_pairs("clevr", clevr, None, "train")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_pairs("clevr", tmp_path / "nowhere", None, "train")
    with pytest.raises(FileNotFoundError, match="features_path"):
        load_pairs("spot", spot, spot / "nowhere", "train")
    (spot / "reformat_val.json").unlink()
    with pytest.raises(FileNotFoundError, match="reformat_dataset.py"):
        load_pairs("spot", spot, spot / "images_test", "val")


def test_reformatting_writes_nothing_when_one_split_is_broken(spot, tmp_path, capsys):
    (spot / "val.json").write_text("[")
    with pytest.raises(SystemExit) as stop:
        reformat_dataset.main(["--data_path", str(spot), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_image_kinds(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    for mode in ("RGBA", "RGB", "L", "P", "CMYK", "1"):
        kind = "tiff" if mode == "CMYK" else "png"
        Image.fromarray(pixels).convert("RGB").convert(mode).save(tmp_path / f"{mode}.{kind}")
        assert load_image(tmp_path / f"{mode}.{kind}", 16).shape == (3, 16, 16)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png"):
        load_image(tmp_path / "text.png")


def test_decode_stops_at_eot_and_at_the_first_exclamation_mark():
    ids = tokenize_caption("the car has gone", 20)["caption_target_ids"].tolist()
    assert decode(ids) == "the car has gone"
    assert decode([*ids[:2], 0, *ids[2:]]) == "the car"
    assert decode([]) == ""


@pytest.fixture
def pictures(tmp_path) -> list[str]:
    draw = np.random.default_rng(0)
    paths = [str(tmp_path / f"{n}.png") for n in range(3)]
    for path in paths:
        Image.fromarray(draw.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(path)
    return paths


def open_cache(folder, paths):
    """The cache, and which paths had to be decoded for it."""
    decoded = []

    def progress(iterable, what, unit):
        decoded.extend(iterable)
        return iterable

    return open_image_cache(folder, paths, 32, progress), decoded


def test_the_cache_gives_what_the_files_give_and_decodes_once(tmp_path, pictures):
    cache, decoded = open_cache(tmp_path / "cache", pictures[:2])
    assert decoded == pictures[:2]
    assert torch.equal(cache(pictures[1::-1]), ImageFiles(32)(pictures[1::-1]))
    grown, decoded = open_cache(tmp_path / "cache", [pictures[2], pictures[0]])
    assert decoded == pictures[2:]
    assert torch.equal(
        grown([pictures[0], pictures[2]]), ImageFiles(32)([pictures[0], pictures[2]])
    )
    assert open_cache(tmp_path / "cache", pictures)[1] == []


def test_the_cache_notices_a_changed_source(tmp_path, pictures):
    open_cache(tmp_path / "cache", pictures)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(pictures[1])
    cache, decoded = open_cache(tmp_path / "cache", pictures)
    assert decoded == [pictures[1]]
    assert torch.equal(cache(pictures), ImageFiles(32)(pictures))


def test_a_build_that_breaks_off_keeps_what_it_has(tmp_path, pictures):
    file = Path(pictures[2])
    sound = file.read_bytes()
    file.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=r"cannot read the image .*2\.png"):
        open_cache(tmp_path / "cache", pictures)
    file.write_bytes(sound)
    with open(tmp_path / "cache" / "images-32.uint8", "ab") as data:
        data.write(b"half a row of a killed build")
    complete, decoded = open_cache(
        tmp_path / "cache", pictures[:2]
    )  # nothing is missing, so that nothing is cut off
    assert decoded == []
    assert torch.equal(complete(pictures[:2]), ImageFiles(32)(pictures[:2]))
    cache, decoded = open_cache(tmp_path / "cache", pictures)
    assert decoded == pictures[2:]
    assert torch.equal(cache(pictures), ImageFiles(32)(pictures))


def test_a_killed_build_keeps_all_but_the_last_images(tmp_path, pictures, monkeypatch):
    monkeypatch.setattr("dataloaders.storage.image_cache.CHUNK_IMAGES", 2)
    append = sys.modules["dataloaders.image_cache"]._append

    def killed(data, first, paths, resolution):
        if first == 2:
            os._exit(9)
        return append(data, first, paths, resolution)

    monkeypatch.setattr("dataloaders.image_cache._append", killed)
    child = os.fork()
    if child == 0:
        open_cache(tmp_path / "cache", pictures)
    assert os.waitpid(child, 0)[1] == 9 << 8
    monkeypatch.setattr("dataloaders.image_cache._append", append)
    assert open_cache(tmp_path / "cache", pictures)[1] == pictures[2:]


def test_a_cache_that_lost_rows_is_built_anew_and_a_foreign_index_refused(tmp_path, pictures):
    open_cache(tmp_path / "cache", pictures)
    data, index = tmp_path / "cache" / "images-32.uint8", tmp_path / "cache" / "images-32.json"
    os.truncate(data, 100)
    cache, decoded = open_cache(tmp_path / "cache", pictures)
    assert decoded == pictures
    assert torch.equal(cache(pictures), ImageFiles(32)(pictures))
    index.write_text('{"images": {"a.png": 3}}')
    with pytest.raises(ValueError, match="delete it"):
        open_cache(tmp_path / "cache", pictures)
    index.write_text("no JSON")
    with pytest.raises(ValueError, match="delete it"):
        open_cache(tmp_path / "cache", pictures)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cannot build the image cache in .*file.*--image_cache"):
        open_cache(tmp_path / "file" / "below", pictures)


def test_workers_read_the_cache(clevr, tmp_path):
    scenes = load_pairs("clevr", clevr, None, "test")
    cache, _ = open_cache(
        tmp_path / "cache", [path for scene in scenes for path in scene.image_paths]
    )
    batches = [
        [
            batch["images"]
            for batch in build_loader(
                EvaluationPairs(scenes, images, distractors=True), 2, False, workers
            )
        ]
        for images, workers in ((cache, 2), (ImageFiles(32), 0))
    ]
    assert all(torch.equal(cached, decoded) for cached, decoded in zip(*batches, strict=True))


def test_trimmed_batches_end_with_their_longest_sentence_and_lose_nothing():
    arrays = [
        tokenize_caption(text, 16) for text in ("a red car", "a red car has left the parking lot")
    ]
    whole = {
        name: torch.stack([torch.from_numpy(words[name]) for words in arrays]) for name in arrays[0]
    }
    text = trim_padding({"text_ids": whole["retrieval_text_ids"]})["text_ids"]
    assert text.shape == (2, 10)  # eight words, SOT and EOT
    assert not whole["retrieval_text_ids"][:, 10:].any()
    captions = {
        name: whole[name][:, None]
        for name in ("caption_input_ids", "caption_mask", "caption_target_ids")
    }
    for name, trimmed in trim_padding(captions).items():
        assert torch.equal(trimmed, captions[name][..., :9])
        assert not captions[name][..., 9:].any()


def test_a_packed_list_is_the_list():
    items = [("a", ("b", "ü")), None, 7, "x" * 1000]
    packed = PackedList(items)
    assert list(packed) == items
    assert packed[-1] == items[-1]
    assert packed[1::2] == items[1::2]
    assert len(packed) == 4
    assert list(PackedList([])) == []
    with pytest.raises(IndexError):
        packed[4]


def test_the_cache_refuses_an_image_it_was_not_opened_for(tmp_path, pictures):
    cache, _ = open_cache(tmp_path / "cache", pictures[:2])
    with pytest.raises(KeyError, match="2.png"):
        cache([pictures[0], pictures[2]])
