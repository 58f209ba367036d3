"""METEOR's table of paraphrases, cut down to the rows that some texts can need.

METEOR reads 5.3 million pairs of phrases at each start, which takes about ten seconds and 1 GB.
A pair matters only if all words of one phrase occur in a caption or reference, and all words of
the other one too. So a table of the pairs whose words all occur in the texts gives the same scores.

The table is read once per machine and kept, as numbers, in the cache folder: words, phrases made of
words, pairs made of phrases. From it the pairs for some texts are chosen within a second.
"""

import gzip
import logging
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import numpy as np

from system.files import READ_ERRORS, atomic_write, choose_cache_folder

log = logging.getLogger(__name__)

FORMAT_VERSION = 1  # of the cached file; increase it when its content changes
MAX_KEPT = 2  # cached files, for installations with different tables
BLOCK = 1 << 24  # bytes
LINES_PER_PAIR = 3  # a probability, which METEOR skips, and two phrases
LONGEST_WORD = 100  # letters; the longest in METEOR's table has 22
JAVA_WORD = re.compile(r"[^ \t\n\r\f]+")  # as Java's StringTokenizer splits
# Of a cached file, which is dispensable. A damaged header may ask for any amount of memory.
CACHE_ERRORS = (OSError, zipfile.BadZipFile, *READ_ERRORS)
LETTERS = re.compile("[0-9a-z]+")
# METEOR replaces the first by a dot; the two letters are not ASCII, but become so in lower case.
UNPREDICTABLE = re.compile("DOTMULTI|[\u0130\u212a]")


def possible_words(texts: Iterable[str]) -> set[str] | None:
    """Every word that METEOR can make of the texts, and more; None if it could be any word.

    METEOR's normalization puts spaces beside characters that are neither letters nor digits, and
    removes or replaces those characters: "u.s." becomes "us", "it's" becomes "it s". Words are
    given here without such characters, so that no rule has to be repeated: all runs of a-z and 0-9
    between spaces, and all neighboring runs joined.
    """
    found: set[str] = set()
    between_spaces = set()
    for text in texts:
        if UNPREDICTABLE.search(text):
            return None
        between_spaces.update(JAVA_WORD.findall(text))
    for word in between_spaces:
        runs = LETTERS.findall(word.lower())
        for first in range(len(runs)):
            found.update(_joined_prefixes(runs[first:]))
    return found


def _joined_prefixes(runs: Sequence[str]) -> Iterator[str]:
    """The first run, the first two as one word, and so on up to LONGEST_WORD."""
    word = ""
    for run in runs:
        word += run
        if len(word) > LONGEST_WORD:
            return
        yield word


def _bare(word: bytes) -> str:
    """A word of the table as `possible_words` has it; "", which every text has, if unsure."""
    letters = "".join(LETTERS.findall(word.decode(errors="replace").lower()))
    return letters if len(letters) <= LONGEST_WORD else ""


class ParaphraseTable:
    """The cached table. `bare_words` are its words without characters other than a-z and 0-9."""

    def __init__(self, file: Path) -> None:
        """Raises one of CACHE_ERRORS for a file that is missing or damaged."""
        self.file = file
        (words,) = self._load("words")
        self._words = words.tobytes().split(b"\n")
        self._bare = [_bare(word) for word in self._words]
        self.bare_words = frozenset(self._bare)

    def write(self, words: set[str], path: Path) -> None:
        """Write the pairs whose words are all in `words`, in their order, for METEOR's `-a`.

        Raises one of CACHE_ERRORS.
        """
        word_ids, lengths, left, right = self._load("word_ids", "lengths", "left", "right")
        is_known = np.array([not bare or bare in words for bare in self._bare])
        starts = np.cumsum(lengths, dtype=np.int64) - lengths
        is_usable = np.logical_and.reduceat(is_known[word_ids], starts)
        chosen = np.flatnonzero(is_usable[left] & is_usable[right])

        @cache
        def spell_phrase(index: int) -> bytes:
            ids = word_ids[starts[index] : starts[index] + lengths[index]]
            return b" ".join([self._words[word_id] for word_id in ids.tolist()])

        lines = []
        for one, other in zip(left[chosen].tolist(), right[chosen].tolist(), strict=True):
            lines.append(b"0\n%b\n%b\n" % (spell_phrase(one), spell_phrase(other)))
        with gzip.open(path, "wb", compresslevel=1) as file:
            file.write(b"".join(lines))

    def _load(self, *names: str) -> list[np.ndarray]:
        try:
            with np.load(self.file, allow_pickle=False) as arrays:
                return [arrays[name] for name in names]
        except CACHE_ERRORS:
            with suppress(OSError):
                self.file.unlink()  # so that the next start builds it again
            raise


def open_table(path: Path) -> ParaphraseTable | None:
    """The cached form of METEOR's table at `path`, built if it does not exist.

    None if the cache folder cannot be used, or the table is not as expected.
    """
    folder = choose_cache_folder(None) / "meteor"
    try:
        file = folder / f"paraphrases-{FORMAT_VERSION}-{_identify(path)}.npz"
        try:
            return ParaphraseTable(file)
        except CACHE_ERRORS:
            log.info("preparing METEOR's table of paraphrases, once for this machine: %s", file)
        with atomic_write(file) as temporary, open(temporary, "wb") as stream:
            _write_numbers(path, stream)
        _remove_old(folder)
        return ParaphraseTable(file)
    except CACHE_ERRORS as error:
        log.info("METEOR reads its whole table of paraphrases: %s", error)
        return None


def _identify(path: Path) -> str:
    """Identifies a gzip file by its size and its trailing checksum and length."""
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - 8))
        return f"{size}-{file.read().hex()}"


def _remove_old(folder: Path) -> None:
    files = sorted(folder.glob("paraphrases-*.npz"), key=lambda file: file.stat().st_mtime)
    for file in files[:-MAX_KEPT]:
        file.unlink(missing_ok=True)


def _make_index_assigner() -> defaultdict:
    """A dictionary that gives each new key the next index, from 0."""
    indices: defaultdict = defaultdict()
    indices.default_factory = indices.__len__
    return indices


def _write_numbers(path: Path, stream: BinaryIO) -> None:
    """METEOR's table as arrays. Raises ValueError for a table of another form."""
    phrases = _make_index_assigner()
    words = _make_index_assigner()
    left = []
    right = []
    for lines in _blocks_of_pairs(path):
        left.append(_to_array(phrases.__getitem__, lines[1::LINES_PER_PAIR]))
        right.append(_to_array(phrases.__getitem__, lines[2::LINES_PER_PAIR]))
    lengths = _to_array(lambda phrase: phrase.count(b" ") + 1, phrases, np.uint16)
    in_a_row = chain.from_iterable(phrase.split(b" ") for phrase in phrases)
    word_ids = _to_array(words.__getitem__, in_a_row)
    np.savez(
        stream,
        words=np.frombuffer(b"\n".join(words), np.uint8),
        word_ids=word_ids.astype(np.min_scalar_type(len(words))),
        lengths=lengths,
        left=np.concatenate(left),
        right=np.concatenate(right),
    )


def _to_array(
    number_of: Callable[[bytes], int], keys: Iterable[bytes], dtype: type = np.uint32
) -> np.ndarray:
    """(N keys,) `number_of` each key."""
    return np.fromiter(map(number_of, keys), dtype)


def _blocks_of_pairs(path: Path) -> Iterator[list[bytes]]:
    """The lines of the table, some whole pairs at a time."""
    rest = b""
    with gzip.open(path, "rb") as file:
        while block := file.read(BLOCK):
            if any(mark in block for mark in (b"\r", b"\t", b"\f")):
                raise ValueError(f"{path} has other separators than spaces and line feeds")
            lines = (rest + block).split(b"\n")
            count = (len(lines) - 1) // LINES_PER_PAIR * LINES_PER_PAIR
            rest = b"\n".join(lines[count:])
            yield lines[:count]
    if rest:
        raise ValueError(f"{path} ends within a pair")
