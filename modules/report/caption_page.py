"""The report page of captions: the pairs that did best and worst, and where the model looked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.model.explanation import Explanation
from modules.report.page import Page, template_values
from modules.report.pictures import NO_MAPS, attention_panels, jpeg_uri

NUM_EXAMPLES = 2  # of the best pairs in each group, and of the worst


@dataclass(frozen=True)
class ReportedPair:
    """A pair with its caption, what people wrote, and the caption's score."""

    id: str
    before: str
    after: str
    caption: str
    references: Sequence[str]
    score: float


def best_and_worst(pairs: Sequence[ReportedPair]) -> list[tuple[str, list[ReportedPair]]]:
    """("best", …) and ("worst", …), no pair in both; ("first", …) where scores are missing."""
    if any(math.isnan(pair.score) for pair in pairs):
        return [("first", list(pairs[: 2 * NUM_EXAMPLES]))]
    ranked = sorted(pairs, key=lambda pair: -pair.score)
    best = ranked[:NUM_EXAMPLES]
    worst = [pair for pair in ranked[::-1][:NUM_EXAMPLES] if pair not in best]
    return [("best", best), ("worst", worst)]


def shown_pairs(groups: Mapping[str, Sequence[ReportedPair]]) -> list[ReportedPair]:
    """The pairs that the page shows, each once: those whose explanations it needs."""
    shown = {}
    for pairs in groups.values():
        for _, chosen in best_and_worst(pairs):
            shown.update({pair.id: pair for pair in chosen})
    return list(shown.values())


def write_caption_page(
    path: Path,
    page: Page,
    groups: Mapping[str, Sequence[ReportedPair]],
    explanations: Mapping[str, Explanation],
    score_name: str,
) -> None:
    """The best and worst pairs of each group by one score, and its curve over the epochs.

    `explanations` has those of the pairs shown, by their ids.
    """
    sections = []
    for name, pairs in groups.items():
        for kind, chosen in best_and_worst(pairs):
            if chosen:
                sources = [_template_values(pair, explanations[pair.id]) for pair in chosen]
                sections.append({"title": f"{name}: the {kind}", "pairs": sources})
    curves = ("loss", score_name)
    more = {"sections": sections, "score_name": score_name, "no_maps": NO_MAPS}
    page.write(path, "captioning.html", 4, curves, **more)


def _template_values(pair: ReportedPair, explanation: Explanation) -> dict[str, Any]:
    panels = attention_panels(pair.before, pair.after, explanation)
    attention = [
        {"label": label, "before": jpeg_uri(before), "after": jpeg_uri(after)}
        for label, (before, after) in panels[1:]  # the first is the pair itself
    ]
    return {
        **vars(pair),
        **template_values(pair.id, pair.before, pair.after),
        "attention": attention,
    }
