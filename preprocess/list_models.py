"""The models that have a name: what each knows, its size, license and scores, whether it is here.

    python preprocess/list_models.py                 # for people
    python preprocess/list_models.py --format json   # for programs

`--init_model` and `Predictor.load` take these names. What else they take:
docs/load_published_weights.md.
"""

import argparse
import sys
import textwrap
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from modules.weights.known_models import MODELS, KnownModel
from system.command import run_command
from system.escaping import show
from system.json_files import to_json
from system.parser import OneLineParser

LABEL_WIDTH = 11  # characters of the labels below a name
LINE_WIDTH = 100
SHOWN_SCORES = {
    "Bleu_4": "BLEU-4",
    "METEOR": "METEOR",
    "ROUGE_L": "ROUGE-L",
    "CIDEr": "CIDEr",
    "text_to_pair_R1": "R@1",
    "text_to_pair_R5": "R@5",
    "text_to_pair_R10": "R@10",
}
FOOTER = (
    'To use one: --init_model NAME, or Predictor.load("NAME"). A file or folder of that name here\n'
    "takes precedence. The authors' weights are on Google Drive, and were not tried here."
)


def list_models(output_format: str) -> None:
    """Print the table of models."""
    models = {name: MODELS[name] for name in MODELS}
    if output_format == "json":
        facts = {name: model_facts(model) for name, model in models.items()}
        show(to_json(facts, indent=2, ascii_only=False))
        return
    parts = [format_model(name, model) for name, model in models.items()]
    show("\n\n".join([*parts, FOOTER]))


def model_facts(model: KnownModel) -> dict[str, Any]:
    """What is known about a model, for programs.

    `path` and `bytes` are null if it is not here, or is downloaded into the cache when it is used.
    """
    path = model.find_here()
    return {
        "stage": model.stage,
        "knows": model.knows,
        "caution": model.caution,
        "trained_on": model.trained_on,
        "license": model.license,
        "scores": dict(model.scores),
        "scores_from": model.scores_from,
        "location": model.location,
        "sha256": model.sha256,
        "get_it": model.get_it,
        "path": str(path) if path else None,
        "bytes": path.stat().st_size if path else None,
    }


def format_model(name: str, model: KnownModel) -> str:
    """A model's name, and below it a line for each fact."""
    ending = f"; {model.caution}" if model.caution else ""
    rows = [
        ("kind", model.stage),
        ("knows", f"{model.knows}{ending}"),
        ("trained on", model.trained_on),
        ("scores", _format_scores(model)),
        ("license", model.license),
        ("here", _format_place(model)),
    ]
    return "\n".join([name, *(_format_row(label, value) for label, value in rows)])


def _format_row(label: str, value: str) -> str:
    """A labelled fact, in several lines if it is long."""
    start = f"  {label:<{LABEL_WIDTH}} "
    return textwrap.fill(
        value,
        LINE_WIDTH,
        initial_indent=start,
        subsequent_indent=" " * len(start),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _format_scores(model: KnownModel) -> str:
    if not model.scores:
        return "none published"
    numbers = []
    for name, value in model.scores.items():
        digits = 4 if value < 10 else 1
        numbers.append(f"{SHOWN_SCORES.get(name, name)} {value:.{digits}f}")
    return f"{', '.join(numbers)} ({model.scores_from})"


def _format_place(model: KnownModel) -> str:
    """Whether a model is here and how large it is, or how to get it."""
    path = model.find_here()
    if path is not None:
        return f"yes, {path.stat().st_size / 1e6:.0f} MB: {path}"
    if model.is_in_ckpts:
        return f"no, get it with {model.get_it}"
    return f"downloaded from {model.location} when it is used"


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--format", choices=("table", "json"), default="table", help="default: table"
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: list_models(args.format))


if __name__ == "__main__":
    sys.exit(main())
