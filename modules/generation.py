"""Decoding: greedy and beam search over a step function. Knows token ids, nothing of words or images.

The model offers `vocab_size`, `start_captions(pair_tokens, max_words) -> state` with `state.select(rows)`, and
`next_word_logits(last_ids, state) -> logits`. For a vocabulary of V, SOT is V−2 and EOT is V−1 (CLIP: 49406, 49407).
"""

from typing import Protocol

import torch
from torch import Tensor

PAD = 0


class StepState(Protocol):
    """Captions in the making; rows can be dropped or reordered."""

    def select(self, rows: Tensor) -> "StepState": ...


class StepModel(Protocol):
    """What decoding needs of a model."""

    vocab_size: int

    def start_captions(self, pair_tokens: Tensor, max_words: int) -> StepState: ...

    def next_word_logits(self, ids: Tensor, state: StepState) -> Tensor: ...


@torch.inference_mode()
def greedy_search(model: StepModel, pair_tokens: Tensor, max_words: int) -> Tensor:
    """The likeliest next token, again and again: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Rows that have ended leave the batch, and decoding stops when all have.
    """
    sot, eot = model.vocab_size - 2, model.vocab_size - 1
    state = model.start_captions(pair_tokens, max_words)
    ids = torch.full((len(pair_tokens), max_words), PAD, dtype=torch.long, device=pair_tokens.device)
    running = torch.arange(len(pair_tokens), device=pair_tokens.device)
    last = torch.full_like(running, sot)
    for position in range(max_words):
        last = model.next_word_logits(last, state).argmax(dim=-1)
        ids[running, position] = last
        going_on = (last != eot).nonzero().flatten()
        if len(going_on) == 0:
            return ids[:, : position + 1]
        if len(going_on) < len(running):
            running, last, state = running[going_on], last[going_on], state.select(going_on)
    return ids


@torch.inference_mode()
def beam_search(model: StepModel, pair_tokens: Tensor, max_words: int, beam_size: int, length_penalty: float = 0.0) -> Tensor:
    """Keeps the `beam_size` likeliest beginnings of each caption: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Captions are compared by log-probability / length**length_penalty, length counting EOT. All pairs and beams share one batch.
    """
    sot, eot, vocabulary = model.vocab_size - 2, model.vocab_size - 1, model.vocab_size
    num_pairs, device = len(pair_tokens), pair_tokens.device
    first_beam = torch.arange(num_pairs, device=device).repeat_interleave(beam_size)
    state = model.start_captions(pair_tokens, max_words).select(first_beam)
    ids = torch.full((num_pairs, beam_size, max_words), PAD, dtype=torch.long, device=device)
    scores = torch.full((num_pairs, beam_size), -torch.inf, device=device)
    scores[:, 0] = 0.0  # all beams of a pair begin alike: only one may multiply
    best_ids, best_scores = ids[:, 0].clone(), torch.full((num_pairs,), -torch.inf, device=device)
    last = torch.full((num_pairs * beam_size,), sot, device=device)
    for position in range(max_words):
        log_probs = model.next_word_logits(last, state).float().log_softmax(dim=-1).unflatten(0, (num_pairs, beam_size))
        total = scores[..., None] + log_probs  # (B, beams, V)
        length_norm = (position + 1) ** length_penalty

        ended_scores, ended_beam = (total[..., eot] / length_norm).max(dim=1)  # the best that stops here
        if position == max_words - 1:  # no room: the best beginning is taken as it stands, ended or not
            ended_scores, flat = (total / length_norm).flatten(1).max(dim=1)
            ended_beam, ended_word = flat // vocabulary, flat % vocabulary
        else:
            ended_word = torch.full_like(ended_beam, eot)
        candidate = ids[torch.arange(num_pairs, device=device), ended_beam].clone()
        candidate[:, position] = ended_word
        better = ended_scores > best_scores
        best_ids = torch.where(better[:, None], candidate, best_ids)
        best_scores = torch.where(better, ended_scores, best_scores)

        total[..., eot] = -torch.inf
        scores, flat = total.flatten(1).topk(beam_size, dim=1)
        beam, word = flat // vocabulary, flat % vocabulary
        ids = ids.gather(1, beam[..., None].expand_as(ids)).clone()
        ids[..., position] = word
        # A running beam only gets less likely; the longest length is the kindest divisor it can still reach.
        if (scores[:, 0] / max(length_norm, max_words**length_penalty) <= best_scores).all():
            break
        rows = (beam + beam_size * torch.arange(num_pairs, device=device)[:, None]).flatten()
        last, state = word.flatten(), state.select(rows)
    return best_ids[:, : int((best_ids != PAD).any(dim=0).nonzero().max()) + 1]
