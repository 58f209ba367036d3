"""TODO."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.model.clip import PAIR_KEYS, ClipSizes
from modules.weights.key_names import clip_tensors

log = logging.getLogger(__name__)

TIED_KEYS = {
    "decoder.embeddings.word_embeddings.weight": "clip.token_embedding.weight",
    "decoder.embeddings.position_embeddings.weight": "clip.positional_embedding",
    "decoder.classifier.cls.predictions.decoder.weight": "clip.token_embedding.weight",
}


class WeightMismatch(ValueError):
    """Weights that are not this model's: what is missing, left over or of another shape."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = problems
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        super().__init__(f"the weights do not fit this model: {problems[0]}{more}")


def resize_positions(weights: Mapping[str, Tensor], image_resolution: int) -> dict[str, Tensor]:
    """Released-name weights for images of another side: the position embeddings of an image, and of both halves of a pair, are
    interpolated over their grid (bicubic, antialiased); the class token's stay. ValueError where patches do not fill the side."""
    sizes = ClipSizes.from_weights(clip_tensors(weights))
    if image_resolution == sizes.image_resolution:
        return dict(weights)
    grid = (
        replace(sizes, image_resolution=image_resolution).image_resolution
        // sizes.vision_patch_size
    )
    log.info(
        "position embeddings resized from images of %d pixels to %d",
        sizes.image_resolution,
        image_resolution,
    )

    def resize(positions: Tensor) -> Tensor:  # (T, D)
        side = sizes.image_resolution // sizes.vision_patch_size
        patches = positions[1:].T.unflatten(1, (side, side))[None]  # (1, D, side, side)
        patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", antialias=True)
        return torch.cat([positions[:1], patches[0].flatten(1).T])

    resized = dict(weights)
    for name, images in (
        ("clip.visual.positional_embedding", 1),
        ("clip.visual.joint_positional_embedding", 2),
    ):
        if name in weights:
            if weights[name].ndim != 2 or len(weights[name]) != images * sizes.num_tokens:
                raise ValueError(
                    f"{name} has shape {tuple(weights[name].shape)}, expected {images * sizes.num_tokens} positions"
                )
            resized[name] = torch.cat([resize(half) for half in weights[name].chunk(images)])
    return resized


def drop_unused(weights: dict[str, Tensor], task: str, sim_header: str) -> dict[str, Tensor]:
    unwanted = [] if task == "caption" else ["decoder."]
    unwanted += [] if sim_header == "tight" else ["cross.", "similarity_dense."]
    for prefix in unwanted:
        count = sum(key.startswith(prefix) for key in weights)
        if count:
            log.warning(
                "%d tensors %s* are set aside: a %s model with a %s similarity has no use for them",
                count,
                prefix,
                task,
                sim_header,
            )
    return {key: value for key, value in weights.items() if not key.startswith(tuple(unwanted))}


def check_tied(weights: Mapping[str, Tensor]) -> None:
    for tied, original in TIED_KEYS.items():
        if (
            tied in weights
            and original in weights
            and not torch.equal(weights[tied], weights[original])
        ):
            raise ValueError(
                f"{tied} differs from {original}, but the two are one tensor in CLIP4IDC"
            )


def missing_groups(expected: Iterable[str], weights: Mapping[str, Tensor]) -> list[list[str]]:
    """The groups of expected keys that the weights may lack as a whole, and do lack."""
    groups = [
        [f"clip.visual.{key}" for key in PAIR_KEYS],
        [key for key in expected if key.startswith("decoder.") and key not in TIED_KEYS],
        [key for key in expected if key.startswith(("cross.", "similarity_dense."))],
    ]
    return [group for group in groups if group and not any(key in weights for key in group)]


def mismatches(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> list[str]:
    problems = [f"{key} is missing" for key in expected if key not in weights]
    for key, value in weights.items():
        if key not in expected:
            advice = (
                ": these weights were made with --linear_patch 3d"
                if key.endswith("conv2.weight")
                else ""
            )
            problems.append(f"{key} is unexpected{advice}")
        elif value.shape != expected[key].shape:
            problems.append(
                f"{key} has shape {tuple(value.shape)}, expected {tuple(expected[key].shape)}"
            )
    return problems


def list_keys(keys: list[str]) -> str:
    return ", ".join(keys) if len(keys) <= 5 else f"{keys[0]} … {keys[-1]} ({len(keys)} tensors)"
