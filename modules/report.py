"""report.html of an evaluation, one file with everything in it: scores, curves, pairs, options; a page for each stage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from torch import Tensor

from dataloaders.pairs import Scene
from modules.files import written_at_once
from modules.predictor import Decoding, Predictor
from modules.retrieval import retrieval_ranks
from modules.tables import format_score
from modules.visualization import explanation_cells, fitted, jpeg_uri, spread

SHOWN = 2  # pairs that did best, and that did worst, in each group
QUERIES, NEAREST = 5, 5  # of retrieval, each way; what is shown for each
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
    """("best", …) and ("worst", …), no pair in both; ("first", …) where scores are missing."""
    if any(math.isnan(pair.score) for pair in pairs):
        return [("first", pairs[: 2 * SHOWN])]
    ranked = sorted(pairs, key=lambda pair: -pair.score)
    best = ranked[:SHOWN]
    return [("best", best), ("worst", [pair for pair in ranked[::-1][:SHOWN] if pair not in best])]


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
        with written_at_once(path) as temporary:
            temporary.write_text(text, encoding="utf-8")


def write_caption_report(
    path: Path,
    page: Page,
    groups: Mapping[str, Sequence[Shown]],
    predictor: Predictor,
    decoding: Decoding,
) -> None:
    """Stage 2's page: of each group the pairs that did best and worst, with what the model looked at."""
    sections = [
        {
            "title": f"{name}: the {kind}",
            "pairs": [_pair(pair, predictor, decoding) for pair in chosen],
        }
        for name, pairs in groups.items()
        for kind, chosen in best_and_worst(pairs)
        if chosen
    ]
    page.write(path, "captioning.html", 4, ("loss", "CIDEr"), sections=sections)


def write_retrieval_report(
    path: Path, page: Page, scenes: Sequence[Scene], similarity: Tensor
) -> None:
    """Stage 1's page, from the similarity (N_text, N_pair) of the scenes' sentences, scene by scene: queries both ways, spread
    evenly from the best found to the worst, with the NEAREST that were found."""
    ranks = retrieval_ranks(similarity, [len(scene.captions) for scene in scenes])
    texts = [(number, caption) for number, scene in enumerate(scenes) for caption in scene.captions]
    sentences, pairs = [], []
    for query in _spread(ranks["text_to_pair"]):
        number, caption = texts[query]
        near = similarity[query].topk(min(NEAREST, len(scenes)))
        found = [
            {**_images(scenes[n]), "similarity": value, "right": n == number}
            for value, n in zip(*(column.tolist() for column in near), strict=True)
        ]
        sentences.append(
            {
                "sentence": caption,
                "id": scenes[number].id,
                "rank": f"{ranks['text_to_pair'][query]:g}",
                "found": found,
            }
        )
    for query in _spread(ranks["pair_to_text"]):
        near = similarity[:, query].topk(min(NEAREST, len(texts)))
        found = [
            {"text": texts[n][1], "similarity": value, "right": texts[n][0] == query}
            for value, n in zip(*(column.tolist() for column in near), strict=True)
        ]
        pairs.append(
            {
                **_images(scenes[query]),
                "sentence": scenes[query].captions[0],
                "rank": f"{ranks['pair_to_text'][query]:g}",
                "found": found,
            }
        )
    page.write(
        path,
        "retrieval.html",
        1,
        ("loss", "text_to_pair_R1", "pair_to_text_R1"),
        sentences=sentences,
        pairs=pairs,
    )


def _spread(ranks: Tensor) -> list[int]:
    """Places of QUERIES ranks, evenly over the quantiles from the lowest to the highest."""
    order = ranks.argsort(stable=True).tolist()
    return [order[n] for n in spread(len(order), QUERIES)]


def _images(pair: Scene | Shown) -> dict[str, str]:
    return {
        "id": pair.id,
        "before": jpeg_uri(fitted(pair.before)),
        "after": jpeg_uri(fitted(pair.after)),
    }


def _pair(pair: Shown, predictor: Predictor, decoding: Decoding) -> dict[str, Any]:
    cells = explanation_cells(
        pair.before, pair.after, predictor.explain(pair.before, pair.after, decoding)
    )[1:]
    attention = [
        {"label": label, "before": jpeg_uri(images[0]), "after": jpeg_uri(images[1])}
        for label, images in cells
    ]
    return {**vars(pair), **_images(pair), "attention": attention}


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
