"""report.html of a captioning evaluation: one file with everything in it (scores, curves, pairs, attention, options)."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader
from PIL import Image

from dataloaders.images import to_tensor
from modules.files import written_at_once
from modules.predictor import Decoding, Predictor
from modules.visualization import SIDE, explanation_cells

SHOWN = 2  # pairs that did best, and that did worst, in each group
WIDTH, HEIGHT = 300, 150  # of a curve


@dataclass(frozen=True)
class Shown:
    """A pair to be shown: its two images, what was generated, what people wrote, and its own CIDEr."""

    id: str
    before: str
    after: str
    caption: str
    references: Sequence[str]
    score: float


def best_and_worst(pairs: Sequence[Shown]) -> list[tuple[str, list[Shown]]]:
    """("best", …) and ("worst", …), no pair in both."""
    ranked = sorted(pairs, key=lambda pair: -pair.score)
    best = ranked[:SHOWN]
    return [("best", best), ("worst", [pair for pair in ranked[::-1][:SHOWN] if pair not in best])]


def write_report(path: Path, counts: str, scores: Mapping[str, Mapping[str, float]],
                 baselines: Sequence[tuple[str, Mapping[str, float]]], groups: Mapping[str, Sequence[Shown]], predictor: Predictor,
                 decoding: Decoding, history: Path, facts: Sequence[tuple[str, Any]]) -> None:
    """Write the page. `scores` and `baselines` are by group or label, `groups` the pairs of each group that has a section."""
    rows = [{"label": label, "scores": row, "baseline": False} for label, row in scores.items()]
    rows += [{"label": label, "scores": row, "baseline": True} for label, row in baselines]
    sections = [{"title": f"{name}: the {kind}", "pairs": [_pair(pair, predictor, decoding) for pair in chosen]}
                for name, pairs in groups.items() for kind, chosen in best_and_worst(pairs) if chosen]
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    page = environment.get_template("report.html").render(
        counts=counts, metrics=list(next(iter(scores.values()))), rows=rows, sections=sections, curves=_curves(history),
        facts=facts)
    with written_at_once(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _pair(pair: Shown, predictor: Predictor, decoding: Decoding) -> dict[str, Any]:
    before, after = (_embedded(to_tensor(image, SIDE).permute(1, 2, 0).numpy()) for image in (pair.before, pair.after))
    cells = explanation_cells(pair.before, pair.after, predictor.explain(pair.before, pair.after, decoding))[1:]
    attention = [{"label": label, "before": _embedded(images[0]), "after": _embedded(images[1])} for label, images in cells]
    return {**vars(pair), "before": before, "after": after, "attention": attention}


def _embedded(image: np.ndarray) -> str:
    """An RGB array as a data URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _curves(history: Path) -> list[dict[str, Any]]:
    """Loss and CIDEr by epoch from a run's history.csv, where it has two epochs at least."""
    if not history.is_file():
        return []
    table = pd.read_csv(history)
    curves = []
    for name in ("loss", "CIDEr"):
        if name not in table or len(table) < 2:
            continue
        values = table[name].to_numpy()
        spread = (values.max() - values.min()) or 1.0
        points = " ".join(f"{WIDTH * n / (len(values) - 1):.1f},{HEIGHT * (1 - (value - values.min()) / spread):.1f}"
                          for n, value in enumerate(values))
        curves.append({"name": name, "points": points, "first": table["epoch"].iloc[0], "last": table["epoch"].iloc[-1],
                       "low": values.min(), "high": values.max()})
    return curves
