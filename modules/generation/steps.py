"""What decoding needs of a model, and the captions being written, which all methods share.

Dimensions: B pairs, of which O are open; n captions of each; S tokens of a pair, E their size;
L tokens of a caption; V vocabulary.
"""

from typing import Protocol

import torch
from torch import Tensor

from modules.tokenizer import PAD


class StepState(Protocol):
    """What a model keeps of the captions being written, n of each pair."""

    def select(self, pairs: Tensor) -> "StepState":
        """The state of these pairs (their positions) alone."""

    def reorder(self, parents: Tensor) -> "StepState":
        """parents (B, n): the caption of the same pair that each caption now continues."""


class StepModel(Protocol):
    """A model that writes captions token by token; CLIP4IDC is one."""

    vocab_size: int
    sot: int  # the id that starts a caption
    eot: int  # the id that ends one

    def start_captions(self, pair_tokens: Tensor, max_words: int, per_pair: int = 1) -> StepState:
        """pair_tokens (B, S, E) → the state before the first token of `per_pair` captions each."""

    def next_token_logits(self, ids: Tensor, state: StepState) -> Tensor:
        """The last token ids (B, n) → logits of the next, a new tensor (B, n, V).

        `state` moves on by one token.
        """


class OpenCaptions:
    """The captions of B pairs, n of each, while they are written.

    A pair is open until all its captions have ended. `rows` (O,) are the open pairs' positions in
    the batch. What a method computes for a token, such as logits, is of the open pairs alone, in
    this order. Only `close` removes pairs from the batch.
    """

    def __init__(
        self, model: StepModel, pair_tokens: Tensor, max_words: int, per_pair: int = 1
    ) -> None:
        """pair_tokens (B, S, E): the encoded pairs. A caption has at most `max_words` tokens."""
        shape = (len(pair_tokens), per_pair, max_words)
        device = pair_tokens.device
        self.model = model
        self.max_words = max_words
        self.length = 0  # tokens so far
        self.ids = torch.full(shape, PAD, dtype=torch.long, device=device)
        self.rows = torch.arange(len(pair_tokens), device=device)
        self.ended = torch.zeros(shape[:2], dtype=torch.bool, device=device)  # (O, n)
        self._last_ids = torch.full(shape[:2], model.sot, device=device)  # (O, n)
        self._state = model.start_captions(pair_tokens, max_words, per_pair)

    @property
    def is_open(self) -> bool:
        """Whether a caption can get another token."""
        return self.length < self.max_words and len(self.rows) > 0

    def next_logits(self) -> Tensor:
        """Logits (O, n, V) of the next token. Call it once per token."""
        return self.model.next_token_logits(self._last_ids, self._state)

    def append(self, next_ids: Tensor) -> None:
        """Write the next token (O, n) of each caption, and close pairs that have ended."""
        self.write(next_ids)
        self.close(self.ended.all(dim=1))

    def write(self, next_ids: Tensor) -> None:
        """Write the next token (O, n) of each caption. What comes after EOT is 0."""
        self.ids[self.rows, :, self.length] = next_ids.masked_fill(self.ended, PAD)
        self.ended = self.ended | (next_ids == self.model.eot)
        self._last_ids = next_ids
        self.length += 1

    def close(self, closed: Tensor) -> Tensor:
        """Leave out the pairs marked in (O,); returns the positions, among the O, of the others."""
        kept = (~closed).nonzero().flatten()
        if len(kept) < len(self.rows):
            self.rows = self.rows[kept]
            self.ended = self.ended[kept]
            self._last_ids = self._last_ids[kept]
            self._state = self._state.select(kept)
        return kept

    def reorder(self, parents: Tensor) -> None:
        """parents (O, n): the caption of the same pair that each caption now continues."""
        parents_of_tokens = parents[..., None].expand(-1, -1, self.max_words)
        self.ids[self.rows] = self.ids[self.rows].gather(1, parents_of_tokens)
        self.ended = self.ended.gather(1, parents)
        self._last_ids = self._last_ids.gather(1, parents)
        self._state = self._state.reorder(parents)

    def written_ids(self) -> Tensor:
        """The ids (B, n, L) of all captions, 0 after EOT; L is the length of the longest."""
        return self.ids[..., : self.length]


def count_tokens(ids: Tensor, eot: int) -> Tensor:
    """Captions (N, L) → how many tokens each has (N,), its EOT included.

    The ids after EOT do not count. A 0 before it does: it is a token of the vocabulary.
    """
    is_eot = ids == eot
    first_eot = is_eot.long().argmax(dim=1)
    return torch.where(is_eot.any(dim=1), first_eot + 1, ids.shape[1])


def shift_for_teacher_forcing(ids: Tensor, sot: int, eot: int) -> tuple[Tensor, Tensor]:
    """Finished captions (N, L) → the tokens that precede each position (N, L), and the mask (N, L).

    Ids are 0 after EOT. From these a model computes the logits of all tokens in one pass.
    """
    previous = ids.roll(1, dims=1)
    previous[:, 0] = sot
    positions = torch.arange(ids.shape[1], device=ids.device)
    mask = positions < count_tokens(ids, eot)[:, None]
    return previous, mask.long()
