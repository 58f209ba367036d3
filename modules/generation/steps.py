"""TODO."""

from typing import Protocol

from torch import Tensor

PAD = 0


class StepState(Protocol):
    """The captions in the making of some pairs, as many of each."""

    def select(self, pairs: Tensor) -> "StepState": ...

    def reorder(self, beams: Tensor) -> "StepState": ...


class StepModel(Protocol):
    """What decoding needs of a model."""

    vocab_size: int
    sot: int
    eot: int

    def start_captions(
        self, pair_tokens: Tensor, max_words: int, per_pair: int = 1
    ) -> StepState: ...

    def next_word_logits(self, ids: Tensor, state: StepState) -> Tensor: ...
