"""The page of an evaluation of captions: pairs that did best and worst, and where the model looked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.options.decoding import Decoding
from modules.predictor import Predictor
from modules.report.page import Page, image_sources
from modules.report.pictures import attention_panels, jpeg_uri

NUM_EXAMPLES = 2  # pairs that did best, and that did worst, in each group


@dataclass(frozen=True)
class ReportedPair:
    """A pair to be shown: its two images, what was generated, what people wrote, and its own CIDEr."""

    id: str
    before: str
    after: str
    caption: str
    references: Sequence[str]
    score: float


def best_and_worst(pairs: Sequence[ReportedPair]) -> list[tuple[str, list[ReportedPair]]]:
    """("best", …) and ("worst", …), no pair in both; ("first", …) where scores are missing."""
    if any(math.isnan(pair.score) for pair in pairs):
        return [("first", pairs[: 2 * NUM_EXAMPLES])]
    ranked = sorted(pairs, key=lambda pair: -pair.score)
    best = ranked[:NUM_EXAMPLES]
    return [
        ("best", best),
        ("worst", [pair for pair in ranked[::-1][:NUM_EXAMPLES] if pair not in best]),
    ]


def write_caption_page(
    path: Path,
    page: Page,
    groups: Mapping[str, Sequence[ReportedPair]],
    predictor: Predictor,
    decoding: Decoding,
) -> None:
    """Stage 2's page: of each group the pairs that did best and worst, with what the model looked at."""
    sections = [
        {
            "title": f"{name}: the {kind}",
            "pairs": [_pair_sources(pair, predictor, decoding) for pair in chosen],
        }
        for name, pairs in groups.items()
        for kind, chosen in best_and_worst(pairs)
        if chosen
    ]
    page.write(path, "captioning.html", 4, ("loss", "CIDEr"), sections=sections)


def _pair_sources(pair: ReportedPair, predictor: Predictor, decoding: Decoding) -> dict[str, Any]:
    cells = attention_panels(
        pair.before, pair.after, predictor.explain(pair.before, pair.after, decoding)
    )[1:]
    attention = [
        {"label": label, "before": jpeg_uri(images[0]), "after": jpeg_uri(images[1])}
        for label, images in cells
    ]
    return {**vars(pair), **image_sources(pair.id, pair.before, pair.after), "attention": attention}
