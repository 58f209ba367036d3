"""The nearest right word to a wrong one, for messages."""

import difflib
from collections.abc import Iterable

LEAST_LIKENESS = 0.6  # difflib's ratio, below which two words have little in common


def suggest(word: str, words: Iterable[str]) -> str:
    """`; did you mean "X"?`, with the word that looks most like the given one; "" if none does."""
    nearest = find_nearest(word, words)
    return f'; did you mean "{nearest}"?' if nearest else ""


def find_nearest(word: str, words: Iterable[str]) -> str | None:
    """The word that looks most like the given one; None if none does."""
    by_folded = {_fold(known): known for known in words}
    found = difflib.get_close_matches(_fold(word), by_folded, n=1, cutoff=LEAST_LIKENESS)
    return by_folded[found[0]] if found else None


def _fold(word: str) -> str:
    """A word in small letters, without the difference between hyphens and underscores."""
    return word.lower().replace("_", "-")
