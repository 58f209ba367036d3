"""model.json: settings that the weights' shapes do not show, and how the model came about."""

import logging
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from modules.model.bert import BertConfig, load_decoder_config
from modules.model.limits import HEAD_WIDTH
from system.files import atomic_write
from system.json_files import read_json, to_json

log = logging.getLogger(__name__)

MODEL_INFO_FILE = "model.json"  # of a folder; a single file `x` may have its own, `x.json`
MODEL_INFO_TYPES = {
    "intra_num_hidden_layers": int,
    "linear_patch": str,
    "head_width": int,
    "max_words": int,
    "decoder_config": dict,
    "trained_on": str,
    "started_from": str,
    "trained_with": str,
    "license": str,
}
PATCH_KINDS = ("2d", "3d")
MAX_START_LENGTH = 2000  # characters of a start, which tells the starts before it too


@dataclass(frozen=True)
class ModelSettings:
    """A model's settings that are not in its weights.

    None means not given: model.json or the default decides. The configs are what
    `load_decoder_config` and `load_cross_config` take.
    """

    intra_num_hidden_layers: int = 9
    linear_patch: str = "2d"
    decoder_config: str | Path | Mapping | BertConfig | None = None
    max_words: int | None = None
    sim_header: str = "loose"
    cross_config: str | Path | Mapping | BertConfig | None = None


def write_model_info(path: Path, info: Mapping[str, Any]) -> None:
    """Write it indented, since people read it too."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(info, indent=2) + "\n", encoding="utf-8")


def find_model_info(weights: Path) -> Path | None:
    """A weights file's own `<name>.json`, else its folder's model.json, else None."""
    tried = (weights.with_name(f"{weights.name}.json"), weights.parent / MODEL_INFO_FILE)
    return next((path for path in tried if path.is_file()), None)


def read_model_info(weights: Path) -> dict[str, Any]:
    """What model.json next to the weights says, {} if there is none.

    Raises ValueError as `check_model_info` does.
    """
    path = find_model_info(weights)
    return check_model_info(read_json(path, dict), str(path)) if path else {}


def check_model_info(info: dict[str, Any], source: str) -> dict[str, Any]:
    """The info itself. Raises ValueError naming its source for a value of a wrong type or range."""
    for name, kind in MODEL_INFO_TYPES.items():
        if name in info and type(info[name]) is not kind:
            value = reprlib.repr(info[name])
            raise ValueError(f"{source}: {name} is {value}, expected {kind.__name__}")
    if info.get("intra_num_hidden_layers", 0) < 0:
        number = info["intra_num_hidden_layers"]
        raise ValueError(f"{source}: intra_num_hidden_layers is {number}, expected 0 or more")
    if info.get("linear_patch", "2d") not in PATCH_KINDS:
        kind = reprlib.repr(info["linear_patch"])
        raise ValueError(f"{source}: linear_patch is {kind}, expected {' or '.join(PATCH_KINDS)}")
    if info.get("head_width", HEAD_WIDTH) != HEAD_WIDTH:
        raise ValueError(
            f"{source}: head_width is {info['head_width']}, "
            f"but only heads of {HEAD_WIDTH} can be built"
        )
    if "decoder_config" in info:
        try:
            load_decoder_config(info["decoder_config"])
        except ValueError as error:
            raise ValueError(f"{source}: decoder_config: {error}") from None
    return info


def describe_start(name: str, info: Mapping[str, Any]) -> str:
    """What is said of a model that was trained further from these weights, with their model.json.

    It includes what those weights started from themselves.
    """
    text = name
    if info.get("trained_on"):
        text += f", trained on {info['trained_on']}"
    if info.get("started_from"):
        text += f", which itself started from {info['started_from']}"
    is_long = len(text) > MAX_START_LENGTH
    return f"{text[: MAX_START_LENGTH - 1]}…" if is_long else text


def apply_model_info(
    settings: ModelSettings, info: Mapping[str, Any], source: str
) -> ModelSettings:
    """The settings with the info's values, which take precedence; each difference is logged."""
    # Only what `check_model_info` checks: a path in a downloaded file must not be opened.
    names = [field.name for field in fields(settings) if field.name in MODEL_INFO_TYPES]
    known = {name: info[name] for name in names if name in info}
    for name, value in known.items():
        given = getattr(settings, name)
        if given is None:
            continue
        if name == "decoder_config":
            if load_decoder_config(given) != load_decoder_config(value):
                log.info("the captioner's config is the one next to %s", source)
        elif given != value:
            log.info("%s is %s, as %s says (the option: %s)", name, value, source, given)
    return replace(settings, **known)
