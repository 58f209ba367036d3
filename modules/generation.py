"""Decoding: greedy, beam search and sampling over a step function. Knows token ids, nothing of words or images.

The model offers `vocab_size`, `start_captions(pair_tokens, max_words, per_pair) -> state` and `next_word_logits(last_ids, state)
-> logits`, a new tensor each time; states drop pairs and reorder captions. For a vocabulary of V, SOT is V−2 and EOT is V−1
(CLIP: 49406, 49407).
"""

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

PAD = 0
BLOCK = 256  # words


class StepState(Protocol):
    """The captions in the making of some pairs, as many of each."""

    def keep(self, pairs: Tensor) -> "StepState": ...

    def follow(self, beams: Tensor) -> "StepState": ...


class StepModel(Protocol):
    """What decoding needs of a model."""

    vocab_size: int

    def start_captions(
        self, pair_tokens: Tensor, max_words: int, per_pair: int = 1
    ) -> StepState: ...

    def next_word_logits(self, ids: Tensor, state: StepState) -> Tensor: ...


@torch.no_grad()
def greedy_search(model: StepModel, pair_tokens: Tensor, max_words: int) -> Tensor:
    """The likeliest next token, again and again: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Pairs whose caption has ended leave the batch, and decoding stops when all have.
    """
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    state = model.start_captions(pair_tokens, max_words)
    ids = torch.full(
        (len(pair_tokens), max_words), PAD, dtype=torch.long, device=pair_tokens.device
    )
    running = torch.arange(len(pair_tokens), device=pair_tokens.device)
    last = torch.full_like(running, sot)
    for position in range(max_words):
        last = model.next_word_logits(last[:, None], state)[:, 0].argmax(dim=-1)
        ids[running, position] = last
        going_on = (last != eot).nonzero().flatten()
        if len(going_on) == 0:
            return ids[:, : position + 1]
        if len(going_on) < len(running):
            running, last, state = running[going_on], last[going_on], state.keep(going_on)
    return ids


@torch.no_grad()
def beam_search(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    beam_size: int,
    length_penalty: float = 0.0,
) -> Tensor:
    """Keeps the `beam_size` likeliest beginnings of each caption: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Captions are compared by log-probability / length**length_penalty, length counting EOT. All pairs and beams share one batch,
    which a pair leaves when no beginning can still beat its best caption.
    """
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    num_pairs, device, width = (
        len(pair_tokens),
        pair_tokens.device,
        min(beam_size, model.vocab_size),
    )
    state = model.start_captions(pair_tokens, max_words, beam_size)
    best_ids = torch.full((num_pairs, max_words), PAD, dtype=torch.long, device=device)
    best_scores = torch.full((num_pairs,), -torch.inf, device=device)
    running = torch.arange(num_pairs, device=device)
    ids = best_ids[:, None].repeat(1, beam_size, 1)  # (running, beams, words)
    last = torch.full((num_pairs, beam_size), sot, device=device)
    scores = torch.full((num_pairs, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams of a pair begin alike: only one may multiply
    for position in range(max_words):
        log_probs = model.next_word_logits(last, state).log_softmax(dim=-1)  # (running, beams, V)
        length_norm = (position + 1) ** length_penalty
        if (
            position == max_words - 1
        ):  # no room: the best beginning is taken as it stands, ended or not
            end_scores, end_words = log_probs.max(dim=-1)
        else:
            end_scores, end_words = log_probs[..., eot], torch.full_like(last, eot)
        end_scores, beam = ((scores + end_scores) / length_norm).max(
            dim=1
        )  # the best that stops here
        candidate = _row_of(ids, beam)
        candidate[:, position] = _row_of(end_words, beam)
        better = end_scores > best_scores[running]
        best_ids[running[better]], best_scores[running[better]] = (
            candidate[better],
            end_scores[better],
        )

        log_probs[..., eot] = -torch.inf
        likeliest = log_probs.topk(width, dim=-1)  # no beam can give more than all of the next ones
        scores, choice = (scores[..., None] + likeliest.values).flatten(1).topk(beam_size, dim=1)
        beams, last = choice // width, likeliest.indices.flatten(1).gather(1, choice)
        ids = ids.gather(1, beams[..., None].expand_as(ids))
        ids[..., position] = last
        # A running beam only gets less likely; the longest length is the kindest divisor it can still reach.
        hopeful = scores[:, 0] / max(length_norm, max_words**length_penalty) > best_scores[running]
        going_on = hopeful.nonzero().flatten()
        if len(going_on) == 0:
            break
        state = state.follow(beams)
        if len(going_on) < len(running):
            running, last, scores, ids = (
                running[going_on],
                last[going_on],
                scores[going_on],
                ids[going_on],
            )
            state = state.keep(going_on)
    return best_ids[:, : int((best_ids != PAD).any(dim=0).nonzero().max()) + 1]


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
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
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
                state.keep(going_on),
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
    block, rest = _passed(sums, numbers[..., None].to(sums) * sums.sum(dim=-1, keepdim=True))
    inside, _ = _passed(
        blocks.gather(-2, block[..., None].expand(*block.shape, BLOCK))[..., 0, :], rest
    )
    drawn = block * BLOCK + inside
    return (drawn if top_p == 1 else words.gather(-1, drawn))[..., 0]


def _passed(weights: Tensor, sought: Tensor) -> tuple[Tensor, Tensor]:
    """Where the running sum of weights (…, n) passes `sought` (…, 1), always at a weight above 0, and what is sought from there."""
    sums = weights.cumsum(dim=-1)
    index = torch.searchsorted(sums, sought, right=True)
    index = index.minimum((sums < sums[..., -1:]).sum(dim=-1, keepdim=True))  # sums are rounded
    return index, (sought - (sums - weights).gather(-1, index)).clamp(min=0)


def _row_of(rows: Tensor, which: Tensor) -> Tensor:
    """(B, beams, …) and one beam of each (B,) → (B, …)."""
    return rows[torch.arange(len(rows), device=rows.device), which]
