"""What a score should beat: one sentence for every pair, and random training captions.

The sentence is the training caption with the highest CIDEr on the evaluated references themselves.
No real system could choose it that way, so it is a strict bar (docs/deviations.md).
"""

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np

from modules.metrics.cider_d import MAX_NGRAM, SCALE, SIGMA, IdfWeights, Sentence

Caption = TypeVar("Caption")
Ngram = tuple[str, ...]


def best_constant(candidates: Sequence[str], references: Mapping[str, Sequence[str]]) -> str:
    """The tokenized candidate with the highest CIDEr when every id of the references gets it."""
    distinct = list(dict.fromkeys(candidates))
    return distinct[int(constant_cider(distinct, references).argmax())]


def random_captions(
    candidates: Sequence[Caption], ids: Sequence[str], seed: int = 0
) -> dict[str, Caption]:
    """One candidate per id, drawn with a fixed seed."""
    rng = random.Random(seed)
    return {key: rng.choice(candidates) for key in ids}


def constant_cider(
    candidates: Sequence[str], references: Mapping[str, Sequence[str]]
) -> np.ndarray:
    """(N candidates,) CIDEr of each tokenized candidate when every id of the references gets it.

    Exact, and quick: a candidate meets a reference only in products min(h, r) · r, where h is the
    count of an n-gram in the candidate and r in the reference. So for each n-gram and each h, all
    references add up to one vector over their lengths, and a score is a sum of such vectors.
    """
    idf = IdfWeights(references)
    weighted = _weigh(references, idf)
    max_length = max([1, *(sentence.length for sentence, _ in weighted)])
    sentences = [idf.weigh_sentence(candidate) for candidate in candidates]
    wanted: dict[int, set[Ngram]] = {}
    for sentence in sentences:
        for ngram, count in sentence.counts.items():
            if ngram in idf.weights:
                wanted.setdefault(count, set()).add(ngram)
    tables = {}
    for count, chosen in wanted.items():
        tables[count] = _sum_references(weighted, chosen, count, idf, max_length)
    lengths = np.arange(max_length + 1)
    return np.array([_constant_score(sentence, tables, lengths) for sentence in sentences])


def _weigh(
    references: Mapping[str, Sequence[str]], idf: IdfWeights
) -> list[tuple[Sentence, float]]:
    """Each reference, and its share in the mean over an id's references and over all ids."""
    weighted = []
    for texts in references.values():
        share = 1 / (len(texts) * len(references))
        weighted += [(idf.weigh_sentence(text), share) for text in texts]
    return weighted


def _sum_references(
    weighted: Sequence[tuple[Sentence, float]],
    chosen: set[Ngram],
    count: int,
    idf: IdfWeights,
    max_length: int,
) -> dict[Ngram, np.ndarray]:
    """n-gram → (max_length + 1,): by length, the sum of share · min(count, r) · r · idf² / |r|."""
    table = {ngram: np.zeros(max_length + 1) for ngram in chosen}
    for sentence, share in weighted:
        for ngram, times in sentence.counts.items():
            norm = sentence.norms[len(ngram) - 1]
            if ngram in table and norm > 0:
                weight = idf.weight(ngram) ** 2
                value = share * min(count, times) * times * weight / norm
                table[ngram][sentence.length] += value
    return table


def _constant_score(
    sentence: Sentence, tables: Mapping[int, Mapping[Ngram, np.ndarray]], lengths: np.ndarray
) -> float:
    by_length = np.zeros(len(lengths))
    for ngram, count in sentence.counts.items():
        norm = sentence.norms[len(ngram) - 1]
        if ngram in tables.get(count, {}) and norm > 0:
            by_length += tables[count][ngram] / norm
    penalty = np.exp(-((sentence.length - lengths) ** 2) / (2 * SIGMA**2))
    return SCALE * float(by_length @ penalty) / MAX_NGRAM
