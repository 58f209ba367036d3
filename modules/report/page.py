"""report.html, one file that loads nothing from elsewhere: scores, curves, pairs, options."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from modules.report.curves import PLOT, make_curves
from modules.report.pictures import fit_to_box, jpeg_uri
from modules.report.tables import format_score
from system.files import atomic_write


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
        self,
        path: Path,
        template: str,
        digits: int,
        curves: Mapping[str, str],
        selection: str,
        **more: Any,
    ) -> None:
        """Fill a template with the page and with `more`.

        Scores get `digits` decimals; `curves` are columns of the history, and what they are called;
        `selection` is the column that chooses the best epoch.
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
            curves=make_curves(self.history, curves, selection),
            plot=PLOT,
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
