"""Decoding: greedy, beam search and sampling over a step function. Knows token ids, nothing of words or images.

The model offers `vocab_size`, `start_captions(pair_tokens, max_words, per_pair) -> state` and `next_word_logits(last_ids, state)
-> logits`; states drop pairs and reorder captions. For a vocabulary of V, SOT is V−2 and EOT is V−1 (CLIP: 49406, 49407).
"""

from typing import Protocol

import torch
from torch import Tensor

PAD = 0


class StepState(Protocol):
    """The captions in the making of some pairs, as many of each."""

    def keep(self, pairs: Tensor) -> "StepState": ...

    def follow(self, beams: Tensor) -> "StepState": ...


class StepModel(Protocol):
    """What decoding needs of a model."""

    vocab_size: int

    def start_captions(self, pair_tokens: Tensor, max_words: int, per_pair: int = 1) -> StepState: ...

    def next_word_logits(self, ids: Tensor, state: StepState) -> Tensor: ...


@torch.no_grad()
def greedy_search(model: StepModel, pair_tokens: Tensor, max_words: int) -> Tensor:
    """The likeliest next token, again and again: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Pairs whose caption has ended leave the batch, and decoding stops when all have.
    """
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    state = model.start_captions(pair_tokens, max_words)
    ids = torch.full((len(pair_tokens), max_words), PAD, dtype=torch.long, device=pair_tokens.device)
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
def beam_search(model: StepModel, pair_tokens: Tensor, max_words: int, beam_size: int, length_penalty: float = 0.0) -> Tensor:
    """Keeps the `beam_size` likeliest beginnings of each caption: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Captions are compared by log-probability / length**length_penalty, length counting EOT. All pairs and beams share one batch,
    which a pair leaves when no beginning can still beat its best caption.
    """
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    num_pairs, device, width = len(pair_tokens), pair_tokens.device, min(beam_size, model.vocab_size)
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
        if position == max_words - 1:  # no room: the best beginning is taken as it stands, ended or not
            end_scores, end_words = log_probs.max(dim=-1)
        else:
            end_scores, end_words = log_probs[..., eot], torch.full_like(last, eot)
        end_scores, beam = ((scores + end_scores) / length_norm).max(dim=1)  # the best that stops here
        candidate = _row_of(ids, beam)
        candidate[:, position] = _row_of(end_words, beam)
        better = end_scores > best_scores[running]
        best_ids[running[better]], best_scores[running[better]] = candidate[better], end_scores[better]

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
            running, last, scores, ids = running[going_on], last[going_on], scores[going_on], ids[going_on]
            state = state.keep(going_on)
    return best_ids[:, : int((best_ids != PAD).any(dim=0).nonzero().max()) + 1]


@torch.no_grad()
def sample(model: StepModel, pair_tokens: Tensor, draws: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    """Words drawn by their probability: (B, S, E) and numbers in [0, 1) (B, n, max_words) → ids (B, n, ≤ max_words), 0 after EOT.

    Logits are divided by `temperature`; of the likeliest words just so many may be drawn that their probability reaches `top_p`
    (nucleus sampling, Holtzman et al. 2020). Each number decides one word, so that a caption depends on its own numbers alone.
    """
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    num_pairs, per_pair, max_words = draws.shape
    state = model.start_captions(pair_tokens, max_words, per_pair)
    ids = torch.full(draws.shape, PAD, dtype=torch.long, device=pair_tokens.device)
    last = torch.full((num_pairs, per_pair), sot, device=pair_tokens.device)
    running = torch.ones_like(last, dtype=torch.bool)
    for position in range(max_words):
        probs = (model.next_word_logits(last, state) / temperature).softmax(dim=-1)
        last = _draw_words(probs, draws[..., position], top_p)
        ids[..., position] = last.where(running, PAD)
        running = running & (last != eot)
        if not running.any():
            return ids[..., : position + 1]
    return ids


def _draw_words(probs: Tensor, numbers: Tensor, top_p: float) -> Tensor:
    """probs (…, V) and numbers (…) in [0, 1) → words (…), of the likeliest that together reach top_p.

    Sorted by likelihood only where it matters: sorting a vocabulary costs more than all else here.
    """
    if top_p < 1:
        probs, words = probs.sort(dim=-1, descending=True)
        probs = probs * (probs.cumsum(dim=-1) - probs < top_p)  # the likeliest always is allowed
    reached = probs.cumsum(dim=-1)
    all_of_it = reached[..., -1:]
    drawn = torch.searchsorted(reached, numbers[..., None].to(reached) * all_of_it, right=True)
    drawn = drawn.minimum((reached < all_of_it).sum(dim=-1, keepdim=True))  # a number may be rounded up to 1
    return (drawn if top_p == 1 else words.gather(-1, drawn))[..., 0]


def _row_of(rows: Tensor, which: Tensor) -> Tensor:
    """(B, beams, …) and one beam of each (B,) → (B, …)."""
    return rows[torch.arange(len(rows), device=rows.device), which]
