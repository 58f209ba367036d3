r"""A run's model as a small folder to share: float16 weights, model.json, a README with scores.

    python preprocess/export_model.py runs/demo/caption/pytorch_model.bin.best my_model \
        --trained_on "drawn scenes"

`Predictor.load`, --do_predict and --init_model take such a folder, and its owner/name once it is on
the Hugging Face hub (`hf upload owner/name my_model`).
"""

import argparse
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from dataloaders.datasets import DATASETS
from system.command import run_command
from system.escaping import escape_markdown, show, to_one_line
from system.parser import OneLineParser
from system.urls import Location

TEMPLATES = Path(__file__).parent / "templates"
MAX_SCORE = 1e6  # a number from here on is not a score
MAX_TRAINED_ON_LENGTH = 5000  # characters of --trained_on that the README shows
README_SCORES = ("Bleu_4", "METEOR", "ROUGE_L", "CIDEr", "R1", "R5", "R10")


def export(
    checkpoint: Location, folder: Path, trained_on: str, name: str, metrics: Path | None
) -> None:
    """Write the folder's three files. The weights need a model.json next to them, as in runs.

    The scores come from `metrics`; without it, from the run's metrics.json if the exported weights
    are the run's best. Raises ValueError or OSError for weights that cannot be used, or a folder
    that exists.
    """
    from modules.weights.key_names import task_of
    from modules.weights.sources import find_weights, load_weights
    from system.files import refuse_existing

    if not trained_on.strip():
        raise ValueError("--trained_on is empty: say what the model was trained on")
    refuse_existing(folder)
    path = find_weights(checkpoint)
    loaded = load_weights(str(path), "ViT-B/32")
    task = task_of(loaded.tensors)
    weights = pack_weights(_build_model(loaded, task, path), path)
    parameters = sum(weight.numel() for weight in weights.values())
    scores = find_scores(path, metrics)
    page = model_page(name or folder.resolve().name, task, trained_on, parameters, scores)
    _write_folder(folder, weights, {**loaded.info, "trained_on": trained_on}, page)
    megabytes = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    show(f"{to_one_line(folder)}: {megabytes:.1f} MB")


def _build_model(loaded: Any, task: str, path: Path) -> Any:
    """The model of loaded weights. Raises ValueError if model.json lacks one of its settings."""
    from modules.clip4idc import load_model
    from modules.weights.model_info import ModelSettings

    if not loaded.info:
        raise ValueError(_missing_info_message(path))
    model, settings = load_model(loaded, task, ModelSettings())
    needed = model.backbone.info().keys() & vars(settings).keys()
    if not needed <= loaded.info.keys():
        raise ValueError(_missing_info_message(path))
    return model


def _write_folder(
    folder: Path, weights: Mapping[str, Any], info: Mapping[str, Any], page: str
) -> None:
    from modules.weights.model_info import MODEL_INFO_FILE, write_model_info
    from modules.weights.tensor_files import write_safetensors
    from system.files import atomic_write

    write_safetensors(folder / "model.safetensors", weights)
    write_model_info(folder / MODEL_INFO_FILE, info)
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(page, encoding="utf-8")


def _missing_info_message(path: Path) -> str:
    return (
        f"no model.json next to {path} says how the model was trained: "
        "export it from a run's folder"
    )


def pack_weights(model: Any, path: Path) -> dict[str, Any]:
    """A CLIP4IDC's tensors in float16, tied ones once.

    Raises ValueError for values that float16 cannot hold.
    """
    tied = model.tied_keys
    weights = {
        key: value.half().contiguous()
        for key, value in model.state_dict().items()
        if key not in tied
    }
    for key, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {key} has values that float16 cannot hold")
    return weights


def find_scores(path: Path, metrics: Path | None) -> dict[str, Any]:
    """The scores in `metrics`, or in the run's metrics.json if the weights are the run's best.

    {} if there are none.
    """
    from system.json_files import read_json

    best = path.parent / "pytorch_model.bin.best"
    own = path.parent / "metrics.json"
    if metrics is None and own.is_file() and best.is_file() and path.samefile(best):
        metrics = own
    return read_json(metrics, dict) if metrics else {}


def model_page(
    name: str, task: str, trained_on: str, parameters: int, scores: Mapping[str, Any]
) -> str:
    """The model's README in the hub's format: what it is, how to use it, its scores."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the template is Markdown, and the filter escapes that
    )
    environment.filters["markdown"] = escape_markdown
    columns, rows = _score_table(task, scores)
    return environment.get_template("README.md.j2").render(
        name=name,
        task=task,
        trained_on=trained_on,
        max_trained_on_length=MAX_TRAINED_ON_LENGTH,
        millions=parameters / 1e6,
        quoted_name=json.dumps(name),
        shell_name=shlex.quote(to_one_line(name)),
        split=str(scores.get("split", "evaluated")),
        data=_dataset_title(scores.get("datatype")),
        columns=columns,
        rows=rows,
    )


def _dataset_title(name: Any) -> str:
    """The usual name of the dataset that metrics.json names."""
    if not isinstance(name, str) or name not in DATASETS:
        return "its data"
    return DATASETS[name].title


def _score_table(
    task: str, scores: Mapping[str, Any]
) -> tuple[list[str], list[tuple[str, list[str]]]]:
    """The names of the scores that are given, and for each group its numbers as strings."""
    groups = {"captions": scores}
    if task == "retrieval":
        groups = {
            "text → pair": _scores_below(scores, "text_to_pair_"),
            "pair → text": _scores_below(scores, "pair_to_text_"),
        }
    known = {name for row in groups.values() for name in row}
    columns = [name for name in README_SCORES if name in known]
    rows = []
    for group, row in groups.items():
        if row.keys() & set(columns):
            rows.append((group, [_format_number(row.get(name)) for name in columns]))
    return columns, rows


def _scores_below(scores: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {
        key.removeprefix(prefix): value for key, value in scores.items() if key.startswith(prefix)
    }


def _format_number(value: Any) -> str:
    if not isinstance(value, int | float) or not abs(value) < MAX_SCORE:
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Location, help="pytorch_model.bin.<epoch> of a run, or its folder"
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--trained_on", required=True, help="what the model was trained on, for those who use it"
    )
    parser.add_argument(
        "--name",
        default="",
        help="its name in the README, owner/name on the hub (default: the folder's name)",
    )
    parser.add_argument(
        "--metrics",
        type=Path,
        help="metrics.json of an evaluation of these weights, for the README",
    )
    args = parser.parse_args(argv)
    return run_command(
        parser.prog,
        lambda: export(args.checkpoint, args.folder, args.trained_on, args.name, args.metrics),
    )


if __name__ == "__main__":
    sys.exit(main())
