"""How sure a caption score is: percentile bootstrap over the scored pairs, alone and for two systems on the same draws.

Every metric is brought into sums over pairs, from which the score of any draw of pairs follows as the metric defines it for a
corpus: BLEU from its n-gram counts and lengths, METEOR from its alignment statistics, ROUGE-L and CIDEr as means. CIDEr's document
frequencies stay those of the whole group that is drawn from.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from modules.metrics.meteor import STATISTICS
from modules.metrics.scorer import SCORE_NAMES, CaptionScorer
from system.java import JavaError

log = logging.getLogger(__name__)

MAX_NGRAM = 4


BLEU_SMALL, BLEU_TINY = 1e-9, 1e-15  # BLEU's guards against division by zero, pycocoevalcap's own


METEOR_CHUNKS = 20  # place of the number of chunks among METEOR 1.5's statistics


LEVEL = 95  # per cent


@dataclass
class Statistics:
    """What each of N pairs gives to the scores of one system, in the order of `ids`."""

    ids: list[str]
    bleu: (
        np.ndarray
    )  # (N, 10): correct and guessed 1- to 4-grams, length, closest reference's length
    meteor: np.ndarray  # (N, STATISTICS): METEOR's own, NaN where it failed
    means: np.ndarray  # (N, 2): ROUGE-L, CIDEr
    references: CaptionScorer

    @classmethod
    def of(cls, references: CaptionScorer, tokens: Mapping[str, str]) -> "Statistics":
        """Of tokenised captions by id, against references that hold all of these ids."""
        from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test

        truth = {key: references.tokens[key] for key in tokens}
        captions = {key: [caption] for key, caption in tokens.items()}
        bleu = []
        for key, caption in tokens.items():
            cooked = cook_test(caption, cook_refs(truth[key]))
            closest = min((abs(length - cooked["testlen"]), length) for length in cooked["reflen"])[
                1
            ]
            bleu.append([*cooked["correct"], *cooked["guess"], cooked["testlen"], closest])
        try:
            alignment = np.array(references.meteor.statistics(truth, tokens))
        except JavaError as error:
            log.warning("METEOR is missing: %s", error)
            alignment = np.full((len(tokens), STATISTICS), np.nan)
        alignment[_single_chunk(alignment), METEOR_CHUNKS] = (
            0  # as METEOR does before it adds up a corpus
        )
        means = [
            scorer.compute_score(truth, captions)[1]
            for scorer in (references.rouge, references.cider)
        ]
        return cls(
            list(tokens),
            np.array(bleu, dtype=float),
            alignment,
            np.stack(means, axis=1),
            references,
        )

    def scores(self, counts: np.ndarray) -> dict[str, float]:
        """All metrics of a draw in which pair i occurs counts[i] times."""
        correct, guessed, (length, wanted) = np.split(
            counts @ self.bleu, [MAX_NGRAM, 2 * MAX_NGRAM]
        )
        precision = np.cumprod((correct + BLEU_TINY) / (guessed + BLEU_SMALL)) ** (
            1 / np.arange(1, MAX_NGRAM + 1)
        )
        ratio = (length + BLEU_TINY) / (wanted + BLEU_SMALL)
        bleu = precision * (np.exp(1 - 1 / ratio) if ratio < 1 else 1)
        rouge, cider = counts @ self.means / counts.sum()
        return dict(
            zip(
                SCORE_NAMES,
                map(float, (*bleu, self._meteor(counts @ self.meteor), rouge, cider)),
                strict=True,
            )
        )

    def _meteor(self, sums: np.ndarray) -> float:
        """METEOR of summed statistics, by METEOR itself; once it has failed, missing for good."""
        if np.isnan(sums).any():
            return math.nan
        try:
            return self.references.meteor.score_of(sums)
        except JavaError as error:
            log.warning("METEOR is missing: %s", error)
            self.meteor[:] = np.nan
            return math.nan


def _single_chunk(alignment: np.ndarray) -> np.ndarray:
    """Captions that are one chunk with a reference: lengths of both, matched lengths of both, chunks."""
    length, reference, matched, reference_matched = alignment[:, [0, 1, 21, 22]].T
    return (
        (length == matched) & (reference == reference_matched) & (alignment[:, METEOR_CHUNKS] == 1)
    )


def bootstrap(systems: Sequence[Statistics], draws: int, seed: int) -> list[dict[str, np.ndarray]]:
    """For each system the scores (draws,) of each metric, all systems on the same draws. They must have the same ids."""
    if any(system.ids != systems[0].ids for system in systems):
        raise ValueError("the systems caption different pairs")
    generator, size = np.random.default_rng(seed), len(systems[0].ids)
    rows: list[list[dict[str, float]]] = [[] for _ in systems]
    for _ in range(draws):
        counts = np.bincount(generator.integers(size, size=size), minlength=size).astype(float)
        for row, system in zip(rows, systems, strict=True):
            row.append(system.scores(counts))
    return [
        {name: np.array([scores[name] for scores in row]) for name in SCORE_NAMES} for row in rows
    ]


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 per cent; NaN where a value is missing."""
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided: twice the smaller share of draws on either side of 0, the observed data counting as one more on each; NaN where a
    draw's is missing."""
    if np.isnan(differences).any():
        return math.nan
    differences = np.round(
        differences, 9
    )  # BLEU's guards make zeros that differ in their last digits
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (float(beyond) + 1) / (len(differences) + 1))
