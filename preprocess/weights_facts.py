"""What a file of weights holds, for `convert_weights.py --inspect`."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import torch
from torch import Tensor

from modules.clip4idc import load_model
from modules.model.backbone import PairBackbone, build_backbone
from modules.model.bert import BertConfig, load_decoder_config
from modules.model.clip import CLIP
from modules.weights.fitting import WeightMismatch
from modules.weights.key_names import (
    ARCHIVE_EXTRAS,
    LAYOUTS,
    has_captioner,
    layout_of,
    patch_kind,
    strip_wrappers,
    task_of,
)
from modules.weights.model_info import ModelSettings, find_model_info, read_model_info
from modules.weights.sources import (
    LoadedWeights,
    check_activation,
    find_not_finite,
    rename_to_released,
)
from modules.weights.tensor_files import file_format, read_weights


@dataclass(frozen=True)
class WeightsFacts:
    """What is known about a file of weights. Build it with `of`.

    `activation_problem` says why the activation is wrong or unknown. If no backbone takes the
    weights, `backbone` is "" and `sizes` is empty. `problems` says why no model can be built.
    """

    path: Path
    size_bytes: int
    file_format: str
    naming_style: str
    num_tensors: int
    num_elements: int
    types: Mapping[str, int]
    activation_problem: str
    backbone: str
    is_adapted: bool
    has_captioner: bool
    has_cross_encoder: bool
    linear_patch: str
    info_path: Path | None
    info: Mapping[str, Any]
    sizes: Mapping[str, int]
    problems: list[str]

    @classmethod
    def of(cls, path: Path) -> "WeightsFacts":
        """The facts about a file in any layout.

        Raises ValueError or OSError if it is not a file of weights.
        """
        raw = strip_wrappers(read_weights(path))
        weights = rename_to_released(raw, path)
        info = read_model_info(path)
        backbone = _backbone_of(weights)
        return cls(
            path=path,
            size_bytes=path.stat().st_size,
            file_format=file_format(path),
            naming_style=_naming_style(raw),
            num_tensors=len(raw),
            num_elements=sum(value.numel() for value in raw.values()),
            types=Counter(str(value.dtype).removeprefix("torch.") for value in raw.values()),
            activation_problem=_activation_problem(raw, weights, path),
            backbone=backbone.key_prefix if backbone else "",
            is_adapted=backbone is not None and _is_adapted(weights, backbone),
            has_captioner=has_captioner(weights),
            has_cross_encoder=_has_cross_encoder(weights),
            linear_patch=patch_kind(weights),
            info_path=find_model_info(path),
            info=info,
            sizes=backbone.size_facts() if backbone else {},
            problems=[
                *(f"{name} has NaN or infinite values" for name in find_not_finite(weights)),
                *_try_to_build(LoadedWeights(weights, info, str(path))),
            ],
        )

    @property
    def stage(self) -> str:
        """Which training made them."""
        if self.has_captioner:
            name = "captioner (the result of finetuning)"
        elif self.is_adapted:
            name = "adapted backbone (the result of adaptation)"
        else:
            name = "backbone, not adapted"
        return f"{name}, with a cross encoder" if self.has_cross_encoder else name


def format_facts(facts: WeightsFacts) -> list[str]:
    """The facts as lines of text."""
    megabytes = facts.size_bytes / 1e6
    counts = sorted(facts.types.items(), key=lambda pair: -pair[1])
    types = ", ".join(f"{count} {name}" for name, count in counts)
    lines = [
        f"file       {facts.path}, {megabytes:.1f} MB, {facts.file_format}",
        f"names      {facts.naming_style}",
        f"tensors    {facts.num_tensors}, {facts.num_elements / 1e6:.1f} M numbers, {types}",
        f"backbone   {facts.backbone or 'unknown'}",
        f"stage      {facts.stage}",
    ]
    if facts.backbone == CLIP.key_prefix:
        patch = "" if facts.is_adapted else ", as in any CLIP that is not adapted"
        lines.append(f"activation {_format_activation(facts)}")
        lines.append(f"patches    {facts.linear_patch}{patch}")
    lines.append(f"info       {_format_info(facts)}")
    if facts.sizes:
        sizes = ", ".join(f"{name} {value}" for name, value in facts.sizes.items())
        lines.append(f"sizes      {sizes}")
    if not facts.problems:
        return [*lines, "fits       yes: nothing is missing or left over"]
    return [*lines, "fits       no:", *(f"           {problem}" for problem in facts.problems)]


def _naming_style(raw: Mapping[str, Tensor]) -> str:
    if all(name in raw for name in ARCHIVE_EXTRAS):
        return "OpenAI's"
    return LAYOUTS[layout_of(raw)].owner


def _activation_problem(
    raw: Mapping[str, Tensor], released: Mapping[str, Tensor], path: Path
) -> str:
    try:
        check_activation(raw, released, path)
    except ValueError as error:
        return str(error)
    return ""


def _has_cross_encoder(weights: Mapping[str, Tensor]) -> bool:
    return any(key.startswith("cross.") for key in weights)


def _backbone_of(weights: Mapping[str, Tensor]) -> PairBackbone | None:
    """The backbone that takes the weights, without memory for its values."""
    try:
        with torch.device("meta"):
            return build_backbone(weights, 0, patch_kind(weights))
    except ValueError:
        return None


def _is_adapted(weights: Mapping[str, Tensor], backbone: PairBackbone) -> bool:
    """Whether the weights have tensors that only pairs need."""
    names = [name for name in backbone.state_dict() if backbone.part_of(name) == "pair"]
    return any(f"{backbone.key_prefix}.{name}" in weights for name in names)


def _try_to_build(weights: LoadedWeights) -> list[str]:
    """Build a model from the weights: why that is not possible, or [] if it is."""
    task = task_of(weights.tensors)
    is_tight = task == "retrieval" and _has_cross_encoder(weights.tensors)
    settings = ModelSettings(
        intra_num_hidden_layers=0,
        linear_patch=patch_kind(weights.tensors),
        decoder_config=_decoder_config(weights.tensors),
        sim_header="tight" if is_tight else "loose",
    )
    try:
        load_model(weights, task, settings)
    except WeightMismatch as error:
        return error.problems
    except ValueError as error:
        return [str(error)]
    return []


def _decoder_config(weights: Mapping[str, Tensor]) -> BertConfig:
    """The published captioner's config, with as many layers as the weights have."""
    prefix = "decoder.decoder.layer."
    numbers = {key.split(".")[3] for key in weights if key.startswith(prefix)}
    return load_decoder_config("decoder-base").with_layers(len(numbers) or None)


def _format_activation(facts: WeightsFacts) -> str:
    if facts.activation_problem:
        return f"not the one built here, or unknown: {facts.activation_problem}"
    return "quick GELU"


def _format_info(facts: WeightsFacts) -> str:
    if not facts.info:
        return "none: the number of single-image blocks and of a captioner's heads is unknown"
    values = ", ".join(
        f"{name} {value}" for name, value in facts.info.items() if name != "decoder_config"
    )
    return f"{facts.info_path}: {values}"
