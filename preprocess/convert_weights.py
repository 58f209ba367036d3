"""Convert weights between formats, or print what a weights file holds.

    python preprocess/convert_weights.py --inspect IN
    # the released names, safetensors
    python preprocess/convert_weights.py pytorch_model.bin.spot spot.safetensors
    # the released names, a torch pickle
    python preprocess/convert_weights.py spot.safetensors pytorch_model.bin.spot
    # a folder in Hugging Face's layout
    python preprocess/convert_weights.py pytorch_model.bin.spot spot-hf

IN is anything that --init_model takes. OUT ends in .safetensors, or is called *.bin, *.bin.*, *.pt
or *.pth, or is a folder. Values and their types do not change. A model.json next to IN is copied
too. Existing files are not overwritten.
"""

import argparse
import re
import sys
from collections.abc import Mapping
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

PICKLE_NAME = r".+\.(bin(\..+)?|pt|pth)"


def convert(source: Location, target: Path, quick_gelu: bool) -> None:
    """Write `target` in the format that its name asks for.

    Raises ValueError or OSError if the source is not a file of weights, or `target` exists.
    """
    from modules.weights.key_names import patch_kind
    from modules.weights.model_info import MODEL_INFO_FILE, read_model_info, write_model_info
    from modules.weights.sources import find_weights, read_released
    from modules.weights.tensor_files import write_safetensors
    from system.files import refuse_existing

    is_pickle = re.fullmatch(PICKLE_NAME, target.name, re.IGNORECASE) is not None
    is_folder = not is_pickle and target.suffix.lower() != ".safetensors"
    if is_folder:
        info_path = target / MODEL_INFO_FILE
        refuse_existing(target)
    else:
        info_path = target.with_name(f"{target.name}.json")
        refuse_existing(target, info_path)
    path = find_weights(source)
    weights = read_released(path, quick_gelu)
    info = read_model_info(path)
    if is_folder:
        _write_huggingface(target, weights)
    elif is_pickle:
        _write_pickle(target, weights)
    else:
        write_safetensors(target, weights)
    if info:
        write_model_info(info_path, info)
    show(f"{to_one_line(target)}: {len(weights)} tensors of {to_one_line(path)}")
    if not info:
        print(
            f"it had no model.json: --linear_patch {patch_kind(weights)} must still be given, and "
            "--intra_num_hidden_layers, which the weights do not show"
        )


def _write_huggingface(folder: Path, weights: Mapping[str, Any]) -> None:
    """A folder that transformers' CLIPModel reads."""
    from modules.model.backbone import strip_prefix
    from modules.model.clip import CLIP
    from modules.model.clip_sizes import ClipSizes
    from modules.weights.configs import HUGGING_FACE_CONFIG, huggingface_config
    from modules.weights.huggingface_names import to_huggingface
    from modules.weights.tensor_files import write_safetensors
    from system.json_files import write_json

    sizes = ClipSizes.from_weights(strip_prefix(weights, CLIP.key_prefix))
    write_safetensors(folder / "model.safetensors", to_huggingface(weights))
    write_json(folder / HUGGING_FACE_CONFIG, huggingface_config(sizes))


def _write_pickle(path: Path, weights: Mapping[str, Any]) -> None:
    import torch

    from system.files import atomic_write

    with atomic_write(path) as temporary:
        torch.save(weights, temporary)


def print_facts(source: Location) -> None:
    """Print what a file of weights holds. Raises ValueError or OSError if it is not one."""
    from modules.weights.sources import find_weights
    from preprocess.weights_facts import WeightsFacts, format_facts

    lines = format_facts(WeightsFacts.of(find_weights(source)))
    show("\n".join(to_one_line(line) for line in lines))


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=Location,
        metavar="IN",
        help="a file, a folder, a URL, a name of OpenAI's or of the hub",
    )
    parser.add_argument("target", nargs="?", type=Path, metavar="OUT", help="what to write")
    parser.add_argument(
        "--inspect", type=Location, metavar="IN", help="print what IN holds, write nothing"
    )
    parser.add_argument(
        "--quick_gelu",
        action="store_true",
        help="assume quick GELU for CLIP weights whose config does not name the activation",
    )
    args = parser.parse_args(argv)
    has_target = args.target is not None and args.target.name != ""
    is_complete = bool(args.source) and has_target
    has_more = bool(args.source) or args.quick_gelu
    if (args.inspect and has_more) or not (args.inspect or is_complete):
        parser.error("give either IN and OUT, or --inspect IN alone")
    if args.inspect:
        return run_command(parser.prog, lambda: print_facts(args.inspect))
    return run_command(parser.prog, lambda: convert(args.source, args.target, args.quick_gelu))


if __name__ == "__main__":
    sys.exit(main())
