"""CIDEr-D without Java (Vedantam et al. 2015), for baselines and as a reward in training.

Equal to pycocoevalcap's for sentences that are tokenized alike (`tests/test_cider.py`).
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from system.processes import start_pool

MAX_NGRAM = 4
SIGMA = 6.0  # of the length penalty, in bigrams
SCALE = 10  # the score of a sentence of four or more words that equals all of its references
WORD = re.compile(r"'?\w+(?:-\w+)*")
END_MARK = "(end)"  # WORD never matches it


def count_ngrams(sentence: str) -> Counter:
    """Counts of a tokenized sentence's 1- to MAX_NGRAM-grams."""
    words = sentence.split()
    counts: Counter = Counter()
    for n in range(1, MAX_NGRAM + 1):
        counts.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return counts


class Sentence(NamedTuple):
    """What CIDEr-D compares of a sentence."""

    counts: Counter
    """n-gram → how often it occurs."""
    norms: list[float]
    """Lengths of the tf-idf vectors of 1- to MAX_NGRAM-grams."""
    length: int
    """The number of bigrams, which CIDEr-D takes for the length."""


class IdfWeights:
    """The weight of an n-gram: log(number of ids / number of ids that have it in a reference)."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        documents: Counter = Counter()
        for texts in references.values():
            documents.update(set().union(*map(count_ngrams, texts)))
        self.unseen = math.log(len(references))
        self.weights = {}
        for ngram, count in documents.items():
            self.weights[ngram] = self.unseen - math.log(count)

    def weight(self, ngram: tuple[str, ...]) -> float:
        """The weight of an n-gram. One that no reference has weighs as if one id had it."""
        return self.weights.get(ngram, self.unseen)

    def weigh_sentence(self, text: str) -> Sentence:
        """A tokenized sentence, counted and weighted."""
        counts = count_ngrams(text)
        squares = [0.0] * MAX_NGRAM
        for ngram, count in counts.items():
            squares[len(ngram) - 1] += (count * self.weight(ngram)) ** 2
        norms = [math.sqrt(square) for square in squares]
        length = sum(count for ngram, count in counts.items() if len(ngram) == 2)
        return Sentence(counts, norms, length)


class CiderD:
    """Scores sentences against the tokenized references of their ids."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.idf = IdfWeights(references)
        distinct = {text for texts in references.values() for text in texts}
        prepared = {text: self.idf.weigh_sentence(text) for text in distinct}
        self.references: dict[str, list[Sentence]] = {}
        for key, texts in references.items():
            self.references[key] = [prepared[text] for text in texts]

    def score(self, key: str, text: str) -> float:
        """From 0, no n-gram in common, to SCALE, equal to all references of that id.

        A sentence of less than four words has no 4-grams, so it stays below SCALE.
        """
        sentence = self.idf.weigh_sentence(text)
        references = self.references[key]
        total = sum(self._similarity(sentence, reference) for reference in references)
        return total * SCALE / (MAX_NGRAM * len(references))

    def _similarity(self, sentence: Sentence, reference: Sentence) -> float:
        """The sum of the vectors' cosines, less if the lengths differ."""
        products = [0.0] * MAX_NGRAM
        for ngram, count in sentence.counts.items():
            times = reference.counts.get(ngram)
            if times:
                weight = self.idf.weight(ngram) ** 2
                products[len(ngram) - 1] += min(count, times) * times * weight
        cosines = 0.0
        for n, product in enumerate(products):
            if product:
                cosines += product / (sentence.norms[n] * reference.norms[n])
        difference = sentence.length - reference.length
        return cosines * math.exp(-(difference**2) / (2 * SIGMA**2))


def reward_tokens(sentence: str, ended: bool = True) -> str:
    """Lower-case words without punctuation, and END_MARK if the sentence has ended.

    The mark keeps a caption from scoring more by breaking off.
    """
    words = WORD.findall(sentence.lower())
    if ended:
        words.append(END_MARK)
    return " ".join(words)


class CiderReward:
    """CIDEr-D of a batch's sentences against training captions.

    Computed in `workers` processes, which live as long as this object; with 0, in this process.
    """

    def __init__(self, captions: Mapping[str, Sequence[str]], workers: int) -> None:
        references = {
            key: [reward_tokens(text) for text in texts] for key, texts in captions.items()
        }
        self.workers = workers
        if workers:
            self._pool = start_pool(workers, _open_worker, (references,), "spawn")
        else:
            self._scorer = CiderD(references)

    def __call__(self, keys: Sequence[str], sentences: Sequence[str]) -> list[float]:
        """The score of each sentence, made by `reward_tokens`, against the captions of its key."""
        if not self.workers:
            pairs = zip(keys, sentences, strict=True)
            return [self._scorer.score(key, sentence) for key, sentence in pairs]
        size = max(1, math.ceil(len(keys) / self.workers))
        return list(self._pool.map(_score_in_worker, keys, sentences, chunksize=size))


def _open_worker(references: Mapping[str, Sequence[str]]) -> None:
    global _worker_scorer  # a process has one, as long as it lives
    _worker_scorer = CiderD(references)


def _score_in_worker(key: str, sentence: str) -> float:
    return _worker_scorer.score(key, sentence)
