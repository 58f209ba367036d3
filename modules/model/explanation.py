"""TODO."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.generation.steps import PAD
from modules.tokenizer import decode, split_words


@dataclass(frozen=True)
class Caption:
    """A sentence and its score, the mean log-probability of its tokens, the end's included (0 is certainty)."""

    text: str
    score: float


@dataclass(frozen=True)
class Explanation:
    """A caption and where the model looked. A map's shares sum to 1 at most, over before and after together.

    `words` are the caption's and its end; `word_maps` (words, 2, grid, grid) are theirs, `class_maps` (2, 2, grid, grid) the class
    tokens' of before and of after. The second axis is before, after.
    """

    caption: Caption
    words: tuple[str, ...]
    class_maps: np.ndarray
    word_maps: np.ndarray


def explain_caption(ids: Tensor, score: Tensor, classes: Tensor, looks: Tensor) -> Explanation:
    """Of one caption: ids (L,), score (), shares of the pair's tokens from the class tokens (2, S) and from each word (L, S)."""
    row = [token for token in ids.tolist() if token != PAD]
    words = split_words(row)
    of_words = torch.stack([looks[places].mean(dim=0) for _, places in words])
    return Explanation(
        Caption(decode(row), score.item()),
        tuple(word for word, _ in words),
        _patch_maps(classes),
        _patch_maps(of_words),
    )


def _heads_mean(calls: list[Tensor]) -> Tensor:
    """The weights of a module that was called once, (B, H, S, K) → (B, S, K)."""
    (weights,) = calls
    return weights.mean(dim=1)


def _rollout(layers: Sequence[Tensor], tokens: Tensor, below: Tensor | None = None) -> Tensor:
    """What each place has of the places below the layers, (B, S, S) each, first layer first; `tokens` (B, S, E) are the places."""
    here = torch.eye(tokens.shape[1], device=tokens.device).expand(len(tokens), -1, -1)
    below = here if below is None else below
    for weights in layers:
        below = (weights + here) / 2 @ below
    return below


def _patch_maps(rows: Tensor) -> np.ndarray:
    """(R, 2T) shares of tokens → (R, 2, grid, grid): the patches of before and after, class tokens left out."""
    patches = rows.unflatten(1, (2, -1))[:, :, 1:]
    side = round(patches.shape[2] ** 0.5)
    return patches.unflatten(2, (side, side)).float().cpu().numpy()
