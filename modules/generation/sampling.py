"""Sampling: words drawn by their probability, each by a number of its own.

Dimensions: B pairs, n captions of each, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.generation.steps import OpenCaptions, StepModel
from modules.options.decoding import Decoding

BLOCK_SIZE = 256  # words


@torch.no_grad()
def sample(
    model: StepModel,
    pair_tokens: Tensor,
    uniforms: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """(B, S, E) and numbers in [0, 1) (B, n, max_words) → ids (B, n, ≤ max_words), 0 after EOT.

    Logits are divided by `temperature`. Only the most likely words that together reach the
    probability `top_p` may be drawn (nucleus sampling, Holtzman et al. 2020). Each number decides
    one word, so that a caption depends on its own numbers alone.
    """
    per_pair, max_words = uniforms.shape[1:]
    captions = OpenCaptions(model, pair_tokens, max_words, per_pair)
    while captions.open:
        numbers = uniforms[captions.rows, :, captions.length]
        captions.append(_draw_words(captions.next_logits(), numbers, temperature, top_p))
    return captions.finished()


def generate_by_sampling(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    decoding: Decoding,
    numbers: Sequence[int],
) -> Tensor:
    """The decoding method `sampling`: (B, S, E) → ids (B, num_captions, ≤ max_words)."""
    uniforms = draw_uniforms(decoding.seed, numbers, decoding.num_captions, max_words)
    temperature = 1.0 if decoding.temperature is None else decoding.temperature
    top_p = 1.0 if decoding.top_p is None else decoding.top_p
    return sample(model, pair_tokens, uniforms.to(pair_tokens.device), temperature, top_p)


def draw_uniforms(seed: int, numbers: Sequence[int], num_captions: int, max_words: int) -> Tensor:
    """Numbers in [0, 1) (B, num_captions, max_words); those of pair i follow from (seed, i) alone,
    where `numbers` are the pairs' i."""
    shape = (num_captions, max_words)
    sources = [np.random.default_rng([seed, number]) for number in numbers]
    return torch.from_numpy(np.stack([one.random(shape, dtype=np.float32) for one in sources]))


def _draw_words(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits (…, V), which are written over, and numbers (…) in [0, 1) → words (…).

    A pass over the whole vocabulary costs more than the model here. So words are sorted only if
    top_p needs it, and a word is searched for first among blocks of words and then in its block.
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    words = None
    if top_p < 1:
        weights, words = weights.sort(dim=-1, descending=True)
        before = weights.cumsum(dim=-1) - weights
        # The most likely word is always allowed: nothing stands before it.
        weights = weights * (before < top_p * weights.sum(dim=-1, keepdim=True))
    place = _draw_place(weights, numbers[..., None])
    return (place if words is None else words.gather(-1, place))[..., 0]


def _draw_place(weights: Tensor, numbers: Tensor) -> Tensor:
    """Weights (…, V) and numbers (…, 1) in [0, 1) → places (…, 1), drawn in proportion."""
    padding = -weights.shape[-1] % BLOCK_SIZE
    blocks = F.pad(weights, (0, padding)).unflatten(-1, (-1, BLOCK_SIZE))
    sums = blocks.sum(dim=-1)
    target = numbers.to(sums) * sums.sum(dim=-1, keepdim=True)
    block, rest = _inverse_cdf(sums, target)
    index = block[..., None].expand(*block.shape, BLOCK_SIZE)
    chosen = blocks.gather(-2, index)[..., 0, :]  # (…, BLOCK_SIZE)
    inside, _ = _inverse_cdf(chosen, rest)
    return block * BLOCK_SIZE + inside


def _inverse_cdf(weights: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights (…, K) passes `target` (…, 1), and what is left of it there.

    The place always has a weight above 0.
    """
    sums = weights.cumsum(dim=-1)
    index = torch.searchsorted(sums, target, right=True)
    # Rounding can leave the target above the last sum.
    last = (sums < sums[..., -1:]).sum(dim=-1, keepdim=True)
    index = index.minimum(last)
    return index, (target - (sums - weights).gather(-1, index)).clamp(min=0)
