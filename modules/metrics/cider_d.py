"""CIDEr-D without Java (Vedantam et al. 2015), a sentence at a time: for baselines and as the reward of self-critical training.

Equal to pycocoevalcap's on sentences that are tokenised alike (`tests/test_cider.py`).
"""

import math
import multiprocessing
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor

from system.signals import ignore_signals_in_worker

MAX_NGRAM, SIGMA = 4, 6.0


WORD = re.compile(r"'?\w+(?:-\w+)*")


END_MARK = "(end)"  # no word: WORD never matches it


def ngrams(sentence: str) -> Counter:
    """Counts of a tokenised sentence's 1- to 4-grams."""
    words = sentence.split()
    return Counter(
        tuple(words[i : i + n]) for n in range(1, MAX_NGRAM + 1) for i in range(len(words) - n + 1)
    )


def bigram_count(counts: Counter) -> int:
    """What CIDEr-D takes for a sentence's length: its number of bigrams."""
    return sum(times for gram, times in counts.items() if len(gram) == 2)


class DocumentFrequencies:
    """The weight of an n-gram: log of all ids' number over that of the ids with it in a reference."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        documents = Counter(
            gram for texts in references.values() for gram in set().union(*map(ngrams, texts))
        )
        self.unseen = math.log(len(references))
        self.weights = {gram: self.unseen - math.log(count) for gram, count in documents.items()}

    def weight(self, gram: tuple[str, ...]) -> float:
        return self.weights.get(gram, self.unseen)

    def norms(self, counts: Counter) -> list[float]:
        """The lengths of a sentence's tf-idf vectors of 1- to 4-grams."""
        squares = [0.0] * MAX_NGRAM
        for gram, count in counts.items():
            squares[len(gram) - 1] += (count * self.weight(gram)) ** 2
        return [math.sqrt(square) for square in squares]


class CiderD:
    """Scores sentences against the tokenised references of their ids, by whose number n-grams are weighted."""

    def __init__(self, references: Mapping[str, Sequence[str]]) -> None:
        self.idf = DocumentFrequencies(references)
        counted = {text: ngrams(text) for texts in references.values() for text in texts}
        prepared = {
            text: (counts, self.idf.norms(counts), bigram_count(counts))
            for text, counts in counted.items()
        }
        self.references = {
            key: [prepared[text] for text in texts] for key, texts in references.items()
        }

    def score(self, key: str, sentence: str) -> float:
        """10 for a sentence that is all of its references, 0 for one that shares no n-gram with any."""
        counts = ngrams(sentence)
        norms, length = self.idf.norms(counts), bigram_count(counts)
        return (
            sum(
                self._likeness(counts, norms, length, *reference)
                for reference in self.references[key]
            )
            * 10
            / (MAX_NGRAM * len(self.references[key]))
        )

    def _likeness(
        self,
        counts: Counter,
        norms: list[float],
        length: int,
        wanted: Counter,
        wanted_norms: list[float],
        wanted_length: int,
    ) -> float:
        products = [0.0] * MAX_NGRAM
        for gram, count in counts.items():
            if gram in wanted:
                products[len(gram) - 1] += (
                    min(count, wanted[gram]) * wanted[gram] * self.idf.weight(gram) ** 2
                )
        cosines = sum(
            product / (norm * other)
            for product, norm, other in zip(products, norms, wanted_norms, strict=True)
            if product
        )
        return cosines * math.exp(-((length - wanted_length) ** 2) / (2 * SIGMA**2))


def words_only(sentence: str, ended: bool = True) -> str:
    """Lower-case words without punctuation, and a mark where the sentence ends: breaking off is then no way to a high score."""
    return " ".join([*WORD.findall(sentence.lower()), *([END_MARK] if ended else [])])


class CiderReward:
    """CIDEr-D of a batch's sentences against training captions, in `workers` processes, which end with it; 0: in this one."""

    def __init__(self, captions: Mapping[str, Sequence[str]], workers: int) -> None:
        references = {key: [words_only(text) for text in texts] for key, texts in captions.items()}
        self.workers = workers
        if workers:
            self._pool = ProcessPoolExecutor(
                workers, multiprocessing.get_context("spawn"), _open_worker, (references,)
            )
        else:
            self._scorer = CiderD(references)

    def __call__(self, keys: Sequence[str], sentences: Sequence[str]) -> list[float]:
        """The score of each sentence, given as `simple_tokens`, against the captions of its key."""
        if not self.workers:
            return [
                self._scorer.score(key, sentence)
                for key, sentence in zip(keys, sentences, strict=True)
            ]
        size = max(1, math.ceil(len(keys) / self.workers))
        return list(self._pool.map(_score_in_worker, keys, sentences, chunksize=size))


def _open_worker(references: Mapping[str, Sequence[str]]) -> None:
    global _worker_scorer  # a process has one for its life
    ignore_signals_in_worker()
    _worker_scorer = CiderD(references)


def _score_in_worker(key: str, sentence: str) -> float:
    return _worker_scorer.score(key, sentence)
