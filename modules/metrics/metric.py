"""What a caption metric is, and how metrics are put together into a scoring protocol.

A metric turns each caption into a row of numbers, and a sum of rows into scores. So the same rows
give the scores of all captions and of every draw of the bootstrap, and of any subset too, unless
the metric `depends_on_group`. CONTRIBUTING.md shows how to add one.

Dimensions: N captions, W numbers per row.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from dataloaders.pairs import ImagePair

Subsets = Mapping[str, Sequence[str]]
"""Name → caption ids."""


@dataclass(frozen=True)
class ScoringContext:
    """What a metric may need besides captions and references; each part may be empty."""

    pairs: Sequence[ImagePair] = ()
    no_change_phrases: Sequence[str] = ()
    """Sentences that say that nothing changed."""
    vocabulary: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Attribute → the words for its values."""
    train_captions: Sequence[str] = ()


class Metric(Protocol):
    """Scores that follow from one row of numbers per caption. What cannot be computed is NaN.

    `METRICS[name](context)` makes one. That should be quick: a program is started by `rows`.
    """

    names: tuple[str, ...]
    """Of its scores, such as ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")."""
    depends_on_group: bool = True
    """Whether a row depends on the other captions, as with CIDEr's document frequencies.

    If not, rows are computed once and not again for each subset.
    """
    fewest: int = 1
    """How many captions its scores need at least to mean anything; of fewer they are NaN."""

    def rows(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> np.ndarray:
        """Tokenized texts by id → (N, W), in the order of `captions`.

        Both have the same ids. Raises JavaError if a Java program fails.
        """

    def scores(self, total: np.ndarray, count: float) -> tuple[float, ...]:
        """A weighted sum of rows, (W,), whose weights add up to `count` → one score per name."""


class MeanMetric:
    """A metric whose scores are the means of what `rows` returns: one column per name."""

    names: tuple[str, ...] = ()

    def __init__(self, context: ScoringContext) -> None:
        self.context = context

    def scores(self, total: np.ndarray, count: float) -> tuple[float, ...]:
        """total (W,) / count: the means."""
        return tuple(float(value) for value in total / count)


Texts = Mapping[Hashable, Sequence[str]]
MetricTokenizer = Callable[[Texts, ScoringContext], dict[Hashable, list[str]]]


def _nothing_to_prepare() -> None:
    pass


class ScoringProtocol(NamedTuple):
    """How captions are tokenized, and which metrics score them."""

    tokenize: MetricTokenizer
    """(texts by key, context) → their tokens, joined by spaces, in the same order."""
    metrics: tuple[str, ...]
    """Names in `modules.registries.METRICS`; their order is that of the scores."""
    derived: Mapping[str, Callable[[Mapping[str, float]], float]] = {}
    """Scores made of other scores: name → a function of all scores before it."""
    selection: str | None = None
    """The score that chooses the best epoch and sorts the report's examples; None: the first."""
    prepare: Callable[[], None] = _nothing_to_prepare
    """Called before a training or scoring begins; raises OSError if a program is missing."""
