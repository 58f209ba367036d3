"""report.html of an evaluation, one file with everything in it: scores, curves, pairs, options; a page for each stage."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from modules.report.pictures import fit_to_box, jpeg_uri
from modules.report.tables import format_score
from system.files import atomic_write

WIDTH, HEIGHT = 300, 150  # of a curve


@dataclass(frozen=True)
class Page:
    """What both stages' pages have: what was evaluated, scores by label, what they have to beat, history.csv, and name and value of
    all that made it, defaults apart."""

    title: str
    counts: str
    scores: Mapping[str, Mapping[str, float]]
    baselines: Sequence[tuple[str, Mapping[str, float]]]
    history: Path
    facts: Mapping[str, Any]
    defaults: Mapping[str, Any]

    def write(
        self, path: Path, template: str, digits: int, curves: Sequence[str], **more: Any
    ) -> None:
        """Fill a template: scores with `digits` decimals, `curves` by their columns of the history, `more` of the stage's own."""
        rows = [
            {"label": label, "scores": row, "baseline": False} for label, row in self.scores.items()
        ]
        rows += [{"label": label, "scores": row, "baseline": True} for label, row in self.baselines]
        environment = Environment(
            loader=FileSystemLoader(Path(__file__).parent / "templates"), autoescape=True
        )
        environment.filters["score"] = format_score
        text = environment.get_template(template).render(
            title=self.title,
            digits=digits,
            counts=self.counts,
            metrics=list(next(iter(self.scores.values()))),
            rows=rows,
            curves=_curves(self.history, curves),
            facts=self.facts,
            defaults=self.defaults,
            **more,
        )
        with atomic_write(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def image_sources(pair_id: str, before: str, after: str) -> dict[str, str]:
    """A pair's id, and its two images as data URIs that fit into the page's box."""
    return {
        "id": pair_id,
        "before": jpeg_uri(fit_to_box(before)),
        "after": jpeg_uri(fit_to_box(after)),
    }


def _curves(history: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Columns by epoch of a run's history.csv, where it has two epochs at least; a missing score is passed over."""
    if not history.is_file():
        return []
    table = pd.read_csv(history)
    curves = []
    for name in names:
        known = table.dropna(subset=name) if name in table else table[:0]
        if len(known) < 2:
            continue
        values, epochs = known[name].to_numpy(), known["epoch"].to_numpy()
        reach = (values.max() - values.min()) or 1.0
        points = " ".join(
            f"{WIDTH * n / (len(table) - 1):.1f},{HEIGHT * (1 - (value - values.min()) / reach):.1f}"
            for n, value in zip(known.index, values, strict=True)
        )
        curves.append(
            {
                "name": name,
                "points": points,
                "low": values.min(),
                "high": values.max(),
                "first": (epochs[0], values[0]),
                "last": (epochs[-1], values[-1]),
            }
        )
    return curves
