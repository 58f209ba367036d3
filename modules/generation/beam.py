"""Beam search: several partial captions of each pair, of which the most likely are continued.

Dimensions: B pairs, of which O are open; n beams of each; S tokens of a pair, E their size;
V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from modules.generation.steps import OpenCaptions, StepModel, count_tokens
from modules.options.decoding import Decoding
from modules.tokenizer import PAD


@torch.no_grad()
def beam_search(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    beam_size: int,
    length_penalty: float = 0.0,
) -> Tensor:
    """(B, S, E) → the ids (B, ≤ max_words) of the best caption found, 0 after EOT.

    Captions are compared by log-probability / length ** length_penalty, where length counts EOT.
    All pairs and beams share one batch. A pair leaves it once none of its beams can still beat its
    best caption.
    """
    beams = Beams(OpenCaptions(model, pair_tokens, max_words, beam_size), length_penalty)
    while beams.captions.is_open:
        log_probs = beams.captions.next_logits().log_softmax(dim=-1)
        beams.record_best(log_probs)
        beams.extend(log_probs)
    return _trim(beams.best_ids, model.eot)


class Beams:
    """The beams of open captions, and the best whole caption of each pair so far."""

    def __init__(self, captions: OpenCaptions, length_penalty: float) -> None:
        num_pairs, beam_size, max_words = captions.ids.shape
        device = captions.ids.device
        self.captions = captions
        self.length_penalty = length_penalty
        self.best_ids = torch.full((num_pairs, max_words), PAD, device=device)
        self.best_scores = torch.full((num_pairs,), -torch.inf, device=device)
        # All beams of a pair begin alike, so only one of them may be continued at first.
        self.scores = torch.full((num_pairs, beam_size), -torch.inf, device=device)  # (O, n)
        self.scores[:, 0] = 0.0

    def record_best(self, log_probs: Tensor) -> None:
        """Keep the best caption that ends with the next token if it beats the best so far."""
        captions = self.captions
        end_scores, end_ids = self._endings(log_probs)
        totals = (self.scores + end_scores) / self._length_divisor(captions.length + 1)
        scores, beam = totals.max(dim=1)  # (O,)
        ids = _select_beam(captions.ids[captions.rows], beam)
        ids[:, captions.length] = _select_beam(end_ids, beam)
        better = scores > self.best_scores[captions.rows]
        rows = captions.rows[better]
        self.best_ids[rows] = ids[better]
        self.best_scores[rows] = scores[better]

    def extend(self, log_probs: Tensor) -> None:
        """Continue the most likely partial captions of pairs that can still find a better caption.

        Writes over `log_probs` (O, n, V).
        """
        scores, parents, next_ids = self._continuations(log_probs)
        # A partial caption only gets less likely. Dividing by the largest possible divisor gives an
        # upper bound on its score.
        divisor = max(
            self._length_divisor(self.captions.length + 1),
            self._length_divisor(self.captions.max_words),
        )
        promising = scores[:, 0] / divisor > self.best_scores[self.captions.rows]
        kept = self.captions.close(~promising)
        self.scores = scores[kept]
        self.captions.reorder(parents[kept])
        self.captions.write(next_ids[kept])

    def _endings(self, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """For each beam the log-probability and the id (O, n) of the token that ends it."""
        if self.captions.length == self.captions.max_words - 1:
            # No token can follow: the most likely one is taken, whether it is EOT or not.
            ends = log_probs.max(dim=-1)
            return ends.values, ends.indices
        eot = self.captions.model.eot
        scores = log_probs[..., eot]
        return scores, torch.full_like(scores, eot, dtype=torch.long)

    def _continuations(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best n partial captions of each pair with a next token other than EOT, best first.

        Returns their scores, the beams that they continue, and their next tokens, (O, n) each.
        """
        beam_size = self.scores.shape[1]
        log_probs[..., self.captions.model.eot] = -torch.inf
        # One beam can supply at most `width` of the best n.
        width = min(beam_size, log_probs.shape[-1])
        top = log_probs.topk(width, dim=-1)
        totals = (self.scores[..., None] + top.values).flatten(1)  # (O, n · width)
        scores, indices = totals.topk(beam_size, dim=1)
        return scores, indices // width, top.indices.flatten(1).gather(1, indices)

    def _length_divisor(self, length: int) -> float:
        return float(length) ** self.length_penalty


def generate_by_beam_search(
    model: StepModel,
    pair_tokens: Tensor,
    max_words: int,
    decoding: Decoding,
    pair_indices: Sequence[int],
) -> Tensor:
    """The decoding method `beam`: (B, S, E) → ids (B, 1, ≤ max_words)."""
    ids = beam_search(model, pair_tokens, max_words, decoding.beam_size, decoding.length_penalty)
    return ids[:, None]


def _select_beam(values: Tensor, beam: Tensor) -> Tensor:
    """(O, n, …) and one beam of each pair (O,) → (O, …)."""
    rows = torch.arange(len(values), device=values.device)
    return values[rows, beam]


def _trim(ids: Tensor, eot: int) -> Tensor:
    """(B, L) without the columns after the end of the longest caption."""
    lengths = count_tokens(ids, eot).tolist()
    return ids[:, : max(lengths, default=1)]
