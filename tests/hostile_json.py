"""For tests of hostile JSON: any values, corrupted ones, and the readers of all JSON files."""

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataloaders.coco_files import read_ground_truth, read_results
from dataloaders.datasets.clevr_change import read_captions, read_split, read_type_mapping
from dataloaders.datasets.spot_the_diff import read_annotations
from gt.caption_accuracy import read_changes
from modules.model.bert import load_cross_config, load_decoder_config
from modules.pipeline.results import read_finished
from modules.weights.model_info import read_model_info
from modules.weights.sources import read_sizes
from tests.conftest import TINY
from tests.hostile import QUICK, mutate


def as_json(value: Any) -> bytes:
    """The value's JSON."""
    return json.dumps(value).encode()


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


@st.composite
def corrupted(draw: st.DrawFn, valid: Any) -> Any:
    """A valid value in which one thing somewhere is replaced, missing or renamed."""
    if not (isinstance(valid, list | dict) and valid):
        return draw(VALUES)
    whole = copy.deepcopy(valid)
    place = whole
    while True:
        keys = list(place) if isinstance(place, dict) else range(len(place))
        key = draw(st.sampled_from(keys))
        is_container = isinstance(place[key], list | dict) and place[key]
        goes_deeper = is_container and draw(st.booleans())
        if not goes_deeper:
            break
        place = place[key]
    value = place.pop(key)
    how = draw(st.sampled_from(("replaced", "missing", "renamed")))
    if how == "missing":
        return whole
    if how == "replaced":
        value = draw(VALUES)
    if isinstance(place, list):
        place.insert(key, value)
    elif how == "replaced":
        place[key] = value
    else:
        place[draw(TEXTS)] = value
    return whole


def contents(valid: Any) -> st.SearchStrategy[bytes]:
    """Bytes of JSON files: any value, a corrupted one, a valid text mutated, or no text at all."""
    seeds = st.integers(0, 2**32)
    return st.one_of(
        VALUES.map(as_json),
        corrupted(valid).map(as_json),
        corrupted(valid).map(as_json),
        seeds.map(lambda seed: mutate(as_json(valid), random.Random(seed))),
        st.binary(max_size=20),
    )


def check_property(check: Callable[[Any], None], strategy: st.SearchStrategy, count: int) -> None:
    """Try a property on `count` examples; in the default tier these are always the same."""
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
INFO = {
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
    "types of change": (
        {"add": ["000000.png"], "drop": []},
        "type_mapping.json",
        read_type_mapping,
    ),
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
    "model.json": (INFO, "model.json", read_model_info),
    "results to continue": (
        {"id": "0", "before": "a", "after": "b", "captions": []},
        "results.jsonl",
        lambda path: read_finished(path, [], 1),
    ),
}
