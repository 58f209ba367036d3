"""A run's model to a small folder that can be shared: float16 safetensors, model.json, and a README with its scores.

    python preprocess/export_model.py runs/demo/caption/pytorch_model.bin.best my_model --trained_on "drawn scenes"

`Predictor.load`, --do_predict and --init_model take such a folder, and its owner/name once it is on the Hugging Face hub
(`hf upload owner/name my_model`).
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

from system.command import OneLineParser, run_command
from system.escaping import markdown_text, one_line, show
from system.urls import Address

LARGEST_SCORE = 1e6  # above which a number is no score


MAX_SOURCE_LENGTH = 5000  # letters of what a model was trained on


README_SCORES = (
    "Bleu_4",
    "METEOR",
    "ROUGE_L",
    "CIDEr",
    "R1",
    "R5",
    "R10",
)  # the scores that a README shows


def export(
    checkpoint: Address, folder: Path, trained_on: str, name: str, metrics: Path | None
) -> None:
    """Write the folder's three files; tied tensors are kept once. The weights need a card beside them, as runs have it.

    Scores are those of `metrics`, else of the run's own `metrics.json`, which is its best weights'.
    """
    from safetensors.torch import save_file

    from modules.clip4idc import CLIP4IDC
    from modules.weights.model_info import MODEL_INFO_FILE, read_model_info, write_model_info
    from modules.weights.sources import find_weights, load_weights
    from system.files import atomic_write, refuse_existing
    from system.json_files import read_json

    if not trained_on.strip():
        raise ValueError("--trained_on is empty: say what the model has seen")
    refuse_existing(folder)
    path = find_weights(checkpoint)
    card = read_model_info(path)
    if not {"intra_num_hidden_layers", "linear_patch"} <= card.keys():
        raise ValueError(
            f"no {MODEL_INFO_FILE} beside {path} that says how it was trained: export from the folder of a run"
        )
    tensors = load_weights(str(path), "ViT-B/32").tensors
    stage = "caption" if any(key.startswith("decoder.") for key in tensors) else "retrieval"
    model = CLIP4IDC.from_weights(
        tensors,
        stage,
        card["intra_num_hidden_layers"],
        card["linear_patch"],
        card.get("decoder_config"),
    )
    weights = {
        key: value.half().contiguous()
        for key, value in model.state_dict().items()
        if key not in model.tied_keys
    }
    too_large = [key for key, value in weights.items() if not value.isfinite().all()]
    if too_large:
        raise ValueError(f"{path}: {too_large[0]} has values that float16 does not hold")
    best, own = path.parent / "pytorch_model.bin.best", path.parent / "metrics.json"
    if metrics is None and own.is_file() and best.is_file() and path.samefile(best):
        metrics = own
    scores = read_json(metrics, dict) if metrics else {}
    parameters = sum(weight.numel() for weight in weights.values())
    page = model_page(name or folder.resolve().name, stage, trained_on, parameters, scores)
    with atomic_write(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, {"format": "pt"})
    write_model_info(folder / MODEL_INFO_FILE, {**card, "trained_on": trained_on})
    with atomic_write(folder / "README.md") as temporary:
        temporary.write_text(page, encoding="utf-8")
    show(
        f"{one_line(folder)}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.1f} MB"
    )


def model_page(
    name: str, stage: str, trained_on: str, parameters: int, scores: Mapping[str, Any]
) -> str:
    """The model's page, in the hub's form: what it is, how to use it, what it reached."""
    if stage == "caption":
        what, language = "says in a sentence what changed between two pictures of a scene", "python"
        loaded = f"Predictor.load({json.dumps(name)})"
        use = f'from modules.predictor import Predictor\n\nprint({loaded}.caption("before.png", "after.png"))'
    else:
        what, language = (
            "is a CLIP adapted to pairs of pictures and sentences on what changed; finetuning starts from it",
            "bash",
        )
        use = f"python CLIP4IDCinference.py --do_train --init_model {shlex.quote(one_line(name))} …"
    kind = ["pipeline_tag: image-to-text"] if stage == "caption" else []
    head = [
        "---",
        "library_name: clip4idc",
        *kind,
        "tags:",
        "- clip4idc",
        "- image-difference-captioning",
        "---",
        "",
        f"# {markdown_text(name)}",
        "",
        f"A CLIP4IDC model ({parameters / 1e6:.1f} M parameters, float16): it {what}.",
        "",
        f"Trained on: {markdown_text(trained_on, MAX_SOURCE_LENGTH)}.",
        "",
        f"```{language}",
        use,
        "```",
        "",
    ]
    groups = (
        {"captions": scores}
        if stage == "caption"
        else {
            way.replace("_to_", " → "): {
                key.removeprefix(f"{way}_"): value
                for key, value in scores.items()
                if key.startswith(way)
            }
            for way in ("text_to_pair", "pair_to_text")
        }
    )
    columns = [
        score for score in README_SCORES if any(score in values for values in groups.values())
    ]
    if not columns:
        return "\n".join([*head, "Scores: none were at hand when this page was written.", ""])
    rows = [
        f"| {group} | " + " | ".join(_format_number(values.get(score)) for score in columns) + " |"
        for group, values in groups.items()
        if any(score in values for score in columns)
    ]
    names = {
        "spot": "Spot-the-Diff",
        "clevr": "data in CLEVR-Change's layout",
        "pairs": "a table of pairs",
    }
    data = names.get(str(scores.get("datatype")), "its data")
    title = f"Scores on the {markdown_text(str(scores.get('split', 'evaluated')))} split of {data}:"
    header = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    return "\n".join([*head, title, "", *header, *rows, ""])


def _format_number(value: Any) -> str:
    if not isinstance(value, int | float) or not abs(value) < LARGEST_SCORE:
        return "–"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint", type=Address, help="pytorch_model.bin.<epoch> of a run, or its folder"
    )
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--trained_on", required=True, help="what it has seen, for those who use it"
    )
    parser.add_argument(
        "--name",
        default="",
        help="what its README calls it, owner/name on the hub (default: the folder's name)",
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
