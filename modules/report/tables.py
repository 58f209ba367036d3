"""Scores as text, a missing one (NaN) said as such."""

import math
from collections.abc import Mapping, Sequence

from system.escaping import Lines, one_line

MISSING = "missing"


def format_score(value: float, digits: int = 4) -> str:
    """A number with that many decimals, or `missing`."""
    return MISSING if math.isnan(value) else f"{value:.{digits}f}"


def format_table(rows: Sequence[tuple[str, Mapping[str, float]]], digits: int = 4) -> Lines:
    """Rows of (label, scores) with the same score names, as aligned text; labels in one line each."""
    rows = [(one_line(label), scores) for label, scores in rows]
    names = list(rows[0][1])
    width = max(len(label) for label, _ in rows)
    lines = [" " * width + "".join(f"{name:>10}" for name in names)]
    for label, scores in rows:
        lines.append(
            f"{label:<{width}}"
            + "".join(f"{format_score(scores[name], digits):>10}" for name in names)
        )
    return Lines("\n".join(lines))
