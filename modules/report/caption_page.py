"""The report page of captions: the pairs that did best and worst, and where the model looked."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.model.explanation import Explanation
from modules.report.page import Page, embed_pair
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


def choose_best_and_worst(pairs: Sequence[ReportedPair]) -> list[tuple[str, list[ReportedPair]]]:
    """The pairs to show, under a heading each: best and worst, or all if there are few."""
    if any(math.isnan(pair.score) for pair in pairs):
        return [("first pairs", list(pairs[: 2 * NUM_EXAMPLES]))]
    ranked = sorted(pairs, key=lambda pair: -pair.score)
    if len(ranked) == 1:
        return [("the only pair", ranked)]
    if len(ranked) <= 2 * NUM_EXAMPLES:
        return [(f"all {len(ranked)} pairs, from the best to the worst", ranked)]
    from_worst = ranked[::-1]
    return [("best pairs", ranked[:NUM_EXAMPLES]), ("worst pairs", from_worst[:NUM_EXAMPLES])]


def choose_shown_pairs(groups: Mapping[str, Sequence[ReportedPair]]) -> list[ReportedPair]:
    """The pairs that the page shows, each once: those whose explanations it needs."""
    shown = {}
    for pairs in groups.values():
        for _, chosen in choose_best_and_worst(pairs):
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

    `explanations`: pair id → where the model looked, for `choose_shown_pairs` of the groups.
    """
    sections = []
    for name, pairs in groups.items():
        for heading, chosen in choose_best_and_worst(pairs):
            shown = [_fill_pair(pair, explanations[pair.id]) for pair in chosen]
            sections.append({"title": f"{name}: {heading}", "pairs": shown})
    page.write(
        path,
        template="captioning.html",
        digits=4,
        curves={"loss": "training loss", score_name: score_name},
        selection=score_name,
        sections=sections,
        score_name=score_name,
        no_maps=NO_MAPS,
    )


def _fill_pair(pair: ReportedPair, explanation: Explanation) -> dict[str, Any]:
    panels = attention_panels(pair.before, pair.after, explanation)
    attention = [
        {"label": label, "before": jpeg_uri(before), "after": jpeg_uri(after)}
        for label, (before, after) in panels[1:]  # the first is the pair itself
    ]
    return {
        **vars(pair),
        **embed_pair(pair.id, pair.before, pair.after),
        "attention": attention,
    }
