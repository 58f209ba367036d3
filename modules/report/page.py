"""report.html, one file that loads nothing from elsewhere: scores, curves, pairs, options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader

from modules.report.pictures import fit_to_box, jpeg_uri
from modules.report.tables import format_score
from system.files import atomic_write

# Of a curve, in pixels, without the margin around it.
WIDTH = 300
HEIGHT = 150
CURVE_MARGIN = 5


@dataclass(frozen=True)
class Page:
    """What the pages of both tasks have in common."""

    title: str
    summary: str  # what was evaluated
    scores: Mapping[str, Mapping[str, float]]  # by label
    baselines: Sequence[tuple[str, Mapping[str, float]]]  # what the scores should beat
    history: pd.DataFrame  # loss and scores of a training's epochs; may have no rows
    facts: Mapping[str, Any]  # what led to the scores
    defaults: Mapping[str, Any]  # options that were not given

    def write(
        self, path: Path, template: str, digits: int, curves: Sequence[str], **more: Any
    ) -> None:
        """Fill a template with the page and with `more`.

        Scores get `digits` decimals; `curves` are columns of the history.
        """
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True
        )
        environment.filters["score"] = format_score
        first_scores = next(iter(self.scores.values()))
        text = environment.get_template(template).render(
            title=self.title,
            digits=digits,
            summary=self.summary,
            metrics=list(first_scores),
            rows=self._make_rows(),
            curves=_make_curves(self.history, curves),
            curve_size=(WIDTH, HEIGHT),
            curve_box=(
                -CURVE_MARGIN,
                -CURVE_MARGIN,
                WIDTH + 2 * CURVE_MARGIN,
                HEIGHT + 2 * CURVE_MARGIN,
            ),
            facts=self.facts,
            defaults=self.defaults,
            **more,
        )
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8", errors="backslashreplace")

    def _make_rows(self) -> list[dict[str, Any]]:
        rows = [
            {"label": label, "scores": scores, "baseline": False}
            for label, scores in self.scores.items()
        ]
        for label, scores in self.baselines:
            rows.append({"label": label, "scores": scores, "baseline": True})
        return rows


def embed_pair(pair_id: str, before: str, after: str) -> dict[str, str]:
    """A pair's id, and its two images as data URIs that fit into the page's box."""
    return {
        "id": pair_id,
        "before": jpeg_uri(fit_to_box(before)),
        "after": jpeg_uri(fit_to_box(after)),
    }


def _make_curves(history: pd.DataFrame, names: Sequence[str]) -> list[dict[str, Any]]:
    """The columns of the history that have values in at least two epochs, as curves by epoch."""
    curves = []
    for name in names:
        known = history.dropna(subset=name) if name in history else history[:0]
        if len(known) >= 2:
            curves.append(_make_curve(name, known, len(history)))
    return curves


def _make_curve(name: str, known: pd.DataFrame, num_epochs: int) -> dict[str, Any]:
    values = known[name].to_numpy()
    epochs = known["epoch"].to_numpy()
    return {
        "name": name,
        "points": _make_svg_points(known.index, values, num_epochs),
        "low": values.min(),
        "high": values.max(),
        "first": (epochs[0], values[0]),
        "last": (epochs[-1], values[-1]),
    }


def _make_svg_points(rows: Sequence[int], values: np.ndarray, num_epochs: int) -> str:
    """x,y of each value, from the left to the right edge and from the lowest to the highest."""
    low = values.min()
    value_range = (values.max() - low) or 1.0
    points = []
    for row, value in zip(rows, values, strict=True):
        x = WIDTH * row / (num_epochs - 1)
        y = HEIGHT * (1 - (value - low) / value_range)
        points.append(f"{x:.1f},{y:.1f}")
    return " ".join(points)
