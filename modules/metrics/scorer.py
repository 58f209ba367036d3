"""Scores of captions by the metrics of a protocol, against references; NaN if one is missing."""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from dataloaders.pairs import ALL_PAIRS
from modules.metrics.metric import Metric, ScoringContext, ScoringProtocol, Subsets, Texts
from modules.registries import METRICS
from system.java import JavaError

log = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class FailureTracker:
    """Calls metrics during one evaluation. A metric whose Java program fails is skipped from then
    on, so a hanging program is waited for only once."""

    def __init__(self) -> None:
        self._failed: list[Metric] = []

    @property
    def has_failure(self) -> bool:
        """Whether a metric has failed so far."""
        return bool(self._failed)

    def call(self, metric: Metric, compute: Callable[[], Answer]) -> Answer | None:
        """What `compute` returns; None if the metric has failed, which is logged once."""
        if metric in self._failed:
            return None
        try:
            return compute()
        except JavaError as error:
            log.warning("%s is missing: %s", ", ".join(metric.names), error)
            self._failed.append(metric)
            return None


class MetricRows(NamedTuple):
    """What a metric computed of N captions."""

    metric: Metric
    rows: np.ndarray | None
    """(N, W); None if they are missing."""

    def select(self, indices: Sequence[int]) -> "MetricRows":
        """The rows of some captions."""
        return self if self.rows is None else MetricRows(self.metric, self.rows[indices])


@dataclass(frozen=True)
class GroupRows:
    """The rows of a group of N captions, from which the scores of any draw of them follow."""

    ids: Sequence[str]
    parts: Sequence[MetricRows]
    derived: Mapping[str, Callable[[Mapping[str, float]], float]]
    failures: FailureTracker

    def scores(self, weights: np.ndarray | None = None) -> dict[str, float]:
        """Score name → value. weights (N,): how often each caption counts; None: once."""
        scores: dict[str, float] = {}
        for metric, rows in self.parts:
            values = None if rows is None else self._compute(metric, rows, weights)
            if values is None:
                values = [math.nan] * len(metric.names)
            scores |= zip(metric.names, values, strict=True)
        for name, compute in self.derived.items():
            scores[name] = float(compute(scores))
        return scores

    def _compute(
        self, metric: Metric, rows: np.ndarray, weights: np.ndarray | None
    ) -> Sequence[float] | None:
        if weights is None:
            # numpy sums pairwise along a contiguous axis, as its mean does, so the digits agree.
            total = np.ascontiguousarray(rows.T).sum(axis=1)
            count = float(len(rows))
        else:
            total = weights @ rows
            count = float(weights.sum())
        values = self.failures.call(metric, lambda: metric.scores(total, count))
        if values is not None and len(values) != len(metric.names):
            raise ValueError(
                f"metric {', '.join(metric.names)}: {len(values)} scores, expected "
                f"{len(metric.names)}"
            )
        return values

    def scores_by_id(self, name: str) -> dict[str, float]:
        """Caption id → one score, from that caption's row alone."""
        group = self._restrict_to(name)
        scores = {}
        for index, key in enumerate(self.ids):
            parts = [part.select([index]) for part in group.parts]
            scores[key] = replace(group, ids=[key], parts=parts).scores()[name]
        return scores

    def _restrict_to(self, name: str) -> "GroupRows":
        """Only the metric that has this score, so that no other is computed; all if it is derived
        from others."""
        for part in self.parts:
            if name in part.metric.names:
                return replace(self, parts=[part], derived={})
        return self


@dataclass(frozen=True)
class ScoredCaptions:
    """One system's captions, with the rows that each metric of a scorer gives them."""

    scorer: "CaptionScorer"
    tokens: Mapping[str, str]
    """Caption id → tokens; empty if the captions could not be tokenized."""
    whole: GroupRows

    def groups(self, subsets: Subsets | None = None) -> dict[str, GroupRows]:
        """Name → rows: of all captions, and of each subset that has any of them."""
        groups = {ALL_PAIRS: self.whole}
        for name, members in (subsets or {}).items():
            ids = [key for key in members if key in self._indices]
            if ids:
                groups[name] = self._select(ids)
        return groups

    def scores(self, subsets: Subsets | None = None) -> dict[str, dict[str, float]]:
        """Group → score name → value."""
        return {name: group.scores() for name, group in self.groups(subsets).items()}

    def _select(self, ids: Sequence[str]) -> GroupRows:
        indices = [self._indices[key] for key in ids]
        parts = []
        for part in self.whole.parts:
            if part.rows is not None and getattr(part.metric, "depends_on_group", True):
                tokens = {key: self.tokens[key] for key in ids}
                parts.append(self.scorer.rows_of(part.metric, tokens, self.whole.failures))
            else:
                parts.append(part.select(indices))
        return replace(self.whole, ids=ids, parts=parts)

    @cached_property
    def _indices(self) -> dict[str, int]:
        return {key: index for index, key in enumerate(self.whole.ids)}


class CaptionScorer:
    """A protocol with the references of the ids that it scores.

    References and training captions are tokenized together with the first captions, in one call.
    Metrics may keep a program running until the scorer is gone, as METEOR does.
    """

    def __init__(
        self,
        references: Mapping[str, Sequence[str]],
        protocol: ScoringProtocol,
        context: ScoringContext | None = None,
    ) -> None:
        """Raises ValueError for metrics that are unknown, or do not fit together."""
        self.references = references
        self.protocol = protocol
        self.context = context or ScoringContext()
        self.metrics = [METRICS[name](self.context) for name in protocol.metrics]
        self.names = _name_scores(self.metrics, protocol)
        self.selection = protocol.selection or self.names[0]
        for metric in self.metrics:
            if len(references) < _fewest(metric):
                log.warning(
                    "%s is missing: of fewer than %d captions it means nothing",
                    ", ".join(metric.names),
                    _fewest(metric),
                )
        self.reference_tokens: dict[str, list[str]] = {}
        self.train_tokens: list[str] = []

    def tokenize(self, *systems: Mapping[str, str]) -> list[dict[str, str]]:
        """The tokens of each system's captions by id. Raises JavaError, and may be tried again."""
        parts = [{key: [text] for key, text in captions.items()} for captions in systems]
        if not self.reference_tokens:
            parts += [self.references, {"train": self.context.train_captions}]
        tokens = self._tokenize_together(parts)
        if not self.reference_tokens:
            self.reference_tokens, train_tokens = tokens[-2:]
            self.train_tokens = train_tokens["train"]
        own = tokens[: len(systems)]
        return [{key: texts[0] for key, texts in captions.items()} for captions in own]

    def _tokenize_together(self, parts: Sequence[Texts]) -> list[dict]:
        """The tokens of each part. An empty text between two parts keeps them apart.

        The PTB tokenizer looks ahead: "no." stays one token if the next line is a number.
        """
        texts = {}
        for index, part in enumerate(parts):
            texts |= {(index, key): sentences for key, sentences in part.items()}
            texts[index, None] = [""]
        tokens = self.protocol.tokenize(texts, self.context)
        return [{key: tokens[index, key] for key in part} for index, part in enumerate(parts)]

    def score(self, captions: Mapping[str, str]) -> ScoredCaptions:
        """Tokenize captions and compute their rows; a warning says what is missing."""
        try:
            (tokens,) = self.tokenize(captions)
        except JavaError as error:
            log.warning("all caption scores are missing: %s", error)
            parts = [MetricRows(metric, None) for metric in self.metrics]
            rows = GroupRows(list(captions), parts, self.protocol.derived, FailureTracker())
            return ScoredCaptions(self, {}, rows)
        return self.score_tokens(tokens)

    def score_tokens(
        self, tokens: Mapping[str, str], failures: FailureTracker | None = None
    ) -> ScoredCaptions:
        """The same for captions that are tokenized already; `tokenize` must have run before."""
        failures = failures or FailureTracker()
        parts = [self.rows_of(metric, tokens, failures) for metric in self.metrics]
        rows = GroupRows(list(tokens), parts, self.protocol.derived, failures)
        return ScoredCaptions(self, tokens, rows)

    def rows_of(
        self, metric: Metric, tokens: Mapping[str, str], failures: FailureTracker
    ) -> MetricRows:
        """A metric's rows of tokenized captions, missing if there are too few captions for it.

        Raises ValueError for rows of another shape.
        """
        if len(tokens) < _fewest(metric):
            return MetricRows(metric, None)
        references = {key: self.reference_tokens[key] for key in tokens}
        rows = failures.call(metric, lambda: metric.rows(references, tokens))
        if rows is not None:
            rows = np.asarray(rows, dtype=float)
            if rows.ndim != 2 or len(rows) != len(tokens):
                raise ValueError(
                    f"metric {', '.join(metric.names)}: rows has shape {rows.shape}, expected "
                    f"({len(tokens)}, numbers per caption)"
                )
        return MetricRows(metric, rows)


def _fewest(metric: Metric) -> int:
    return getattr(metric, "fewest", 1)


def _name_scores(metrics: Sequence[Metric], protocol: ScoringProtocol) -> list[str]:
    """The names of a protocol's scores, in order. Raises ValueError if two are alike."""
    names = [name for metric in metrics for name in metric.names] + list(protocol.derived)
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        raise ValueError(
            f"a scoring protocol needs scores of different names: {', '.join(names) or 'none'}"
        )
    if protocol.selection not in (None, *names):
        raise ValueError(f"{protocol.selection} is not one of the protocol's scores: {names}")
    return names
