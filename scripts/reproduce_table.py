"""The table of scripts/reproduce.py: our scores beside the printed ones."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pandas as pd

from scripts.compare import format_mean_and_deviation
from scripts.reproduce_plan import ADAPTATION, FINETUNING, Dataset, Training

# A training's test scores; None if it is not finished.
ReadScores = Callable[[Training], dict[str, Any] | None]


class Score(NamedTuple):
    """A score of the table: the stage that it belongs to, its name in metrics.json and in print."""

    stage: str
    name: str
    title: str
    digits: int


SCORES = (
    Score(ADAPTATION, "text_to_pair_R1", "text → pair, R@1", 1),
    Score(ADAPTATION, "text_to_pair_R5", "text → pair, R@5", 1),
    Score(ADAPTATION, "text_to_pair_R10", "text → pair, R@10", 1),
    Score(ADAPTATION, "pair_to_text_R1", "pair → text, R@1", 1),
    Score(ADAPTATION, "pair_to_text_R5", "pair → text, R@5", 1),
    Score(ADAPTATION, "pair_to_text_R10", "pair → text, R@10", 1),
    Score(FINETUNING, "Bleu_4", "BLEU-4", 4),
    Score(FINETUNING, "METEOR", "METEOR", 4),
    Score(FINETUNING, "ROUGE_L", "ROUGE-L", 4),
    Score(FINETUNING, "CIDEr", "CIDEr", 4),
)

# Dataset → score → its value in the published code's README.
# Retrieval on Spot-the-Diff is not printed there.
PRINTED = {
    "spot": {"Bleu_4": 0.1160, "METEOR": 0.1419, "ROUGE_L": 0.3502, "CIDEr": 0.4735},
    "clevr": {
        "text_to_pair_R1": 26.8,
        "text_to_pair_R5": 58.7,
        "text_to_pair_R10": 70.0,
        "pair_to_text_R1": 46.4,
        "pair_to_text_R5": 83.0,
        "pair_to_text_R10": 86.6,
        "Bleu_4": 0.5687,
        "METEOR": 0.3840,
        "ROUGE_L": 0.7643,
        "CIDEr": 1.5075,
    },
}
# The same README's scores of other finetunings: seeds 42, 44, 100, 225, 800, 1024, 2048 and 6666.
PRINTED_SEEDS = {
    "clevr": {
        "Bleu_4": (0.5350, 0.5476, 0.5321, 0.5285, 0.5652, 0.5530, 0.5460, 0.5565),
        "METEOR": (0.4002, 0.4059, 0.3793, 0.3784, 0.3816, 0.3921, 0.3849, 0.3916),
        "ROUGE_L": (0.7212, 0.7224, 0.7578, 0.7492, 0.7600, 0.7535, 0.7605, 0.7644),
        "CIDEr": (1.3352, 1.3123, 1.4669, 1.4177, 1.4629, 1.3939, 1.4750, 1.4917),
    }
}
EXPLANATION = """\
printed: in the README of the published code, whose epochs were chosen on the test split.
ours: scores on the test split, mean ± standard deviation over the seeds."""
REHEARSAL = """\
**A rehearsal on drawn scenes, with a tiny model that starts from random weights.**
**Our numbers show only that every step runs. They say nothing about the printed ones.**"""


def collect_scores(trainings: Iterable[Training], read_scores: ReadScores) -> pd.DataFrame:
    """A line for each finished training and score: seed, choice, stage, score, value."""
    lines = []
    for training in trainings:
        found = read_scores(training) or {}
        for score in SCORES:
            if score.stage == training.stage and found.get(score.name) is not None:
                lines.append((*training, score.name, found[score.name]))
    return pd.DataFrame(lines, columns=["seed", "choice", "stage", "score", "value"])


def format_table(
    dataset: Dataset, choices: Iterable[str], scores: pd.DataFrame, is_small: bool
) -> str:
    """Markdown: a row for each score, with the printed value and our mean ± deviation."""
    printed = PRINTED[dataset.name]
    printed_seeds = PRINTED_SEEDS.get(dataset.name)
    headings = [dataset.title, "printed"]
    if printed_seeds:
        headings.append("printed, eight other seeds")
    headings += [f"ours, epoch by {choice}" for choice in choices]
    rows = [headings]
    for score in SCORES:
        value = printed.get(score.name)
        cells = [score.title, "–" if value is None else f"{value:.{score.digits}f}"]
        if printed_seeds:
            cells.append(_summarize(printed_seeds.get(score.name, ()), score))
        for choice in choices:
            is_here = (scores["score"] == score.name) & (scores["choice"] == choice)
            cells.append(_summarize_ours(scores.loc[is_here, "value"], score))
        rows.append(cells)
    parts = [REHEARSAL] if is_small else []
    return "\n\n".join([*parts, _align(rows), EXPLANATION])


def _summarize(values: Iterable[float], score: Score) -> str:
    return format_mean_and_deviation(pd.Series(values, dtype=float), score.digits)


def _summarize_ours(values: pd.Series, score: Score) -> str:
    """Also says of how many seeds."""
    text = _summarize(values, score)
    if values.empty:
        return text
    return f"{text} ({len(values)} {'seed' if len(values) == 1 else 'seeds'})"


def _align(rows: list[list[str]]) -> str:
    """A Markdown table whose columns are also straight in a terminal; the first row is its head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * width for width in widths], *rows[1:]]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
