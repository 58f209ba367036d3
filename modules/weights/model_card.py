"""A model's README in the form of the Hugging Face hub: metadata for programs, text for people.

Every number in it comes from the metrics.json that it is given.
"""

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from jinja2 import Environment, FileSystemLoader

from dataloaders.datasets import DATASETS
from system.escaping import escape_markdown, to_one_line

TEMPLATES = Path(__file__).parent / "templates"
TAGS = ("clip4idc", "image-difference-captioning", "change-captioning")
LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
MAX_SCORE = 1e6  # a number from here on is not a score
MAX_TEXT_LENGTH = 5000  # characters of what a user wrote that the README shows
RETRIEVAL_GROUPS = {"text_to_pair_": "text → pair", "pair_to_text_": "pair → text"}
# Our names of scores → the hub's, in the README's order.
HUB_METRICS = {
    "Bleu_4": "bleu",
    "METEOR": "meteor",
    "ROUGE_L": "rouge",
    "CIDEr": "cider",
    "R1": "recall_at_1",
    "R5": "recall_at_5",
    "R10": "recall_at_10",
}
HUB_TASKS = {"caption": "image-to-text", "retrieval": "feature-extraction"}


@dataclass(frozen=True)
class CardFacts:
    """What a model's README is made from.

    `task` is caption or retrieval, `parameters` their number, `info` the content of model.json,
    `scores` that of a metrics.json ({}: there is none), and `datasets` the hub's names of what the
    model was trained on.
    """

    name: str
    task: str
    parameters: int
    info: Mapping[str, Any]
    scores: Mapping[str, Any] = field(default_factory=dict)
    datasets: Sequence[str] = ()


def check_license(name: str) -> None:
    """Raise ValueError unless a license's name can be one of the hub's."""
    if not LICENSE_ID.fullmatch(name):
        raise ValueError(
            f"the license is {name!r}, expected the hub's name of one, such as mit, apache-2.0 or "
            "cc-by-4.0; other for one that it has no name for"
        )


def check_datasets(names: Sequence[str]) -> None:
    """Raise ValueError unless all names can be those of datasets on the hub."""
    for name in names:
        if not DATASET_ID.fullmatch(name):
            raise ValueError(f"{name!r} is no name of a dataset on the hub, expected owner/name")


def make_card(facts: CardFacts) -> str:
    """The content of README.md."""
    return f"---\n{_make_metadata(facts).to_yaml()}\n---\n\n{_make_text(facts)}"


def _make_metadata(facts: CardFacts) -> ModelCardData:
    is_captioner = facts.task == "caption"
    results = list(_list_results(facts))
    return ModelCardData(
        language="en",
        license=facts.info.get("license"),
        library_name="clip4idc",
        pipeline_tag=HUB_TASKS["caption"] if is_captioner else None,
        tags=list(TAGS),
        datasets=list(facts.datasets) or None,
        metrics=list(dict.fromkeys(result.metric_type for result in results)) or None,
        model_name=to_one_line(facts.name) if results else None,
        eval_results=results or None,
    )


def _list_results(facts: CardFacts) -> Iterator[EvalResult]:
    """A result in the hub's form for each number of the README's table."""
    columns, rows = _score_table(facts)
    for group, row in rows:
        for name in columns:
            if _is_score(row.get(name)):
                suffix = "" if facts.task == "caption" else f" ({group})"
                yield EvalResult(
                    task_type=HUB_TASKS[facts.task],
                    dataset_type=to_one_line(facts.scores.get("datatype", "unknown")),
                    dataset_name=_dataset_title(facts.scores),
                    dataset_split=to_one_line(facts.scores.get("split", "unknown")),
                    metric_type=HUB_METRICS[name],
                    metric_name=f"{name}{suffix}",
                    metric_value=round(row[name], 4),
                )


def _make_text(facts: CardFacts) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the template is Markdown, and the filter escapes that
    )
    environment.filters["markdown"] = escape_markdown
    columns, rows = _score_table(facts)
    texts = {name: facts.info.get(name) for name in ("started_from", "trained_with", "license")}
    return environment.get_template("README.md.j2").render(
        **texts,
        name=facts.name,
        task=facts.task,
        trained_on=facts.info.get("trained_on", "not recorded"),
        max_length=MAX_TEXT_LENGTH,
        millions=facts.parameters / 1e6,
        quoted_name=json.dumps(facts.name),
        shell_name=shlex.quote(to_one_line(facts.name)),
        split=str(facts.scores.get("split", "evaluated")),
        data=_dataset_title(facts.scores),
        columns=columns,
        rows=[(group, [_format_number(row.get(name)) for name in columns]) for group, row in rows],
    )


def _dataset_title(scores: Mapping[str, Any]) -> str:
    """The usual name of the dataset that metrics.json names."""
    name = scores.get("datatype")
    if not isinstance(name, str) or name not in DATASETS:
        return "its data"
    return DATASETS[name].title


def _score_table(facts: CardFacts) -> tuple[list[str], list[tuple[str, Mapping[str, Any]]]]:
    """The names of the scores that are given, and the scores of each group that has some."""
    groups = {"captions": facts.scores}
    if facts.task == "retrieval":
        groups = {
            title: _scores_below(facts.scores, prefix) for prefix, title in RETRIEVAL_GROUPS.items()
        }
    known = {name for row in groups.values() for name in row}
    columns = [name for name in HUB_METRICS if name in known]
    return columns, [(group, row) for group, row in groups.items() if row.keys() & set(columns)]


def _scores_below(scores: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in scores.items() if key.startswith(prefix)
    }


def _is_score(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and abs(value) < MAX_SCORE


def _format_number(value: Any) -> str:
    if not _is_score(value):
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
