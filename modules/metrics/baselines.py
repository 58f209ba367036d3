"""What a score has to beat: the best constant caption (an oracle) and random training captions (docs/deviations.md)."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from modules.metrics.cider_d import MAX_NGRAM, SIGMA, DocumentFrequencies, bigram_count, ngrams


def constant_cider(candidates: Sequence[str], references: Mapping[str, list[str]]) -> np.ndarray:
    """CIDEr of each tokenised candidate when every id of the tokenised references gets it as its caption.

    Exact: clipping min(h, r)·r depends on a candidate through the n-gram and its count alone, so that all references add up to
    one vector over lengths for each (n-gram, count), and a candidate's score is a sum of such vectors.
    """
    idf = DocumentFrequencies(references)
    prepared, max_length = [], 1
    for texts in references.values():
        for text in texts:
            counts = ngrams(text)
            length = bigram_count(counts)
            max_length = max(max_length, length)
            prepared.append((counts, idf.norms(counts), length, 1 / (len(texts) * len(references))))
    tables: dict[int, dict[tuple, np.ndarray]] = {}
    grams_by_count: dict[int, set] = {}
    candidate_counts = [ngrams(candidate) for candidate in candidates]
    for counts in candidate_counts:
        for gram, count in counts.items():
            if gram in idf.weights:
                grams_by_count.setdefault(count, set()).add(gram)
    for count, wanted in grams_by_count.items():
        tables[count] = _reference_table(prepared, wanted, count, idf, max_length)
    lengths = np.arange(max_length + 1)
    return np.array([_constant_score(counts, tables, idf, lengths) for counts in candidate_counts])


def _reference_table(
    prepared: list, wanted: set, count: int, idf: DocumentFrequencies, max_length: int
) -> dict[tuple, np.ndarray]:
    """For each n-gram: Σ over references of min(count, r)·r·idf²/|r|, sorted by the reference's length."""
    table = {gram: np.zeros(max_length + 1) for gram in wanted}
    for counts, norms, length, share in prepared:
        for gram, times in counts.items():
            norm = norms[len(gram) - 1]
            if gram in table and norm > 0:
                table[gram][length] += (
                    share * min(count, times) * times * idf.weight(gram) ** 2 / norm
                )
    return table


def _constant_score(
    counts: Counter, tables: Mapping, idf: DocumentFrequencies, lengths: np.ndarray
) -> float:
    norms, length = idf.norms(counts), bigram_count(counts)
    by_length = np.zeros(len(lengths))
    for gram, times in counts.items():
        if gram in idf.weights and norms[len(gram) - 1] > 0:
            by_length += tables[times][gram] / norms[len(gram) - 1]
    penalty = np.exp(-((length - lengths) ** 2) / (2 * SIGMA**2))
    return 10 * float(by_length @ penalty) / MAX_NGRAM


def best_constant(candidates: Sequence[str], references: Mapping[str, list[str]]) -> str:
    """The tokenised training caption with the highest CIDEr on the references: an oracle, and so a strict bar."""
    distinct = list(dict.fromkeys(candidates))
    return distinct[int(constant_cider(distinct, references).argmax())]


def random_captions(candidates: Sequence[str], ids: Sequence[str], seed: int = 0) -> dict[str, str]:
    """One training caption for each id, drawn with a fixed seed."""
    draw = random.Random(seed)
    return {key: draw.choice(candidates) for key in ids}
