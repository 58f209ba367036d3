"""Hostile input: whatever a file holds, its reader gives a value or one error that names the file. No code runs, no memory is taken
that the file does not warrant, nothing outside the given folders is opened."""

import copy
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import EpsImagePlugin, Image
from safetensors.torch import save as safetensors_of

from dataloaders.coco_files import read_ground_truth, read_results
from dataloaders.datasets import open_dataset
from dataloaders.datasets.clevr_change import read_captions, read_split, read_type_mapping
from dataloaders.datasets.pair_table import COLUMNS
from dataloaders.datasets.spot_the_diff import read_annotations
from dataloaders.find_pairs import find_pairs
from dataloaders.images import load_image, read_image
from dataloaders.pairs import ImagePair
from dataloaders.picture_files import picture_endings
from dataloaders.storage.image_cache import open_image_cache
from gt.caption_accuracy import read_changes
from modules.clip4idc import CLIP4IDC
from modules.model.bert import MAX_PARAMETERS, load_cross_config, load_decoder_config
from modules.model.clip import PAIR_PREFIXES
from modules.model.clip_sizes import ClipSizes
from modules.pipeline.predict import picture_name
from modules.pipeline.results import read_finished
from modules.predictor import Predictor
from modules.training.checkpoints import Checkpoints
from modules.training.progress import Progress
from modules.training.states import named_state
from modules.training.trainer import Trainer
from modules.weights.model_info import read_model_info
from modules.weights.sources import read_sizes
from modules.weights.tensor_files import MAGIC, PROTOCOL, read_weights
from modules.weights.unpickler import RestrictedUnpickler
from system.files import sha256_of
from system.json_files import parse_json, read_json
from tests.conftest import ROOT, TINY, make_clevr, make_spot, tiny_weights

QUICK, THOROUGH = (
    20,
    2000,
)  # examples of each property and mutated files of each kind, in the default and in the slow tier
tiers = pytest.mark.parametrize(
    "count",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(THOROUGH, id="thorough", marks=pytest.mark.slow),
    ],
)
MIB = 1 << 20
LEAK = 32 * MIB  # what a process may hold more at the end of a fuzz run than in its middle
PEAK = {
    "images": 1536 * MIB,
    "weights": 64 * MIB,
}  # what one file may take for a moment; Pillow decodes up to 179 million pixels
TOUCHES = ("open", "os.mkdir")
RUNS_CODE = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "ctypes.dlopen",
)

NAMES = (
    "",
    ".",
    "..",
    "../../etc/x",
    "/etc/x",
    "..\\x",
    "a\0b",
    "x" * 300,
    "\ud800",
    "a\nb",
    "CLEVR_default_../../etc/x",
    "all",
)
NUMBERS = (10**12, -1, 0, 10**400, 1e300, 2**63)
TEXTS = st.text(max_size=6) | st.sampled_from(NAMES)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from(NUMBERS) | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)

_events: list[tuple[str, tuple]] | None = None  # where not None, what Python's audit hook sees


def _see(event: str, details: tuple) -> None:
    if _events is not None and event in (*TOUCHES, *RUNS_CODE):
        _events.append((event, details))


sys.addaudithook(_see)


@contextmanager
def seen() -> Iterator[list[tuple[str, tuple]]]:
    """The files that are opened inside, and the programs that are started."""
    global _events
    _events, before = [], _events
    try:
        yield _events
    finally:
        _events = before


def stays_inside(events: list[tuple[str, tuple]], *folders: Path) -> bool:
    """Whether no program was started, and nothing opened or made but in these folders and those of Python's and our own modules."""
    allowed = [
        folder.resolve() for folder in (*folders, ROOT, Path(sys.prefix), Path(sys.base_prefix))
    ]
    places = [
        Path(os.fsdecode(details[0])).resolve()
        for event, details in events
        if event in TOUCHES and not isinstance(details[0], int)
    ]
    return all(event in TOUCHES for event, _ in events) and all(
        any(map(path.is_relative_to, allowed)) for path in places
    )


@contextmanager
def only_our_error(path: Path) -> Iterator[None]:
    """Inside, the one way to fail is a ValueError or OSError that names the file; nothing outside its folder is opened."""
    said = str(path)
    with seen() as events:
        try:
            yield
        except (ValueError, OSError) as error:
            said = str(error)
    assert str(path) in said
    assert stays_inside(events, path.parent)


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Bits flipped, ends cut off, bytes inserted, repeated, overwritten: one to eight times."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start = draw.randrange(len(changed) + 1)
        end = start + draw.randrange(1, 40)
        kind = draw.choice(("flip", "flip", "cut", "insert", "repeat", "overwrite", "byte"))
        if kind == "flip" and start < len(changed):
            changed[start] ^= 1 << draw.randrange(8)
        elif kind == "cut" and draw.random() < 0.3:
            del changed[start:]
        elif kind == "insert":
            changed[start:start] = draw.randbytes(end - start)
        elif kind == "repeat":
            changed[start:start] = changed[start:end]
        elif kind == "overwrite":
            changed[start:end] = bytes([draw.choice((0, 127, 255))]) * len(changed[start:end])
        elif kind == "byte" and start < len(changed):
            changed[start] = draw.randrange(256)
    return bytes(changed)


@st.composite
def spoilt(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value in which something somewhere is another, is missing or is called otherwise."""
    if not (isinstance(valid, list | dict) and valid):
        return draw(VALUES)
    whole = place = copy.deepcopy(valid)
    while True:
        key = draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not (isinstance(place[key], list | dict) and place[key] and draw(st.booleans())):
            break
        place = place[key]
    value = place.pop(key)
    how = draw(st.sampled_from(("other", "gone", "renamed")))
    if how != "gone":
        replacement = draw(VALUES) if how == "other" else value
        if isinstance(place, list):
            place.insert(key, replacement)
        else:
            place[key if how == "other" else draw(TEXTS)] = replacement
    return whole


def written(value: Any) -> bytes:
    return json.dumps(value).encode()


def contents(valid: Any) -> st.SearchStrategy[bytes]:
    """Bytes of JSON files: any value, a spoilt valid one, mutated text of one, or no text at all."""
    seeds = st.integers(0, 2**32)
    return st.one_of(
        VALUES.map(written),
        spoilt(valid).map(written),
        spoilt(valid).map(written),
        seeds.map(lambda seed: mutated(written(valid), random.Random(seed))),
        st.binary(max_size=20),
    )


def holds(check: Callable[[Any], None], strategy: st.SearchStrategy, count: int) -> None:
    """Try a property on `count` examples, in the default tier always the same ones."""
    chosen = settings(
        max_examples=count,
        deadline=None,
        derandomize=count == QUICK,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    chosen(given(strategy)(check))()


CONFIG = {
    "hidden_size": 64,
    "num_attention_heads": 1,
    "intermediate_size": 256,
    "num_decoder_layers": 2,
    "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "initializer_range": 0.02,
    "max_position_embeddings": 150,
    "type_vocab_size": 2,
    "hidden_act": "gelu",
}
CARD = {
    "intra_num_hidden_layers": 1,
    "linear_patch": "2d",
    "max_words": 20,
    "decoder_config": CONFIG,
    "trained_on": "drawn scenes",
}
READERS: dict[str, tuple[Any, str, Callable[[Path], Any]]] = {
    "CLEVR-Change's captions": (
        {"CLEVR_default_000000.png": ["a", "b"], "CLEVR_default_000001.png": ["c"]},
        "captions.json",
        read_captions,
    ),
    "splits": (
        {"train": [0, 1], "val": [2], "test": [3]},
        "splits.json",
        lambda path: read_split(path.parent, "train"),
    ),
    "type mapping": ({"add": ["000000.png"], "drop": []}, "type_mapping.json", read_type_mapping),
    "Spot-the-Diff's annotations": (
        [{"img_id": "400", "sentences": ["a", "b"]}, {"img_id": 5, "sentences": []}],
        "a.json",
        read_annotations,
    ),
    "results": (
        [{"image_id": "1.png", "caption": "a"}, {"image_id": 2, "caption": "b"}],
        "results.json",
        read_results,
    ),
    "ground truth": (
        {"annotations": [{"image_id": "1.png", "caption": "a", "id": 0}], "images": []},
        "gt.json",
        read_ground_truth,
    ),
    "what changed": (
        {
            "1.png": {
                "type": "color",
                "size": "small",
                "color": "red",
                "material": "metal",
                "shape": "cube",
                "new_color": "blue",
            }
        },
        "changed_object.json",
        read_changes,
    ),
    "decoder config": (CONFIG, "decoder_config.json", load_decoder_config),
    "cross config": (CONFIG, "cross_config.json", load_cross_config),
    "CLIP's sizes": (TINY, "sizes.json", read_sizes),
    "model card": (CARD, "model.json", read_model_info),
    "results to continue": (
        {"id": "0", "before": "a", "after": "b", "captions": []},
        "results.jsonl",
        lambda path: read_finished(path, [], 1),
    ),
}


@tiers
@pytest.mark.parametrize("name", READERS)
def test_any_json_is_read_or_refused_by_its_name(name, count, tmp_path):
    valid, file, read = READERS[name]
    path = tmp_path / file

    def check(content):
        path.write_bytes(content)
        with only_our_error(path):
            read(path)

    if name != "results to continue":  # which no pairs have
        path.write_bytes(b"\xef\xbb\xbf" + written(valid))
        read(path)
    holds(check, contents(valid), count)


@tiers
def test_any_sidecar_of_a_training_state_is_used_or_refused(count, tmp_path):
    files = Checkpoints(tmp_path, 2, {"lr": 0.1, "epochs": 3}, "data", {"max_words": 12})
    path = files.save_state(
        {"model": {}}, Progress(epoch=2, losses=[[1.5, 2.0]], batches=2), steps=2
    )
    sidecar = path.with_name(f"{path.name}.json")
    valid = json.loads(sidecar.read_text())

    def check(content):
        sidecar.write_bytes(content)
        with only_our_error(sidecar):
            point = named_state(str(path))
            point.changed_options({"lr": 0.2, "epochs": 3}, "data")
            assert range(point.progress.epoch, 9)[: point.progress.batches] is not None
            assert len(point.progress.losses_for_rank(0, 1)) == 2

    assert named_state(str(path)).progress == Progress(epoch=2, losses=[[1.5, 2.0]], batches=2)
    holds(check, contents(valid), count)


@tiers
def test_any_index_of_an_image_cache_is_read_or_refused(count, tmp_path):
    folder, picture = tmp_path, tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(picture)
    open_image_cache(folder, [str(picture)], 4, lambda items, *_: items)
    index = folder / "images-4.json"
    valid = json.loads(index.read_text())

    def check(content):
        index.write_bytes(content)
        with only_our_error(index):
            open_image_cache(folder, [str(picture)], 4, lambda items, *_: items)

    holds(check, contents(valid), count)


ROWS = [
    {
        "before": "a.png",
        "after": "b.png",
        "split": "train",
        "caption": "a box",
        "id": "1",
        "type": "add",
    },
    {"before": "c.png", "after": "d.png", "split": "train", "captions": ["x", "y"], "id": 7},
]
CELLS = st.sampled_from(
    ("a.png", "b.png", "train", "val", "", '"', ",", "\n", "\r", "7", "add", *NAMES[:8], "\u2028")
) | st.text(max_size=4)


def tables() -> st.SearchStrategy[tuple[str, bytes]]:
    """Endings and contents of tables of pairs."""
    lines = st.lists(spoilt(ROWS[0]) | spoilt(ROWS[1]) | VALUES, max_size=3).map(
        lambda rows: "\n".join(map(json.dumps, rows)).encode()
    )
    whole = "\n".join(map(json.dumps, ROWS)).encode()
    rows = st.lists(st.lists(CELLS, max_size=7).map(",".join), max_size=3)
    headers = st.just(",".join(COLUMNS)) | st.permutations([*COLUMNS, "before", "note"]).map(
        lambda names: ",".join(names[:6])
    )
    sheets = st.tuples(headers, rows).map(
        lambda parts: "\n".join([parts[0], *parts[1]]).encode(errors="surrogatepass")
    )
    sheet = ",".join(COLUMNS).encode() + b'\na.png,b.png,train,"a, box",1,add\n'
    seeds = st.integers(0, 2**32).map(random.Random)
    return st.one_of(
        st.tuples(
            st.just(".jsonl"),
            lines | seeds.map(lambda draw: mutated(whole, draw)) | st.binary(max_size=20),
        ),
        st.tuples(
            st.just(".csv"),
            sheets | seeds.map(lambda draw: mutated(sheet, draw)) | st.binary(max_size=20),
        ),
    )


@tiers
@pytest.mark.parametrize(
    "read",
    [
        lambda path: open_dataset("pairs", path).checked_pairs("train", need_images=False),
        lambda path: open_dataset("pairs", path).checked_pairs("train"),
        lambda path: find_pairs(None, None, str(path)),
    ],
    ids=["to train", "with images", "to caption"],
)
def test_any_table_of_pairs_is_read_or_refused_by_its_name(read, count, tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(b"")

    def check(table):
        path = tmp_path / f"table{table[0]}"
        path.write_bytes(table[1])
        with only_our_error(path):
            read(path)

    for ending, text in (
        (".jsonl", "\n".join(map(json.dumps, ROWS))),
        (".csv", ",".join(COLUMNS) + "\na.png,b.png,train,a box,1,add"),
    ):
        (tmp_path / f"sound{ending}").write_text("\ufeff" + text, encoding="utf-8")
        assert read(tmp_path / f"sound{ending}")[0].id == "1"
    holds(check, tables(), count)


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
        ('{"a": 1}'.encode("utf-16"), "utf-8"),
        (b"", "Expecting value"),
        (b"{'a': 1}", "double quotes"),
    ],
)
def test_what_is_no_json_is_said_in_one_line(text, message, tmp_path):
    (tmp_path / "whole.json").write_bytes(text)
    with pytest.raises(ValueError, match=rf"whole\.json is not JSON.*{message}") as error:
        read_json(tmp_path / "whole.json")
    assert "\n" not in str(error.value)
    (tmp_path / "lines.jsonl").write_bytes(text or b"x")
    with pytest.raises(
        ValueError, match=rf"lines\.jsonl (line 1 is not JSON|is not UTF-8).*{message}"
    ) as error:
        open_dataset("pairs", tmp_path / "lines.jsonl").checked_pairs("train")
    assert len(str(error.value)) < 400


def test_json_that_is_unusual_but_sound_is_read(tmp_path):
    (tmp_path / "a.json").write_bytes(
        b'\xef\xbb\xbf{"a": [1.5e300, "\\ud83d\\ude00"], "\xc3\xa4": {"a": null}}'
    )
    assert read_json(tmp_path / "a.json") == {"a": [1.5e300, "😀"], "ä": {"a": None}}
    assert parse_json("1" * 4000) == int("1" * 4000)
    line = json.dumps({**ROWS[0], "caption": "two\u2028lines\x85"}, ensure_ascii=False)
    (tmp_path / "a.jsonl").write_text(line + "\r\n", encoding="utf-8", newline="")
    assert open_dataset("pairs", tmp_path / "a.jsonl").checked_pairs("train", need_images=False)[
        0
    ].captions == ("two\u2028lines\x85",)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../../etc/x", "/etc/x", "..\\x", "a\0b", "\ud800"]
)
def test_ids_that_lead_elsewhere_are_refused(name, tmp_path):
    for make, file, content in (
        (make_spot, "reformat_train.json", [{"img_id": name, "sentences": ["x"]}]),
        (make_clevr, "change_captions.json", {f"CLEVR_default_{name}": ["x"]}),
    ):
        data = make(tmp_path / make.__name__, {"train": 1, "val": 1, "test": 1})
        (data / file).write_text(json.dumps(content))
        with (
            seen() as events,
            pytest.raises(
                ValueError, match=r"not a plain file name|is not \"CLEVR|surrogates"
            ) as error,
        ):
            name = make.__name__.removeprefix("make_")
            dataset = open_dataset(name, data, data / "images_test")
            dataset.checked_pairs("train", need_images=False)
        assert str(data / file) in str(error.value)
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


def test_tables_say_in_one_line_what_a_path_or_a_column_cannot_be(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("before,after,after\na,b,c\n")
    with pytest.raises(ValueError, match=r"t\.csv has two columns after"):
        find_pairs(None, None, str(table))
    table.write_text(f"before,after\na,{'x' * 5000}\n")
    (tmp_path / "a").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no image .*t\.csv"):
        find_pairs(None, None, str(table))
    table.write_text(f"before,after,split,caption\na,{'x' * 5000},train,words\n")
    with pytest.raises(FileNotFoundError, match=r"no image .*t\.csv line 2"):
        open_dataset("pairs", table).checked_pairs("train")
    (tmp_path / "t.jsonl").write_text(json.dumps({**ROWS[0], "before": "a\0.png"}))
    with pytest.raises(ValueError, match=r"t\.jsonl line 1: before is 'a\\x00.png'.*NUL"):
        open_dataset("pairs", tmp_path / "t.jsonl").checked_pairs("train", need_images=False)


@pytest.mark.parametrize("kind", [[], {}, "", None, "texture"])
def test_a_kind_of_change_is_one_of_the_five(kind, tmp_path):
    valid, file, read = READERS["what changed"]
    (tmp_path / file).write_text(json.dumps({"1.png": {**valid["1.png"], "type": kind}}))
    with pytest.raises(ValueError, match=r"changed_object\.json: 1\.png is"):
        read(tmp_path / file)


@pytest.mark.parametrize(
    "line", [b"[" * 100_000, b"7", b'{"id": [1]}', b'{"id": "0", "id": "0"}', b"\xff", b"[]"]
)
def test_results_to_continue_that_are_no_results_are_anothers(line, tmp_path):
    (tmp_path / "results.jsonl").write_bytes(line + b"\n")
    with pytest.raises(ValueError, match=r"results\.jsonl holds the results of other pairs"):
        read_finished(tmp_path / "results.jsonl", [ImagePair("0", Path("a"), Path("b"))], 1)


def test_no_type_of_change_takes_the_name_of_all(tmp_path):
    (tmp_path / "types.json").write_text('{"add": ["1.png"], "all": ["2.png"]}')
    with pytest.raises(ValueError, match=r"types\.json: a type is called 'all'"):
        read_type_mapping(tmp_path / "types.json")


def test_a_folders_names_that_are_no_utf8_are_refused(tmp_path):
    for name in (b"caf\xe9.png", b"caf\xe9_2.png"):
        (tmp_path / os.fsdecode(name)).write_bytes(b"")
    with pytest.raises(ValueError, match=r"caf\\udce9.*is not UTF-8"):
        find_pairs(str(tmp_path), None, None)


@pytest.mark.parametrize(
    ("name", "absurd"),
    [
        *(
            (name, {key: value})
            for name in ("decoder config", "cross config")
            for key in CONFIG
            if type(CONFIG[key]) is int
            and (key, name)
            not in (("num_hidden_layers", "decoder config"), ("num_decoder_layers", "cross config"))
            for value in (10**12, 2**20 + 1)
        ),
        *(("CLIP's sizes", {key: value}) for key in TINY for value in (10**12, 2**21)),
        ("CLIP's sizes", {"vision_layers": 2**11}),
        ("CLIP's sizes", {"vision_width": 2**20, "transformer_width": 2**20}),
        ("CLIP's sizes", {"image_resolution": 2**20, "vision_patch_size": 1}),
        ("CLIP's sizes", {"vocab_size": 2**20, "transformer_width": 2**13}),
        ("decoder config", {"hidden_size": 2**20}),
        ("cross config", {"num_hidden_layers": 2**10, "hidden_size": 2**12}),
        ("model card", {"decoder_config": {**CONFIG, "hidden_size": 2**20}}),
    ],
)
def test_absurd_sizes_are_refused(name, absurd, tmp_path):
    valid, file, read = READERS[name]
    (tmp_path / file).write_text(json.dumps({**valid, **absurd}))
    with pytest.raises(ValueError, match=file):
        read(tmp_path / file)


@pytest.mark.parametrize(("name", "parameters"), [("clip-mini.json", None), (TINY, 6_500_000)])
def test_the_count_of_parameters_is_about_right(name, parameters):
    from modules.model.clip import CLIP

    sizes = read_sizes(ROOT / "modules" / name) if isinstance(name, str) else ClipSizes(**name)
    with torch.device("meta"):
        counted = sum(value.numel() for value in CLIP(sizes, 0, "2d").parameters())
    assert sizes.num_parameters == pytest.approx(counted, rel=0.02)
    assert sizes.num_parameters < MAX_PARAMETERS


def test_a_card_asks_for_no_more_words_than_the_model_has(tiny_captioner, tmp_path):
    torch.save(tiny_captioner.state_dict(), tmp_path / "weights.bin")
    for words in (10**12, 0, 78):
        (tmp_path / "model.json").write_text(
            json.dumps({"intra_num_hidden_layers": 1, "max_words": words})
        )
        with pytest.raises(
            ValueError, match=rf"weights\.bin: max_words is {words}, expected 1 to 77"
        ):
            Predictor.load(tmp_path / "weights.bin", "cpu", "fp32")


@pytest.mark.parametrize(
    "change",
    [
        {"clip.visual.conv1.weight": torch.zeros(2**13, 0, 32, 32)},
        {"clip.token_embedding.weight": torch.zeros(0, 2**16)},
        {"clip.text_projection": torch.zeros(0, 2**20)},
        {"clip.visual.positional_embedding": torch.zeros(0, 64)},
        {"clip.visual.transformer.resblocks.999999999.ln_1.weight": torch.zeros(64)},
        {f"clip.transformer.resblocks.{'9' * 5000}.ln_1.weight": torch.zeros(64)},
    ],
)
def test_weights_that_claim_sizes_they_do_not_have_take_no_memory(change):
    before = peak()
    weights = {
        key: value
        for key, value in {**tiny_weights(), **change}.items()
        if not key.removeprefix("clip.").startswith(PAIR_PREFIXES)
    }
    with pytest.raises(ValueError, match="size|do not fit"):
        CLIP4IDC.from_weights(weights, "caption", intra_layers=1)
    assert peak() - before < PEAK["weights"]


def peak() -> int:
    """The most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Images.


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
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


Source = Callable[[random.Random], bytes]  # a mutated file


def image_sources() -> dict[str, Source]:
    """Mutated pictures of each format, drawn anew at each call."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    flat, moving = noise.convert("P"), [noise.convert("P").rotate(90)]
    png, deep = (
        encoded(noise, "PNG", exif=exif),
        encoded(Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30)), "PNG"),
    )
    files = {
        "JPEG": encoded(noise, "JPEG", exif=exif),
        "CMYK JPEG": encoded(noise.convert("CMYK"), "JPEG"),
        "PNG": png,
        "GIF": encoded(flat, "GIF", save_all=True, append_images=moving),
        "TIFF": encoded(noise, "TIFF"),
        "BMP": encoded(noise, "BMP"),
        "TIFF by LZW": encoded(noise, "TIFF", compression="tiff_lzw"),
        "WebP": encoded(noise, "WEBP"),
        "QOI": encoded(noise, "QOI"),
        "JPEG 2000": encoded(noise, "JPEG2000"),
        "DDS": encoded(noise, "DDS"),
        "16 bits": deep,
        "palette": encoded(flat, "PNG"),
    }
    sources = {name: lambda draw, file=file: mutated(file, draw) for name, file in files.items()}
    return sources | {
        f"{name}, sound checksums": lambda draw, file=files[name]: with_checksums(
            mutated(file, draw)
        )
        for name in ("PNG", "16 bits", "palette")
    }


def read_picture(path: Path) -> None:
    """Decode and resize."""
    assert load_image(path, 16).shape == (3, 16, 16)


def test_pictures_that_are_none_are_refused_in_one_line(tmp_path):
    bomb = bytearray(encoded(Image.new("L", (1, 1)), "PNG"))
    bomb[16:24] = struct.pack(">II", 100_000, 100_000)
    animated = bytearray(encoded(Image.new("P", (4, 4)), "GIF"))
    animated[6:10] = struct.pack("<HH", 65535, 65535)
    sound = encoded(Image.new("RGB", (30, 20), "red"), "PNG")
    dds = bytearray(encoded(Image.new("RGB", (8, 8)), "DDS"))
    dds[80:84] = bytes(4)
    for name, content, reason in (
        ("empty.png", b"", "not an image"),
        ("text.png", b"no image", "not an image"),
        ("page.jpg", b"<html></html>", "not an image"),
        ("bomb.png", with_checksums(bomb), "more than 179 million pixels"),
        ("bomb.gif", animated, "more than 179 million pixels"),
        ("cut.png", sound[: len(sound) // 2], "cannot read the image"),
        ("head.png", sound[:20], "cannot read the image"),
        ("flags.dds", bytes(dds), "Unknown pixel format"),
        (
            "flat.bmp",
            encoded(Image.new("RGB", (1, 1)), "BMP").replace(struct.pack("<ii", 1, 1), bytes(8)),
            "cannot read the image",
        ),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            ValueError,
            match=rf"cannot read the image .*{name}.*{'' if reason.startswith('cannot') else reason}",
        ) as error:
            load_image(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match="folder.png"):
        load_image(tmp_path / "folder.png")
    with pytest.raises(ValueError, match="cannot read the image"):
        load_image("a\0.png")


def test_pictures_that_are_unusual_but_sound_are_read(tmp_path):
    red = Image.new("RGB", (30, 20), (200, 30, 10))
    ramp = np.linspace(0, 65535, 600).astype(np.uint16).reshape(20, 30)
    palette = red.quantize(4)
    for name, content in (
        ("cmyk.jpg", encoded(red.convert("CMYK"), "JPEG")),
        ("one.png", encoded(red.resize((1, 1)), "PNG")),
        (
            "two.gif",
            encoded(palette, "GIF", save_all=True, append_images=[Image.new("P", (30, 20), 1)]),
        ),
        ("clear.png", encoded(palette, "PNG", transparency=bytes([0, 128, 255, 255]))),
        ("clear2.png", encoded(red.convert("RGBA"), "PNG")),
    ):
        (tmp_path / name).write_bytes(content)
        assert (
            np.abs(np.asarray(read_image(tmp_path / name)).astype(int) - (200, 30, 10)).max() < 12
        ), name
        assert load_image(tmp_path / name).shape == (3, 224, 224)
    (tmp_path / "deep.png").write_bytes(encoded(Image.fromarray(ramp), "PNG"))
    assert np.array_equal(np.asarray(read_image(tmp_path / "deep.png"))[..., 0], ramp >> 8)


def test_postscript_under_a_pictures_name_runs_no_program(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto\n%%EOF\n"
    )
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path / 'ran'}\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    with (
        seen() as events,
        pytest.raises(ValueError, match=r"a\.png: not an image of a format that is read here"),
    ):
        load_image(tmp_path / "a.png")
    assert stays_inside(events, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_formats_that_hold_others_or_run_programs_are_not_opened(tmp_path):
    """Whatever their name: PostScript inside IPTC, Windows' metafiles, FITS, icons, PDF, films; also where a folder is listed."""
    postscript = (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 moveto\n%%EOF\n"
    )
    side = struct.pack(">H", 10)
    fields = (
        ((3, 60), b"\1\0"),
        ((3, 20), side),
        ((3, 30), side),
        ((3, 120), b"\5"),
        ((8, 10), postscript),
    )
    iptc = b"".join(
        b"\x1c" + bytes(kind) + struct.pack(">H", len(content)) + content
        for kind, content in fields
    )
    small = Image.new("RGB", (16, 16), "red")
    others = {
        name: encoded(small, name)
        for name in ("ICO", "ICNS", "PCX", "SGI", "PDF", "IM", "SPIDER", "XBM", "MSP")
        if name in Image.SAVE and name not in ("SPIDER", "XBM", "MSP")
    }
    for name, content in {"IPTC": iptc, "PostScript": postscript, **others}.items():
        (tmp_path / "a.png").write_bytes(content)
        with (
            seen() as events,
            pytest.raises(
                ValueError, match=r"a\.png: not an image of a format that is read here \(AVIF|BMP"
            ),
        ):
            read_image(tmp_path / "a.png")
        assert stays_inside(events, tmp_path), name
    for ending in (".png", ".JPG", ".webp", ".tif", ".gif", ".bmp", ".jp2"):
        assert ending.lower() in picture_endings()
    assert not picture_endings() & {
        ".eps",
        ".ps",
        ".iim",
        ".wmf",
        ".emf",
        ".pdf",
        ".mpg",
        ".h5",
        ".ico",
        ".fits",
        ".psd",
    }


def test_every_reader_of_pictures_opens_the_same_formats():
    """`Image.open` is called in one place."""
    places = [
        path
        for folder in (
            "",
            "modules",
            "modules/web",
            "dataloaders",
            "preprocess",
            "gt",
            "scripts",
            "benchmarks",
        )
        for path in (ROOT / folder).glob("*.py")
        if "Image.open(" in path.read_text()
    ]
    assert places == [ROOT / "modules" / "picture_files.py"]


# Weights.


class Tower(torch.nn.Module):
    """What a TorchScript archive is made of."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = torch.nn.Linear(3, 2).half(), torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.half()).float() * self.scale


def saved(value: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def scripted() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Tower(), torch.randn(1, 3)), buffer)
    return buffer.getvalue()


def with_entries(
    archive: bytes, change: Callable[[bytes], bytes], ending: str = "/data.pkl"
) -> bytes:
    """A zip with the entries of another; those whose name ends so are changed, and their checksums are right."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name.endswith(ending) else old.read(name))
    return buffer.getvalue()


WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.float16),
    "c": torch.zeros((), dtype=torch.int64),
}


def weight_sources() -> dict[str, Source]:
    """Mutated files of weights of each format; with the pickle alone mutated, and the archive sound, too."""
    files = {
        "zip": saved(WEIGHTS),
        "older": saved(WEIGHTS, _use_new_zipfile_serialization=False),
        "TorchScript": scripted(),
        "safetensors": safetensors_of(WEIGHTS),
    }
    sources = {name: lambda draw, file=file: mutated(file, draw) for name, file in files.items()}
    return sources | {
        f"{name}, sound but for its pickle": lambda draw, file=files[name]: with_entries(
            file, lambda content: mutated(content, draw)
        )
        for name in ("zip", "TorchScript")
    }


def read_all_weights(path: Path) -> None:
    """Read the weights, and then each of their elements."""
    for tensor in read_weights(path).values():
        tensor.float().sum()


# Both.


def fuzz(kind: str, folder: str, count: int) -> None:
    """Read `count` mutated files of each source; prints what became of them and of the memory. Runs in a process of its own."""
    sources, read = {
        "images": (image_sources, read_picture),
        "weights": (weight_sources, read_all_weights),
    }[kind]
    made, path, outcomes, resident = sources(), Path(folder, "mutated"), Counter(), []
    draw = random.Random(f"{kind} {count}")
    for number in range(count):
        for name, source in made.items():
            content = source(draw)
            path.write_bytes(content)
            with only_our_error(path):
                outcomes[name, "refused"] += 1
                read(path)
                outcomes[name, "refused"] -= 1
                outcomes[name, "read"] += 1
        if number == count // 2:
            held, highest = (
                int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize(),
                peak(),
            )
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    print(
        json.dumps(
            {
                "files": sum(outcomes.values()),
                "read": sum(outcomes[name, "read"] for name in made),
                "leaked": resident - held,
                "never read": [name for name in made if not outcomes[name, "read"]],
                "rise": peak() - highest,
                "never refused": [name for name in made if not outcomes[name, "refused"]],
            }
        )
    )


@tiers
@pytest.mark.parametrize("kind", ["images", "weights"])
def test_thousands_of_mutated_files_crash_nothing_and_leave_no_memory_behind(kind, count, tmp_path):
    code = f"from tests.test_hostile import fuzz; fuzz({kind!r}, {str(tmp_path)!r}, {count})"
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, child.stderr[-3000:]
    told = json.loads(child.stdout.splitlines()[-1])
    print(kind, told)
    assert not told["never refused"]
    assert told["read"] > told["files"] / 20
    assert told["leaked"] < LEAK
    assert told["rise"] < PEAK[kind]


class Payload:
    """What a hostile pickle asks for: a call, here one that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def hostile_pickles(trap: Path) -> dict[str, bytes]:
    """Pickles that call something: as Python writes them, and by each opcode that can."""
    text = str(trap).encode()
    return {
        **{
            f"protocol {protocol}": pickle.dumps({"a": Payload(trap)}, protocol)
            for protocol in range(6)
        },
        "state dict": pickle.dumps({"state_dict": {"a": Payload(trap)}}, 2),
        "INST": b"(S'" + text + b"'\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nV" + text + b"\no.",
        "NEWOBJ": b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(text)) + text + b"\x85\x81.",
        "named torch": b"\x80\x02c__torch__\nos.mkdir\nX"
        + struct.pack("<I", len(text))
        + text
        + b"\x85R.",
        "eval": b"\x80\x02cbuiltins\neval\nX"
        + struct.pack("<I", len(text) + 30)
        + (b"__import__('os').mkdir('" + text + b"')").ljust(len(text) + 30)
        + b"\x85R.",
    }


@pytest.mark.parametrize("kind", ["plain", "zip", "TorchScript", "older"])
def test_no_pickle_runs_code(kind, tmp_path):
    trap, path = tmp_path / "ran", tmp_path / "weights.bin"
    head = b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {}))
    for name, hostile in hostile_pickles(trap).items():
        base = {"zip": saved(WEIGHTS), "TorchScript": scripted()}
        path.write_bytes(
            {"plain": hostile, "older": head + hostile + pickle.dumps([], 2)}.get(kind)
            or with_entries(base[kind], lambda _, hostile=hostile: hostile)
        )
        with (
            seen() as events,
            pytest.raises(ValueError, match="cannot read weights from .*weights.bin") as error,
        ):
            read_weights(path)
        assert "\n" not in str(error.value), name
        assert stays_inside(events, tmp_path), name
        assert not trap.exists(), name


def rebuilt(numbers: tuple, storage: int = 4) -> bytes:
    """The pickle {"a": a tensor of (offset, size, stride)} on a storage of as many float32."""
    arguments = b"".join(pickle.dumps(value, 2)[2:-1] for value in numbers)
    return (
        b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n((X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0"
        + b"0"
        + b"X\3\0\0\0cpu"
        + pickle.dumps(storage, 2)[2:-1]
        + b"tQ"
        + arguments
        + b"\x89}tRs."
    )


@pytest.mark.parametrize("kind", ["zip", "older"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, (5,), (1,)), "ends at element 4"),
        ((1, (4,), (1,)), "ends at element 4"),
        ((0, (2, 2), (3, 1)), "ends at element 4"),
        ((0, (2,), (2**62,)), "ends at element"),
        ((0, (2**40, 2**40), (1, 1)), "ends at element"),
        ((-1, (2,), (1,)), "no known way"),
        ((3, (2,), (-1,)), "no known way"),
        ((0, (2,), (1, 1)), "no known way"),
        ((0, (10**9,), (0,)), "times the file's size"),
        ((0, (10**9, 10**9), (0, 0)), "times the file's size"),
        ((0, (2**70, 2**70), (0, 0)), "times the file's size"),
        ((10**30, (1,), (1,)), "ends at element"),
        ((0, (1.5,), (1,)), "no known way"),
    ],
)
def test_no_tensor_reaches_beyond_its_storage_or_takes_more_memory_than_the_file(
    kind, numbers, message, tmp_path
):
    path, storage = tmp_path / "weights.bin", np.arange(4, dtype=np.float32).tobytes()

    def file(content: bytes) -> bytes:
        if kind == "older":
            return (
                b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {}))
                + content
                + pickle.dumps(["0"], 2)
                + struct.pack("<q", 4)
                + storage
            )
        return with_entries(saved({"a": torch.arange(4.0)}), lambda _: content)

    path.write_bytes(file(rebuilt((1, (3,), (1,)))))
    assert read_weights(path)["a"].tolist() == [1, 2, 3]
    path.write_bytes(file(rebuilt(numbers)))
    before = peak()
    with pytest.raises(ValueError, match=rf"weights\.bin.*{message}"):
        read_weights(path)
    assert peak() - before < PEAK["weights"]


def test_the_storages_of_older_files_are_whole(tmp_path):
    head, path = (
        b"".join(pickle.dumps(value, 2) for value in (MAGIC, PROTOCOL, {})),
        tmp_path / "weights.bin",
    )
    for content, message in (
        (
            rebuilt((0, (4,), (1,)), storage=10**11) + pickle.dumps(["0"], 2),
            "more bytes than the file",
        ),
        (rebuilt((0, (4,), (1,))) + pickle.dumps([], 2) + bytes(24), "lacks the bytes"),
        (
            rebuilt((0, (4,), (1,))) + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + bytes(15),
            "cut short",
        ),
        (
            rebuilt((0, (4,), (1,))) + pickle.dumps(["0"], 2) + struct.pack("<q", 3) + bytes(16),
            "cut short",
        ),
        (
            rebuilt((0, (4,), (1,)))
            + pickle.dumps(["0", "0"], 2)
            + struct.pack("<q", 4)
            + bytes(40),
            "corrupt",
        ),
    ):
        path.write_bytes(head + content)
        with pytest.raises(ValueError, match=rf"weights\.bin.*{message}"):
            read_weights(path)


def nested_modules(depth: int, endless: bool) -> bytes:
    """The pickle of scripted modules, each with the next below two names; or of one that lies in itself."""
    new = b"c__torch__\nM\n)\x81"
    if endless:
        return b"\x80\x02" + new + b"q\0}X\1\0\0\0ah\0sb."
    levels = [new + b"}b" + b"q\0"]
    levels += [
        new
        + b"}(X\1\0\0\0ah"
        + bytes([level])
        + b"X\1\0\0\0bh"
        + bytes([level])
        + b"ubq"
        + bytes([level + 1])
        for level in range(depth)
    ]
    return b"\x80\x02" + b"".join(levels) + b"."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested_modules(60, endless=False), "nested too deeply"),
        (nested_modules(0, endless=True), "contain themselves"),
        (
            b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R.",
            "is not allowed",
        ),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".", "corrupt"),
        (b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".", "no state dict"),
        (b"\x80\x02" + b"]" * 100, "corrupt"),
        (b"\x80\x02(" * 5000 + b"t" * 4000 + b".", "more than 100 deep"),
        (pickle.dumps({1: 2}, 2), "no state dict"),
        (b"\x80\x02]N}b.", "corrupt|attributes"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\0\0\0__defaults__)s\x86b.",
            "attributes is not allowed",
        ),
        (
            b"\x80\x02ccollections\nOrderedDict\nN}X\x0c\0\0\0__defaults__)s\x86b.",
            "attributes is not allowed",
        ),
    ],
)
def test_no_pickle_takes_the_memory_or_changes_the_program(content, message, tmp_path):
    path, before = tmp_path / "weights.bin", peak()
    path.write_bytes(with_entries(scripted(), lambda _: content))
    with pytest.raises(ValueError, match=rf"weights\.bin.*({message})"):
        read_weights(path)
    assert peak() - before < PEAK["weights"]
    assert RestrictedUnpickler._rebuild.__defaults__ is None


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    path, before = tmp_path / "weights.bin", peak()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", rebuilt((0, (4,), (1,))))
        with archive.open("a/data/0", "w") as entry:
            for _ in range(300):
                entry.write(bytes(MIB))
    with pytest.raises(
        ValueError, match=r"weights\.bin: its entries would inflate from \d+ to \d+ bytes"
    ):
        read_weights(path)
    assert peak() - before < PEAK["weights"]
    for compression, name, message in (
        (zipfile.ZIP_LZMA, "a/data.pkl", "compressed in a way"),
        (zipfile.ZIP_STORED, "data", "no data.pkl"),
    ):
        with zipfile.ZipFile(path, "w", compression) as archive:
            archive.writestr(name, b"x")
        with pytest.raises(ValueError, match=rf"weights\.bin: .*{message}"):
            read_weights(path)
    path.write_bytes(with_entries(saved(WEIGHTS), lambda _: b"big", "/byteorder"))
    with pytest.raises(ValueError, match="little-endian"):
        read_weights(path)
    before_its_beginning = bytearray(with_entries(saved(WEIGHTS), bytes))
    before_its_beginning[-6:-2] = (
        int.from_bytes(before_its_beginning[-6:-2], "little") + 10**6
    ).to_bytes(4, "little")
    path.write_bytes(before_its_beginning)
    with pytest.raises(ValueError, match=r"weights\.bin: it is corrupt"):
        read_weights(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"a": 1},
        [],
        {},
        None,
    ],
)
def test_headers_of_safetensors_that_lie_are_refused(header, tmp_path):
    path, text = tmp_path / "a.safetensors", written(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_weights(path)
    for length in (2**63, 10**12, 10**8, len(text) + 17):
        path.write_bytes(struct.pack("<Q", length) + text + bytes(16))
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read_weights(path)
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_weights(path)


def test_what_was_read_is_what_was_saved(tmp_path):
    tied = {
        **WEIGHTS,
        "d": WEIGHTS["a.weight"].T,
        "e": torch.nn.Parameter(torch.randn(2, 2).bfloat16()),
        "f": torch.empty(0, 3),
    }
    ordered = torch.nn.Linear(2, 3).state_dict()
    for value in (
        tied,
        ordered,
        {"state_dict": tied, "epoch": 3, "options": [1, 2.5, None, True, ("x", 2**70)]},
    ):
        for newer in (True, False):
            (tmp_path / "a.bin").write_bytes(saved(value, _use_new_zipfile_serialization=newer))
            read, expected = read_weights(tmp_path / "a.bin"), value.get("state_dict", value)
            assert read.keys() == expected.keys()
            assert all(
                torch.equal(read[key], expected[key]) and read[key].dtype == expected[key].dtype
                for key in expected
            )
    (tmp_path / "a.bin").write_bytes(saved({1: torch.ones(2)}))
    with pytest.raises(ValueError, match=r"a\.bin holds no state dict"):
        read_weights(tmp_path / "a.bin")


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"garbage",
        saved([1]),
        saved({"model": None}),
        saved({"model": {1: 2}}),
        saved({"model": {}}),
        saved({"model": torch.nn.Linear(2, 3).state_dict()}),
        saved({"model": torch.nn.Linear(3, 2).state_dict(), "optimizer": [], "scaler": {}}),
        saved({"model": torch.nn.Linear(2, 3).state_dict(), "optimizer": [], "scaler": {}}),
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    ],
)
def test_a_training_state_that_makes_no_sense_is_refused(state, tmp_path):
    model = torch.nn.Linear(2, 3)
    trainer = SimpleNamespace(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        scaler=torch.amp.GradScaler("cpu"),
    )
    path = tmp_path / "training_state.bin.0"
    path.write_bytes(state)
    sidecar = {
        "sha256": sha256_of(path),
        "progress": asdict(Progress(epoch=1)),
        "options": {},
        "data": "",
        "card": {},
    }
    path.with_name("training_state.bin.0.json").write_text(json.dumps(sidecar))
    point = named_state(str(tmp_path / "pytorch_model.bin.0"))
    with pytest.raises(ValueError, match=r"training_state\.bin\.0"):
        Trainer.restore(trainer, point)
