"""TODO."""

import torch
from torch import Tensor

from modules.generation.steps import PAD, StepModel


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
    sot, eot = model.sot, model.eot
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
        candidate = _select_beam(ids, beam)
        candidate[:, position] = _select_beam(end_words, beam)
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
        state = state.reorder(beams)
        if len(going_on) < len(running):
            running, last, scores, ids = (
                running[going_on],
                last[going_on],
                scores[going_on],
                ids[going_on],
            )
            state = state.select(going_on)
    return best_ids[:, : int((best_ids != PAD).any(dim=0).nonzero().max()) + 1]


def _select_beam(rows: Tensor, which: Tensor) -> Tensor:
    """(B, beams, …) and one beam of each (B,) → (B, …)."""
    return rows[torch.arange(len(rows), device=rows.device), which]
