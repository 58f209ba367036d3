"""Sampling: each token is drawn from the model's distribution with its own uniform number.

Dimensions: B pairs, n captions of each, S tokens of a pair, E their size, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from modules.generation.steps import OpenCaptions, StepModel
from modules.options.decoding import Decoding
from system.compute import allow_all_algorithms


@torch.no_grad()
def sample(
    model: StepModel,
    pair_tokens: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """(B, S, E) and uniforms in [0, 1) (B, n, max_words) → ids (B, n, ≤ max_words), 0 after EOT.

    Logits are divided by `temperature`. Only the most likely tokens that together reach the
    probability `top_p` may be drawn (nucleus sampling, Holtzman et al. 2020). Each uniform number
    decides one token, so that a caption depends on its own numbers alone.
    """
    per_pair, max_words = uniforms.shape[1:]
    captions = OpenCaptions(model, pair_tokens, max_words, per_pair)
    while captions.is_open:
        next_uniforms = uniforms[captions.rows, :, captions.length]
        next_ids = _draw_tokens(captions.next_logits(), next_uniforms, temperature, top_p)
        captions.append(next_ids)
    return captions.written_ids()


def generate_by_sampling(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    decoding: Decoding,
    pair_indices: Sequence[int],
) -> Tensor:
    """The decoding method `sampling`: (B, S, E) → ids (B, num_captions, ≤ max_words)."""
    uniforms = draw_uniforms(decoding.seed, pair_indices, decoding.num_captions, max_words)
    temperature = 1.0 if decoding.temperature is None else decoding.temperature
    top_p = 1.0 if decoding.top_p is None else decoding.top_p
    return sample(model, pair_tokens, uniforms.to(pair_tokens.device), temperature, top_p)


def draw_uniforms(
    seed: int, pair_indices: Sequence[int], num_captions: int, max_words: int
) -> Tensor:
    """Uniform numbers in [0, 1) (B, num_captions, max_words) for the pairs with these indices.

    Row i depends only on (seed, pair_indices[i]).
    """
    shape = (num_captions, max_words)
    uniforms = []
    for index in pair_indices:
        generator = np.random.default_rng([seed, index])
        uniforms.append(generator.random(shape, dtype=np.float32))
    return torch.from_numpy(np.stack(uniforms))


def _draw_tokens(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Logits (…, V), which are written over, and uniforms (…) in [0, 1) → token ids (…).

    The drawn token is the first at which the running sum of the probabilities passes the uniform
    number: in the order of the vocabulary, or the most likely first if `top_p` is below 1.
    """
    weights = logits.div_(temperature).softmax(dim=-1)
    if top_p >= 1:
        return _draw_index(weights, uniforms)
    weights, ids = weights.sort(dim=-1, descending=True)
    before = _running_sum(weights) - weights
    # The most likely token is always allowed: nothing stands before it.
    rank = _draw_index(weights * (before < top_p), uniforms)
    return ids.gather(-1, rank[..., None])[..., 0]


def _draw_index(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Weights (…, V) and uniforms (…) in [0, 1) → indices (…), drawn in proportion.

    The weight at the index is always above 0.
    """
    sums = _running_sum(weights)
    total = sums[..., -1:]
    # Rounding could make the product the total itself, which no running sum passes.
    below_total = total.nextafter(torch.zeros_like(total))
    target = (uniforms[..., None] * total).minimum(below_total)
    return torch.searchsorted(sums, target, right=True)[..., 0]


def _running_sum(weights: Tensor) -> Tensor:
    """The sums (…, V) up to and including each weight.

    --deterministic forbids cumsum on GPUs, because a single long row is summed in any order there.
    Many rows are not, as benchmarks/gpu.py checks.
    """
    with allow_all_algorithms():
        return weights.cumsum(dim=-1)
