"""From encoded pairs to token ids, by any registered decoding method.

Decoding methods see only token ids and a model that returns logits.

Dimensions: B pairs, S tokens of a pair, E their size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.generation.greedy import greedy_search
from modules.generation.steps import StepModel
from modules.options.decoding import Decoding
from modules.registries import DECODING_METHODS
from system.compute import check_finite

__all__ = ["generate", "greedy_search"]


@torch.no_grad()
def generate(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    decoding: Decoding,
    pair_indices: Sequence[int] | None = None,
) -> Tensor:
    """(B, S, E) → ids (B, decoding.num_captions, ≤ max_words), 0 after EOT.

    What is random in the captions of pair i follows from (decoding.seed, pair_indices[i]) alone, so
    that it does not depend on the batch. `pair_indices` are by default 0, 1, … Raises ValueError
    for settings that contradict each other, for tokens that are not finite, or if a method returns
    anything else.
    """
    name = decoding.method_name()
    check_finite(pair_tokens)
    method = DECODING_METHODS[name]
    if pair_indices is None:
        pair_indices = range(len(pair_tokens))
    if len(pair_indices) != len(pair_tokens):
        raise ValueError(f"{len(pair_indices)} pair_indices for {len(pair_tokens)} pairs")
    ids = method(model, pair_tokens, max_words, decoding, pair_indices)
    _check_ids(ids, name, (len(pair_tokens), decoding.num_captions, max_words))
    return ids


def _check_ids(ids: Tensor, method: str, expected: tuple[int, int, int]) -> None:
    num_pairs, num_captions, max_words = expected
    if not isinstance(ids, Tensor) or ids.dtype != torch.long:
        returned = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(
            f"decoding method {method} returned {returned}, expected token ids, torch.long"
        )
    shape = tuple(ids.shape)
    if shape[:2] != (num_pairs, num_captions) or len(shape) != 3 or not 1 <= shape[2] <= max_words:
        raise ValueError(
            f"decoding method {method} returned ids of shape {shape}, expected "
            f"({num_pairs} pairs, {num_captions} captions, 1 to {max_words} tokens)"
        )
