"""BLEU, ROUGE-L and CIDEr by pycocoevalcap, and the protocol of published caption scores.

pycocoevalcap computes the numbers of a caption. BLEU's corpus score is computed here from their
sums, in the same order of operations, so that it has the same digits (`tests/test_scoring.py`).
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
from pycocoevalcap.bleu.bleu_scorer import cook_refs, cook_test
from pycocoevalcap.cider.cider import Cider as CiderScorer
from pycocoevalcap.rouge.rouge import Rouge

from modules.metrics.cider_d import MAX_NGRAM
from modules.metrics.metric import MeanMetric, ScoringContext, ScoringProtocol
from modules.metrics.ptb import tokenize
from system.java import ensure_java

# pycocoevalcap's guards against division by zero.
SMALL = 1e-9
TINY = 1e-15


class Bleu:
    """BLEU-1 to BLEU-4 with the closest reference's length (Papineni et al. 2002)."""

    names = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
    depends_on_group = False

    def __init__(self, context: ScoringContext) -> None:
        pass

    def rows(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> np.ndarray:
        """(N, 10): matched 1- to 4-grams, all 1- to 4-grams, own length, reference's length."""
        rows = [self._count(references[key], text) for key, text in captions.items()]
        return np.array(rows, float)

    @staticmethod
    def _count(references: Sequence[str], caption: str) -> list[int]:
        counts = cook_test(caption, cook_refs(references), eff="closest")
        return [*counts["correct"], *counts["guess"], counts["testlen"], counts["reflen"]]

    def scores(self, total: np.ndarray, count: float) -> tuple[float, ...]:
        """The scores of a corpus whose rows add up to total (10,)."""
        numbers = total.tolist()
        matched = numbers[:MAX_NGRAM]
        all_ngrams = numbers[MAX_NGRAM : 2 * MAX_NGRAM]
        length, reference_length = numbers[2 * MAX_NGRAM :]
        ratio = (length + TINY) / (reference_length + SMALL)
        penalty = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product = 1.0
        scores = []
        for n in range(MAX_NGRAM):
            product *= (matched[n] + TINY) / (all_ngrams[n] + SMALL)
            scores.append(product ** (1 / (n + 1)) * penalty)
        return tuple(scores)


class RougeL(MeanMetric):
    """ROUGE-L's F-measure (Lin 2004)."""

    names = ("ROUGE_L",)
    depends_on_group = False

    def rows(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> np.ndarray:
        """The F-measure of each caption, (N, 1)."""
        scorer = Rouge()
        values = [scorer.calc_score([text], references[key]) for key, text in captions.items()]
        return np.array(values)[:, None]


class Cider(MeanMetric):
    """CIDEr-D, its document frequencies from the group's references (Vedantam et al. 2015)."""

    names = ("CIDEr",)
    depends_on_group = True
    fewest = 2  # of one alone no word is rarer than another, and the score is always 0

    def rows(
        self, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]
    ) -> np.ndarray:
        """CIDEr-D of each caption, (N, 1)."""
        if not any(any(texts) for texts in references.values()):
            return np.zeros((len(captions), 1))  # no reference has a word
        candidates = {key: [text] for key, text in captions.items()}
        _, values = CiderScorer().compute_score(references, candidates)
        return values[:, None]


COCO_PROTOCOL = ScoringProtocol(
    tokenize=tokenize,
    metrics=("bleu", "meteor", "rouge_l", "cider"),
    selection="CIDEr",
    prepare=partial(ensure_java, "METEOR and the PTB tokenizer"),
)
