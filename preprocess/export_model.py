r"""A run's model as a small folder to share: float16 weights, model.json, a README with scores.

    python preprocess/export_model.py runs/demo/caption/pytorch_model.bin.best my_model \
        --trained_on "drawn scenes"

`Predictor.load`, --do_predict and --init_model take such a folder, and its owner/name once it is on
the Hugging Face hub (`hf upload owner/name my_model`).
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from system.command import run_command
from system.escaping import show, to_one_line
from system.parser import OneLineParser
from system.urls import Location


def export(
    checkpoint: Location, folder: Path, described: dict[str, Any], metrics: Path | None
) -> None:
    """Write the folder's three files. The weights need a model.json next to them, as in runs.

    `described` has the fields of a Publication. The scores come from `metrics`; without it, from
    the run's metrics.json if the exported weights are the run's best. Raises ValueError or OSError
    for weights that cannot be used, or a folder that exists.
    """
    from modules.weights.key_names import task_of
    from modules.weights.model_folder import Publication, pack_weights, write_model_folder
    from modules.weights.sources import find_weights, load_weights
    from system.files import refuse_existing

    publication = Publication(**described)
    if not publication.trained_on.strip():
        raise ValueError("--trained_on is empty: say what the model was trained on")
    refuse_existing(folder)
    path = find_weights(checkpoint)
    loaded = load_weights(str(path), "ViT-B/32")
    task = task_of(loaded.tensors)
    model = _build_model(loaded, task, path)
    weights = pack_weights(model.state_dict(), model.tied_keys, str(path))
    scores = find_scores(path, metrics)
    write_model_folder(folder, task, weights, loaded.info, publication, scores)
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


def _missing_info_message(path: Path) -> str:
    return (
        f"no model.json next to {path} says how the model was trained: "
        "export it from a run's folder"
    )


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
    parser.add_argument(
        "--license",
        default="",
        metavar="ID",
        help="its license by the hub's name, such as mit, apache-2.0 or cc-by-4.0",
    )
    parser.add_argument(
        "--datasets",
        nargs="+",
        default=[],
        metavar="ID",
        help="the datasets that it was trained on, by their names on the hub",
    )
    args = parser.parse_args(argv)
    described = {
        "name": args.name,
        "trained_on": args.trained_on,
        "license": args.license,
        "datasets": args.datasets,
    }
    return run_command(
        parser.prog, lambda: export(args.checkpoint, args.folder, described, args.metrics)
    )


if __name__ == "__main__":
    sys.exit(main())
