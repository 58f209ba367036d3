"""Scores as aligned text, with a word for missing ones."""

import math
from collections.abc import Mapping, Sequence

from system.escaping import MultilineText, to_one_line

MISSING = "missing"
COLUMN_WIDTH = 10  # at least; longer names get wider columns


def format_score(value: float, digits: int = 4) -> str:
    """A number with that many decimals; MISSING for NaN."""
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def format_table(rows: Sequence[tuple[str, Mapping[str, float]]], digits: int = 4) -> MultilineText:
    """Rows of (label, scores) with the same score names, as aligned text, one line per row."""
    labels = [to_one_line(label) for label, _ in rows]
    label_width = max(map(len, labels))
    names = list(rows[0][1])
    widths = [max(COLUMN_WIDTH, len(name) + 1) for name in names]
    lines = [" " * label_width + _align(names, widths)]
    for label, (_, scores) in zip(labels, rows, strict=True):
        cells = [format_score(scores[name], digits) for name in names]
        lines.append(f"{label:<{label_width}}" + _align(cells, widths))
    return MultilineText("\n".join(lines))


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
