"""Decoding: greedy, beam search and sampling over a step function. Knows token ids, nothing of words or images.

The model offers `vocab_size`, `start_captions(pair_tokens, max_words, per_pair) -> state` and `next_word_logits(last_ids, state)
-> logits`, a new tensor each time; states drop pairs and reorder captions. `sot` and `eot` are the
ids that start and end a caption.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.generation.steps import PAD, StepModel

BLOCK = 256  # words


@torch.no_grad()
def sample(
    model: StepModel,
    pair_tokens: Tensor,
    draws: Tensor,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Tensor:
    """Words drawn by their probability: (B, S, E) and numbers in [0, 1) (B, n, max_words) → ids (B, n, ≤ max_words), 0 after EOT.

    Logits are divided by `temperature`; of the likeliest words just so many may be drawn that their probability reaches `top_p`
    (nucleus sampling, Holtzman et al. 2020). Each number decides one word, so that a caption depends on its own numbers alone.
    """
    sot, eot = model.sot, model.eot
    num_pairs, per_pair, max_words = draws.shape
    state = model.start_captions(pair_tokens, max_words, per_pair)
    ids = torch.full(draws.shape, PAD, dtype=torch.long, device=pair_tokens.device)
    running = torch.arange(num_pairs, device=pair_tokens.device)
    last = torch.full((num_pairs, per_pair), sot, device=pair_tokens.device)
    ended = torch.zeros_like(last, dtype=torch.bool)
    for position in range(max_words):
        last = _draw_words(
            model.next_word_logits(last, state), draws[running, :, position], temperature, top_p
        )
        ids[running, :, position] = last.masked_fill(ended, PAD)
        ended |= last == eot
        going_on = (~ended).any(dim=1).nonzero().flatten()
        if len(going_on) == 0:
            return ids[..., : position + 1]
        if len(going_on) < len(running):
            running, last, ended, state = (
                running[going_on],
                last[going_on],
                ended[going_on],
                state.select(going_on),
            )
    return ids


def _draw_words(logits: Tensor, numbers: Tensor, temperature: float, top_p: float) -> Tensor:
    """logits (…, V), which are used up, and numbers (…) in [0, 1) → words (…), of the likeliest that together reach top_p.

    Passes over a whole vocabulary cost more than the model here. So words are sorted only where it matters, and a word is
    looked for in blocks of words first, then in its block.
    """
    weights = logits.sub_(logits.amax(dim=-1, keepdim=True)).div_(temperature).exp_()
    if top_p < 1:
        weights, words = weights.sort(dim=-1, descending=True)
        # The likeliest always is allowed.
        weights = weights * (
            weights.cumsum(dim=-1) - weights < top_p * weights.sum(dim=-1, keepdim=True)
        )
    blocks = F.pad(weights, (0, -weights.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(dim=-1)
    block, rest = _inverse_cdf(sums, numbers[..., None].to(sums) * sums.sum(dim=-1, keepdim=True))
    inside, _ = _inverse_cdf(
        blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :], rest
    )
    drawn = block * BLOCK + inside
    return (drawn if top_p == 1 else words.gather(-1, drawn))[..., 0]


def _inverse_cdf(weights: Tensor, sought: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights (…, n) passes `sought` (…, 1), always at a weight above 0, and what is sought from there."""
    sums = weights.cumsum(dim=-1)
    index = torch.searchsorted(sums, sought, right=True)
    index = index.minimum((sums < sums[..., -1:]).sum(dim=-1, keepdim=True))  # sums are rounded
    return index, (sought - (sums - weights).gather(-1, index)).clamp(min=0)
