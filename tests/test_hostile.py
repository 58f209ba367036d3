"""Hostile JSON and text: a reader gives a value, or one error that names the file."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dataloaders.datasets import open_dataset
from dataloaders.datasets.clevr_change import read_type_mapping
from dataloaders.pairs import ImagePair
from dataloaders.storage.image_cache import open_image_cache
from modules.pipeline.predict import picture_name
from modules.pipeline.results import read_finished
from modules.training.checkpoints import Checkpoints
from modules.training.progress import Progress
from modules.training.states import named_state
from system.json_files import parse_json, read_json, write_json
from tests.conftest import make_clevr, make_spot
from tests.hostile import (
    at_both_sizes,
    audited,
    only_our_error,
    stays_inside,
)
from tests.hostile_json import NAMES, READERS, as_json, check_property, contents


@at_both_sizes
@pytest.mark.parametrize("name", READERS)
def test_any_json_is_read_or_refused_by_its_name(name, count, tmp_path):
    valid, file, read = READERS[name]
    path = tmp_path / file

    def check(content):
        path.write_bytes(content)
        with only_our_error(path):
            read(path)

    if name != "results to continue":  # the valid ones are of pairs that are not given here
        path.write_bytes(b"\xef\xbb\xbf" + as_json(valid))
        read(path)
    check_property(check, contents(valid), count)


@at_both_sizes
def test_any_sidecar_of_a_training_state_is_used_or_refused(count, tmp_path):
    files = Checkpoints(tmp_path, 2, {"lr": 0.1, "epochs": 3}, "data", {"max_words": 12})
    progress = Progress(epoch=2, losses=[[1.5, 2.0]], batches=2)
    path = files.save_state({"model": {}}, progress, steps=2)
    sidecar = path.with_name(f"{path.name}.json")
    valid = json.loads(sidecar.read_text())

    def check(content):
        sidecar.write_bytes(content)
        with only_our_error(sidecar):
            resume = named_state(str(path))
            resume.changed_options({"lr": 0.2, "epochs": 3}, "data")
            assert range(resume.progress.epoch, 9)[: resume.progress.batches] is not None
            assert len(resume.progress.losses_for_rank(0, 1)) == 2

    assert named_state(str(path)).progress == progress
    check_property(check, contents(valid), count)


@at_both_sizes
def test_any_index_of_an_image_cache_is_read_or_refused(count, tmp_path):
    picture = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)

    def open_cache():
        open_image_cache(tmp_path, [str(picture)], 4, lambda items, *_: items)

    open_cache()
    index = tmp_path / "images-4.json"
    valid = json.loads(index.read_text())

    def check(content):
        index.write_bytes(content)
        with only_our_error(index):
            open_cache()

    check_property(check, contents(valid), count)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'{"a": NaN}', "NaN"),
        (b"[-Infinity]", "-Infinity"),
        (b"[1e999]", "1e999"),
        (b'{"a": 1, "b": 2, "a": 1}', "'a' occurs twice"),
        (b'[{"x": {"img_id": 1, "img_id": 2}}]', "'img_id' occurs twice"),
        (b"[" * 100_000, "nested too deep"),
        (b"[" + b"1" * 5000 + b"]", "digits"),
        (b'{"a":' * 100_000, "nested too deep"),
        (b'["\xff"]', "utf-8"),
        ('["ä"]'.encode("latin-1"), "utf-8"),
        (b'["\\ud800"]', "surrogates"),
        ('{"a": 1}'.encode("utf-16")[2:], "utf-8|invalid|Expecting"),  # without its mark
        (b"", "Expecting value"),
        (b"{'a': 1}", "double quotes"),
    ],
)
def test_what_is_not_json_is_refused_in_one_line(text, message, tmp_path):
    (tmp_path / "whole.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"whole\.json is not JSON.*{message}") as error:
        read_json(tmp_path / "whole.json")
    assert "\n" not in str(error.value)
    (tmp_path / "lines.jsonl").write_bytes(text or b"x")
    expected = rf"lines\.jsonl (line 1 is not JSON|is not UTF-8).*{message}"
    dataset = open_dataset("pairs", tmp_path / "lines.jsonl")
    with pytest.raises(ValueError, match=expected) as error:
        dataset.checked_pairs("train")
    assert len(str(error.value)) < 400


def test_json_that_is_unusual_but_sound_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"a": [1.5e300, "\\ud83d\\ude00"], "\xc3\xa4": {"a": null}}'
    )
    assert read_json(tmp_path / "a.json") == {"a": [1.5e300, "😀"], "ä": {"a": None}}
    assert parse_json("1" * 4000) == int("1" * 4000)
    row = {"before": "a.png", "after": "b.png", "split": "train", "caption": "two\u2028lines\x85"}
    line = json.dumps(row, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    dataset = open_dataset("pairs", tmp_path / "a.jsonl")
    (pair,) = dataset.checked_pairs("train", need_images=False)
    assert pair.captions == ("two\u2028lines\x85",)


PATHS = ["", ".", "..", "../../etc/x", "/etc/x", "..\\x", "a\0b", "\ud800"]


@pytest.mark.parametrize("datatype", ["spot", "clevr"])
@pytest.mark.parametrize("image_id", PATHS)
def test_ids_that_lead_elsewhere_are_refused(image_id, datatype, tmp_path):
    sizes = {"train": 1, "val": 1, "test": 1}
    if datatype == "spot":
        data = make_spot(tmp_path / "data", sizes)
        file = data / "reformat_train.json"
        file.write_text(json.dumps([{"img_id": image_id, "sentences": ["x"]}]))
    else:
        data = make_clevr(tmp_path / "data", sizes)
        file = data / "change_captions.json"
        file.write_text(json.dumps({f"CLEVR_default_{image_id}": ["x"]}))
    dataset = open_dataset(datatype, data, data / "images_test")
    expected = r"not a plain file name|is not \"CLEVR|surrogates"
    with audited() as events, pytest.raises(ValueError, match=expected) as error:
        dataset.checked_pairs("train", need_images=False)
    assert str(file) in str(error.value)
    assert stays_inside(events, data)


@given(
    st.text() | st.sampled_from([name for name in NAMES if name != "\ud800"]),
    st.integers(0, 10**6),
    st.none() | st.integers(0, 9),
)
@settings(max_examples=100, deadline=None, derandomize=True)
@example("字" * 100, 0, 1)
def test_pictures_of_attention_stay_in_their_folder(identity, number, place):
    name = picture_name(number, identity, place)
    assert not set(name) & set("/\\\0\n")
    assert name.endswith(".png")
    assert len(name.encode()) < 120


@pytest.mark.parametrize("kind", [[], {}, "", None, "texture"])
def test_a_kind_of_change_is_one_of_the_five(kind, tmp_path):
    valid, file, read = READERS["what changed"]
    (tmp_path / file).write_text(json.dumps({"1.png": {**valid["1.png"], "type": kind}}))
    with pytest.raises(ValueError, match=r"changed_object\.json: 1\.png is"):
        read(tmp_path / file)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 100_000, "is damaged"),
        (b"7", "is damaged"),
        (b'{"id": [1]}', "holds the results of other pairs"),
        (b'{"id": "0", "id": "0"}', "is damaged"),
        (b"\xff", "is damaged"),
        (b"[]", "is damaged"),
    ],
)
def test_a_file_to_continue_that_holds_no_results_is_refused(line, reason, tmp_path):
    (tmp_path / "results.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=rf"results\.jsonl {reason}"):
        read_finished(tmp_path / "results.jsonl", [ImagePair("0", Path("a"), Path("b"))], 1)


def test_no_type_of_change_takes_the_name_of_all(tmp_path):
    (tmp_path / "types.json").write_text('{"add": ["1.png"], "all": ["2.png"]}')
    with pytest.raises(ValueError, match=r"types\.json: a type is called 'all'"):
        read_type_mapping(tmp_path / "types.json")


def test_written_json_can_be_read_whatever_the_numbers(tmp_path):
    values = {"scores": [1.5, math.nan, math.inf], "loss": {"mean": -math.inf}}
    write_json(tmp_path / "x.json", values)
    assert read_json(tmp_path / "x.json") == {"scores": [1.5, None, None], "loss": {"mean": None}}
