"""Tensor names: the layout of a file, and its names converted to the released ones.

The released names are CLIP4IDC's own: a backbone's prefix (`clip.`), `decoder.` or `cross.`, then
the tensor's name in that module. Each row of LAYOUTS is one way to name tensors.
"""

from collections.abc import Callable, Iterable, Mapping, Set
from typing import NamedTuple

from torch import Tensor

from modules.model.backbone import key_prefixes
from modules.weights.huggingface_names import from_huggingface, is_huggingface
from modules.weights.wrappings import unwrap_names

ARCHIVE_EXTRAS = ("input_resolution", "context_length", "vocab_size")  # only in OpenAI's archives


class Layout(NamedTuple):
    """A way to name tensors: whose it is, how it is recognized, how names become released ones."""

    owner: str
    matches: Callable[[Set[str]], bool]
    to_released: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]


def is_released(keys: Set[str]) -> bool:
    """Whether some names are CLIP4IDC's own."""
    return any(key.startswith((*key_prefixes(), "decoder.", "cross.")) for key in keys)


def is_openai(keys: Set[str]) -> bool:
    """Whether these are the names of OpenAI's and open_clip's CLIPs: ours without `clip.`."""
    return any(key.startswith("visual.") for key in keys)


def from_openai(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's names → released ones, without the numbers that only its archives hold."""
    return {f"clip.{key}": value for key, value in weights.items() if key not in ARCHIVE_EXTRAS}


LAYOUTS = {
    "huggingface": Layout("Hugging Face's", is_huggingface, from_huggingface),
    "released": Layout("CLIP4IDC's", is_released, dict),
    "openai": Layout("OpenAI's or open_clip's", is_openai, from_openai),
}


def has_captioner(keys: Iterable[str]) -> bool:
    """Whether some of the released names are a captioner's."""
    return any(key.startswith("decoder.") for key in keys)


def task_of(keys: Iterable[str]) -> str:
    """The task of a model of the weights with these released names."""
    return "caption" if has_captioner(keys) else "retrieval"


def layout_of(keys: Iterable[str]) -> str:
    """The first layout that matches the names, else "other"."""
    names = set(keys)
    return next((name for name, layout in LAYOUTS.items() if layout.matches(names)), "other")


def to_released(weights: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A layout's weights under the released names. Raises ValueError for wrong or missing names."""
    return LAYOUTS[layout].to_released(weights)


def to_released_float32(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under released or OpenAI's names → released names, float32.

    Raises ValueError for whole numbers, such as quantized weights.
    """
    renamed = from_openai(weights) if layout_of(weights) == "openai" else weights
    extras = {f"clip.{name}" for name in ARCHIVE_EXTRAS}
    kept = {key: value for key, value in renamed.items() if key not in extras}
    for key, value in kept.items():
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{key} is of the type {kind}: quantized weights are not read here")
    return {key: value.float() for key, value in kept.items()}


def strip_wrappers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights without prefixes of trainers (`wrappings`) and open_clip's `text.`."""
    weights = unwrap_names(weights, lambda names: layout_of(names) != "other")
    if "text.token_embedding.weight" in weights:
        weights = {key.removeprefix("text."): value for key, value in weights.items()}
    return weights


def patch_kind(weights: Mapping[str, Tensor]) -> str:
    """--linear_patch of weights under released names: "3d" if they have CLIP's conv2, else "2d"."""
    return "3d" if "clip.visual.conv2.weight" in weights else "2d"
