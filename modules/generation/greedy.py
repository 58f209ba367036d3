"""TODO."""

import torch
from torch import Tensor

from modules.generation.steps import PAD, StepModel


@torch.no_grad()
def greedy_search(model: StepModel, pair_tokens: Tensor, max_words: int) -> Tensor:
    """The likeliest next token, again and again: (B, S, E) → ids (B, ≤ max_words), 0 after EOT.

    Pairs whose caption has ended leave the batch, and decoding stops when all have.
    """
    sot, eot = model.sot, model.eot
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
            running, last, state = running[going_on], last[going_on], state.select(going_on)
    return ids
