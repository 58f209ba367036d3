"""Datasets, image files and ground truth: drawn and real ones, and what is refused."""

import importlib.util
import json
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataloaders.coco_files import coco_ground_truth
from dataloaders.datasets import open_dataset
from dataloaders.datasets.clevr_change import read_change_types, read_split
from dataloaders.images import ImageFiles, load_image
from dataloaders.pairs import (
    SPLITS,
    ImagePair,
    PairDataset,
    check_pairs,
    distractor_id_of,
    is_distractor,
    pair_id_of,
)
from dataloaders.samples import EvaluationPairs
from gt import eval_utils
from modules import tokenizer
from modules.tokenizer import decode, tokenize_caption
from preprocess import reformat_dataset
from tests.conftest import make_clevr, make_spot

pair_of_two = partial(ImagePair, before="a.png", after="b.png")


@pytest.fixture
def clevr(tmp_path: Path) -> Path:
    return make_clevr(tmp_path / "clevr", {"train": 6, "val": 2, "test": 3})


@pytest.fixture
def spot(tmp_path: Path) -> Path:
    return make_spot(tmp_path / "spot", {"train": 5, "val": 2, "test": 3})


def open_spot(root: Path) -> PairDataset:
    return open_dataset("spot", root, root / "images_test", root / "gt")


def test_real_spot_annotations(real_data: Path, tmp_path: Path) -> None:
    annotations = real_data / "spot-the-diff" / "annotations"
    reformat_dataset.main(["--data_path", str(annotations), "--output", str(tmp_path)])
    lengths = []
    for split in SPLITS:
        lengths.append(len(json.loads((tmp_path / f"reformat_{split}.json").read_text())))
    assert lengths == [8566, 1493, 1270]
    merged = json.loads((tmp_path / "reformat_train.json").read_text())
    raw = json.loads((annotations / "train.json").read_text())
    counts = Counter(text for entry in merged for text in entry["sentences"])
    assert counts == Counter(text for entry in raw for text in entry["sentences"])
    ids = [entry["img_id"] for entry in raw]
    assert [entry["img_id"] for entry in merged] == list(dict.fromkeys(ids))
    eval_utils.main(["--data_path", str(annotations), "--output", str(tmp_path / "gt.json")])
    real = real_data / "spot-the-diff" / "gt" / "spot_total_change_captions_reformat.json"
    assert json.loads((tmp_path / "gt.json").read_text()) == json.loads(real.read_text())


def test_scripts_run_bare_in_a_data_folder(spot: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in SPLITS:
        (spot / f"reformat_{split}.json").unlink()
    monkeypatch.chdir(spot)
    assert reformat_dataset.main([]) == 0
    assert eval_utils.main([]) == 0
    assert len(json.loads((spot / "reformat_train.json").read_text())) == 5
    truth = json.loads((spot / "total_change_captions_reformat.json").read_text())
    assert truth["images"][0] == {"filename": "7.png", "id": "7.png"}


def test_real_clevr_scenes(real_data: Path) -> None:
    dataset = open_dataset("clevr", real_data / "clevr-change" / "real48")
    sizes = {split: len(dataset.checked_pairs(split)) for split in SPLITS}
    assert sizes == {"train": 24, "val": 8, "test": 16}
    pairs = dataset.checked_pairs("test")
    truth = coco_ground_truth(dataset.ground_truth("test"))
    ids = {image["id"] for image in truth["images"]}
    assert len(truth["images"]) == 96
    assert {caption_id for pair in pairs for caption_id in pair.caption_ids} <= ids
    images = EvaluationPairs(pairs, ImageFiles(), distractors=True)[(0, 0)]["images"]
    assert images.shape == (3, 3, 224, 224)
    before, after, distractor = images.float()
    assert (before - after).abs().mean() > 1
    assert (before - distractor).abs().mean() > 1


def test_real_clevr_split_counts(real_data: Path) -> None:
    root = real_data / "clevr-change"
    assert [len(read_split(root, split)) for split in SPLITS] == [33830, 1988, 3985]
    assert {name: len(ids) for name, ids in read_change_types(root).items()} == {
        "color": 7958,
        "material": 7963,
        "move": 7955,
        "drop": 7961,
        "add": 7966,
    }


def test_distractors_are_named_after_their_pair() -> None:
    assert distractor_id_of("7.png") == "7.png_n"
    assert is_distractor("7.png_n", ["7.png", "7.png_n"])
    assert not is_distractor("7.png", ["7.png", "7.png_n"])
    assert not is_distractor("7.png_n", ["7.png_n"])
    assert pair_id_of("7.png_n") == pair_id_of("7.png") == "7.png"
    pair = pair_of_two("7.png", captions=("x",), distractor="c.png", distractor_captions=("y",))
    assert pair.captions_by_id == {"7.png": ("x",), "7.png_n": ("y",)}
    assert pair.image_paths == ["a.png", "b.png", "c.png"]


def test_references_and_subsets_of_clevr_change(clevr: Path) -> None:
    dataset = open_dataset("clevr", clevr, gt_dir=clevr / "gt")
    pairs = dataset.checked_pairs("test")
    references = dataset.references("test", pairs)
    names = ["000008.png", "000009.png", "000010.png"]
    assert list(references) == names + [f"{name}_n" for name in names]
    assert references["000008.png_n"] == ["no change was made", "nothing has changed"]
    assert dataset.subsets(pairs) == {
        "change": names,
        "distractor": [f"{name}_n" for name in names],
        "add": names,
        "drop": [],
    }
    (clevr / "gt" / "clevr_total_change_captions_reformat.json").write_text('{"annotations": []}')
    with pytest.raises(ValueError, match=r"no captions for 000008.png and 5 more ids"):
        dataset.references("test", pairs)
    (clevr / "gt" / "clevr_total_change_captions_reformat.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"eval_utils.py --datatype clevr --data_path"):
        dataset.references("test", pairs)


def test_no_type_of_clevr_change_takes_the_name_of_changes(clevr: Path) -> None:
    (clevr / "type_mapping.json").write_text('{"change": ["000008.png"]}')
    dataset = open_dataset("clevr", clevr)
    with pytest.raises(ValueError, match=r"type_mapping\.json: a type is called 'change'"):
        dataset.subsets(dataset.checked_pairs("test"))


def test_spot_the_diff_scores_val_against_its_own_captions(spot: Path) -> None:
    dataset = open_spot(spot)
    (spot / "gt" / "spot_total_change_captions_reformat.json").unlink()
    references = dataset.references("val", dataset.checked_pairs("val"))
    assert references["5.png"] == ["a green square has appeared", "there is a green box now"]
    with pytest.raises(FileNotFoundError, match="no ground truth"):
        dataset.references("test", dataset.checked_pairs("test"))


def test_empty_captions_are_counted(spot: Path, caplog: pytest.LogCaptureFixture) -> None:
    entries = json.loads((spot / "reformat_val.json").read_text())
    entries[0]["sentences"][0] = ""
    (spot / "reformat_val.json").write_text(json.dumps(entries))
    with caplog.at_level("INFO"):
        open_spot(spot).checked_pairs("val")
    assert "4 captions, 1 of them empty" in caplog.text


with_distractor = partial(
    pair_of_two, captions=("x",), distractor="c.png", distractor_captions=("y",)
)
plain = partial(pair_of_two, captions=("x",))


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([], "lists no pairs"),
        ([pair_of_two("1")], "pair '1' has no caption"),
        ([with_distractor("1", distractor_captions=())], "pair '1' has no caption"),
        ([plain("1"), plain("1")], "the caption id '1' occurs twice"),
        ([with_distractor("1"), with_distractor("1_n")], "the caption id '1_n' occurs twice"),
        ([plain("1"), with_distractor("2")], "pair '2' breaks the rule that either all"),
        ([plain("1\n2")], r"pair '1\\n2' has a control character"),
        ([plain("1", change_type="all")], "pair '1' is of type 'all'"),
        ([with_distractor("1", change_type="change")], "pair '1' is of type 'change'"),
        ([with_distractor("1", change_type="distractor")], "pair '1' is of type 'distractor'"),
    ],
)
def test_pairs_that_cannot_be_trained_on_or_scored(pairs: list[ImagePair], message: str) -> None:
    with pytest.raises(ValueError, match=f"^the table.*{message}"):
        check_pairs(pairs, "the table")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        (b"{}", "expected a list"),
        (b"[]", "lists no pairs"),
        (b'[{"img_id": "1"}]', "entry 0"),
        (b'[{"img_id": true, "sentences": ["x"]}]', "entry 0"),
        (b'[{"img_id": "1", "sentences": "x"}]', "entry 0"),
        (b'[{"img_id": "../1", "sentences": ["x"]}]', "not a plain file name"),
        (b'[{"img_id": "999", "sentences": ["x"]}]', "999.png"),
        (b'[{"img_id": "5", "sentences": ["x"]}, {"img_id": "5", "sentences": ["x"]}]', "twice"),
        (b'[{"img_id": "5", "sentences": []}]', "no caption"),
    ],
)
def test_wrong_spot_annotations(spot: Path, content: bytes, message: str) -> None:
    (spot / "reformat_val.json").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=f"reformat_val.json.*{message}|{message}"):
        open_spot(spot).checked_pairs("val")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("splits.json", {"train": ["a"]}, '"train" is not a list of scene numbers'),
        ("splits.json", {"train": [True]}, '"train" is not a list of scene numbers'),
        ("splits.json", {}, '"train" is not'),
        ("splits.json", {"train": [1, 1]}, "lists a scene twice"),
        ("splits.json", {"train": []}, "lists no pairs"),
        ("change_captions.json", {}, "no captions for CLEVR_default_000000.png"),
        ("no_change_captions.json", {"x": ["y"]}, "entry 'x'"),
        ("splits.json", {"train": [99]}, "000099"),
    ],
)
def test_wrong_clevr_annotations(clevr: Path, file: str, content: dict, message: str) -> None:
    (clevr / file).write_text(json.dumps(content))
    with pytest.raises((ValueError, OSError), match=message):
        open_dataset("clevr", clevr).checked_pairs("train")


def test_missing_images_and_folders(clevr: Path, spot: Path, tmp_path: Path) -> None:
    (clevr / "sc_images" / "CLEVR_semantic_000001.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"CLEVR_semantic_000001.png.*splits.json"):
        open_dataset("clevr", clevr).checked_pairs("train")
    assert len(open_dataset("clevr", clevr).checked_pairs("train", need_images=False)) == 6
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_dataset("clevr", tmp_path / "nowhere").checked_pairs("train")
    with pytest.raises(FileNotFoundError, match="features_path"):
        open_dataset("spot", spot, spot / "nowhere").checked_pairs("train")
    with pytest.raises(ValueError, match="--features_path is required"):
        open_dataset("spot", spot).checked_pairs("train")
    (spot / "reformat_val.json").unlink()
    with pytest.raises(FileNotFoundError, match="reformat_dataset.py"):
        open_spot(spot).checked_pairs("val")


def test_reformatting_writes_nothing_when_one_split_is_broken(
    spot: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (spot / "val.json").write_text("[")
    with pytest.raises(SystemExit) as stop:
        reformat_dataset.main(["--data_path", str(spot), "--output", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_image_kinds(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 4), dtype=np.uint8)
    picture = Image.fromarray(pixels).convert("RGB")
    for mode in ("RGBA", "RGB", "L", "P", "CMYK", "1"):
        ending = "tiff" if mode == "CMYK" else "png"
        path = tmp_path / f"{mode}.{ending}"
        picture.convert(mode).save(path)
        assert load_image(path, 16).shape == (3, 16, 16)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match="text.png"):
        load_image(tmp_path / "text.png")


def test_decode_stops_at_eot_and_at_the_first_exclamation_mark() -> None:
    ids = tokenize_caption("the car has gone", 20)["caption_target_ids"].tolist()
    assert decode(ids) == "the car has gone"
    assert decode([*ids[:2], 0, *ids[2:]]) == "the car"
    assert decode([]) == ""


def test_a_missing_vocabulary_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="pip install open_clip_torch"):
        tokenizer.load_clip_tokenizer.__wrapped__()
