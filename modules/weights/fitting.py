"""Makes weights fit a model: what may be absent is filled in, other mismatches are refused."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from modules.model.backbone import build_backbone, strip_prefix

log = logging.getLogger(__name__)

MAX_LISTED = 5  # names of tensors that a log line writes in full


class WeightMismatch(ValueError):
    """The weights belong to another model: `problems` says what does not fit."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"the weights do not fit this model: {problems[0]}{more}")


def fill_in_optional(
    weights: Mapping[str, Tensor],
    model_state: Mapping[str, Tensor],
    tied: Mapping[str, str],
    optional: Sequence[Sequence[str]],
) -> dict[str, Tensor]:
    """The weights, with the model's own tensors in place of those that may be absent.

    `tied` names each copy's original. Of each group in `optional`, weights have all tensors or
    none. Raises WeightMismatch, or ValueError for copies that differ from their originals.
    """
    _check_tied(weights, tied)
    filled = dict(weights)
    for copy, original in tied.items():
        filled.setdefault(copy, filled.get(original, model_state[original]))
    for group in missing_groups(weights, optional):
        filled.update({key: model_state[key] for key in group})
    problems = mismatches(filled, model_state)
    if problems:
        raise WeightMismatch(problems)
    return filled


def missing_groups(
    weights: Mapping[str, Tensor], optional: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    """The groups of which the weights have not a single tensor."""
    absent = []
    for group in optional:
        has_some = any(key in weights for key in group)
        if group and not has_some:
            absent.append(group)
    return absent


def mismatches(weights: Mapping[str, Tensor], model_state: Mapping[str, Tensor]) -> list[str]:
    """What is missing, unexpected or of a wrong shape, one line each; [] if the weights fit."""
    problems = [f"{key} is missing" for key in model_state if key not in weights]
    for key, value in weights.items():
        if key not in model_state:
            is_3d = key.endswith("conv2.weight")
            advice = ": these weights were made with --linear_patch 3d" if is_3d else ""
            problems.append(f"{key} is unexpected{advice}")
        elif value.shape != model_state[key].shape:
            expected = tuple(model_state[key].shape)
            problems.append(f"{key} has shape {tuple(value.shape)}, expected {expected}")
    return problems


def drop_unused(weights: Mapping[str, Tensor], task: str, sim_header: str) -> dict[str, Tensor]:
    """The weights without a captioner or cross encoder that the model does not have."""
    unused = () if task == "caption" else ("decoder.",)
    if sim_header != "tight":
        unused += ("cross.", "similarity_dense.")
    for prefix in unused:
        count = sum(key.startswith(prefix) for key in weights)
        if count:
            log.warning(
                "ignoring %d tensors %s*: not used by a %s model with a %s similarity",
                count,
                prefix,
                task,
                sim_header,
            )
    return {key: value for key, value in weights.items() if not key.startswith(unused)}


def resize_to_resolution(weights: Mapping[str, Tensor], image_resolution: int) -> dict[str, Tensor]:
    """Weights under released names, resized by their backbone for images of this side, in pixels.

    Raises ValueError if that is not possible.
    """
    with torch.device("meta"):
        backbone = build_backbone(weights, intra_layers=0, linear_patch="2d")
    if image_resolution == backbone.image_resolution:
        return dict(weights)
    prefix = backbone.key_prefix
    resized = backbone.resize_weights(strip_prefix(weights, prefix), image_resolution)
    merged = {f"{prefix}.{key}": value for key, value in resized.items()}
    others = {key: value for key, value in weights.items() if not key.startswith(f"{prefix}.")}
    return merged | others


def abbreviate_keys(keys: Sequence[str]) -> str:
    """A few names in full; of many, the first, the last and their number."""
    if len(keys) <= MAX_LISTED:
        return ", ".join(keys)
    return f"{keys[0]} … {keys[-1]} ({len(keys)} tensors)"


def _check_tied(weights: Mapping[str, Tensor], tied: Mapping[str, str]) -> None:
    for copy, original in tied.items():
        if not {copy, original} <= weights.keys():
            continue
        if not torch.equal(weights[copy], weights[original]):
            raise ValueError(f"{copy} must equal {original}: CLIP4IDC ties the two")
