"""Greedy search: the most likely next token, one after another.

Dimensions: B pairs, S tokens of a pair, E their size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.generation.steps import OpenCaptions, StepModel
from modules.options.decoding import Decoding


@torch.no_grad()
def greedy_search(model: StepModel, pair_tokens: Tensor, max_words: int) -> Tensor:
    """(B, S, E) → ids (B, ≤ max_words), 0 after EOT."""
    captions = OpenCaptions(model, pair_tokens, max_words)
    while captions.is_open:
        captions.append(captions.next_logits().argmax(dim=-1))
    return captions.written_ids()[:, 0]


def generate_greedily(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    decoding: Decoding,
    pair_indices: Sequence[int],
) -> Tensor:
    """The decoding method `greedy`: (B, S, E) → ids (B, 1, ≤ max_words)."""
    return greedy_search(model, pair_tokens, max_words)[:, None]
