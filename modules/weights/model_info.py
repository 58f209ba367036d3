"""The JSON beside weights: what a model is that its tensors' shapes cannot say, and what it was trained on."""

import json
import logging
import reprlib
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from modules.clip4idc import CLIP4IDC
from modules.model.bert import load_decoder_config
from modules.model.clip import HEAD_WIDTH
from system.files import atomic_write
from system.json_files import read_json

log = logging.getLogger(__name__)

MODEL_INFO_FILE = "model.json"  # of a folder; a single file `x` may have its own, `x.json`


FIELD_TYPES = {
    "intra_num_hidden_layers": int,
    "linear_patch": str,
    "head_width": int,
    "max_words": int,
    "decoder_config": dict,
    "trained_on": str,
}


def describe_model(model: CLIP4IDC, max_words: int) -> dict[str, Any]:
    """A card's values: blocks before joining, patch kind, width of CLIP's heads, caption length, and a captioner's config."""
    values = {
        "intra_num_hidden_layers": model.clip.visual.intra_layers,
        "linear_patch": model.clip.visual.linear_patch,
        "head_width": HEAD_WIDTH,
        "max_words": max_words,
    }
    if model.task == "caption":
        config = asdict(model.decoder.config)
        values["decoder_config"] = {"num_decoder_layers": config.pop("num_layers"), **config}
    return values


def write_model_info(path: Path, values: Mapping[str, Any]) -> None:
    """Write a card for people to read, too."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def find_model_info(weights: Path) -> Path | None:
    """A file's own card, else its folder's, else None."""
    tried = (weights.with_name(f"{weights.name}.json"), weights.parent / MODEL_INFO_FILE)
    return next((path for path in tried if path.is_file()), None)


def read_model_info(weights: Path) -> dict[str, Any]:
    """The card beside weights, {} where there is none. Raises ValueError for values of the wrong kind."""
    path = find_model_info(weights)
    return check_model_info(read_json(path, dict), str(path)) if path else {}


def check_model_info(card: dict[str, Any], origin: str) -> dict[str, Any]:
    """The card; ValueError naming its origin for values of the wrong kind."""
    for name, kind in FIELD_TYPES.items():
        if name in card and type(card[name]) is not kind:
            raise ValueError(
                f"{origin}: {name} is {reprlib.repr(card[name])}, expected {kind.__name__}"
            )
    if card.get("head_width", HEAD_WIDTH) != HEAD_WIDTH:
        raise ValueError(
            f"{origin}: head_width is {card['head_width']}, but only CLIPs with heads of {HEAD_WIDTH} are built here"
        )
    if "decoder_config" in card:
        try:
            load_decoder_config(card["decoder_config"])
        except ValueError as error:
            raise ValueError(f"{origin}: decoder_config: {error}") from None
    return card


def apply_model_info(
    settings: Mapping[str, Any], card: Mapping[str, Any], origin: str
) -> dict[str, Any]:
    """The settings, those that the card knows as it says; each difference is told."""
    for name, value in settings.items():
        if (
            name in card and card[name] != value and name != "decoder_config"
        ):  # which is long, and mostly given by a name
            log.info("%s is %s, as %s says (the option: %s)", name, card[name], origin, value)
    return {name: card.get(name, value) for name, value in settings.items()}
