"""Weights from one format to another, and what a file of weights is.

    python preprocess/convert_weights.py --inspect FILE
    python preprocess/convert_weights.py pytorch_model.bin.spot spot.safetensors     # the released names, safetensors
    python preprocess/convert_weights.py spot.safetensors pytorch_model.bin.spot     # the released names, a torch pickle
    python preprocess/convert_weights.py pytorch_model.bin.spot spot-hf              # a folder in Hugging Face's layout

IN is whatever --init_model takes. OUT ends in .safetensors, or is called *.bin, *.bin.*, *.pt or *.pth, or is a folder. Values and
their types stay as they are. A card (model.json) beside IN goes along. What is there already is not written over.
"""

import argparse
import re
import sys
from collections import Counter
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from system.command import OneLineParser, run_command
from system.escaping import one_line, show
from system.urls import Address


def convert(source: Address, target: Path, quick_gelu: bool) -> None:
    """Write `target` in the format that its name says; ValueError or OSError where the source is no CLIP's weights."""
    import torch
    from safetensors.torch import save_file

    from modules.model.clip import ClipSizes
    from modules.weights.configs import huggingface_config
    from modules.weights.key_names import clip_tensors, to_huggingface
    from modules.weights.model_info import MODEL_INFO_FILE, read_model_info, write_model_info
    from modules.weights.sources import HUGGING_FACE_CONFIG, find_weights, read_released
    from system.files import atomic_write, refuse_existing
    from system.json_files import write_json

    is_pickle = re.fullmatch(r".+\.(bin(\..+)?|pt|pth)", target.name) is not None
    is_folder = not is_pickle and target.suffix != ".safetensors"
    own_card = target / MODEL_INFO_FILE if is_folder else target.with_name(f"{target.name}.json")
    refuse_existing(target, *([] if is_folder else [own_card]))
    path = find_weights(source)
    weights, card = read_released(path, quick_gelu), read_model_info(path)
    sizes = ClipSizes.from_weights(clip_tensors(weights))
    tensors = to_huggingface(weights) if is_folder else weights
    if is_pickle:
        with atomic_write(target) as temporary:
            torch.save(weights, temporary)
    else:
        with atomic_write(target / "model.safetensors" if is_folder else target) as temporary:
            save_file(
                {key: value.clone().contiguous() for key, value in tensors.items()},
                temporary,
                {"format": "pt"},
            )
    if is_folder:
        write_json(target / HUGGING_FACE_CONFIG, huggingface_config(sizes))
    if card:
        write_model_info(own_card, card)
    show(f"{one_line(target)}: {len(weights)} tensors of {one_line(path)}")
    if not card:
        print(
            "no card was beside it: what shapes cannot say (--intra_num_hidden_layers, --linear_patch) is still to be given"
        )


def inspect(source: Address) -> list[str]:
    """Lines that say what a file of weights is. ValueError or OSError where it is none."""
    from modules.clip4idc import CLIP4IDC
    from modules.model.bert import load_decoder_config
    from modules.model.clip import ClipSizes
    from modules.weights.fitting import WeightMismatch
    from modules.weights.key_names import ARCHIVE_EXTRAS, clip_tensors, layout_of, strip_wrappers
    from modules.weights.model_info import find_model_info, read_model_info
    from modules.weights.sources import find_weights, read_released
    from modules.weights.tensor_files import file_format, read_weights

    path = find_weights(source)
    raw = strip_wrappers(read_weights(path))
    layout = {
        "released": "CLIP4IDC's",
        "huggingface": "Hugging Face's",
        "other": "unknown",
        "plain": "OpenAI's"
        if all(name in raw for name in ARCHIVE_EXTRAS)
        else "OpenAI's or open_clip's",
    }[layout_of(raw)]
    types = Counter(str(value.dtype).removeprefix("torch.") for value in raw.values())
    counts = ", ".join(f"{count} {name}" for name, count in types.most_common())
    lines = [
        f"file       {path}, {path.stat().st_size / 1e6:.1f} MB, {file_format(path)}",
        f"names      {layout}",
        f"tensors    {len(raw)}, {sum(value.numel() for value in raw.values()) / 1e6:.1f} M numbers, {counts}",
    ]
    weights = read_released(path, quick_gelu=True)
    try:
        read_released(path)
        lines.append(
            "activation quick GELU" + (", as CLIP4IDC's is" if layout == "CLIP4IDC's" else "")
        )
    except ValueError as error:
        lines.append(f"activation not what is built here, or not told: {error}")
    has = {
        part: any(key.startswith(part) for key in weights)
        for part in ("clip.visual.bef", "decoder.", "cross.")
    }
    stage = (
        "captioner (the result of finetuning)"
        if has["decoder."]
        else "adapted CLIP (the result of adaptation)"
        if has["clip.visual.bef"]
        else "CLIP, not adapted"
    )
    lines.append(f"stage      {stage}{', with a cross encoder' if has['cross.'] else ''}")
    patch = "3d" if "clip.visual.conv2.weight" in weights else "2d"
    lines.append(f"patches    {patch}" + ("" if has["clip.visual.bef"] else ", as every CLIP's"))
    card = read_model_info(path)
    said = ", ".join(f"{name} {value}" for name, value in card.items() if name != "decoder_config")
    lines.append(
        f"card       {find_model_info(path)}: {said}"
        if card
        else "card       none: blocks before joining and a captioner's heads are not known"
    )
    try:
        sizes = ClipSizes.from_weights(clip_tensors(weights))
    except ValueError as error:
        return [*lines, f"fits       no: {error}"]
    lines.append(
        "sizes      " + ", ".join(f"{name} {value}" for name, value in vars(sizes).items())
    )
    try:
        layers = len(
            {key.split(".")[3] for key in weights if key.startswith("decoder.decoder.layer.")}
        )
        config = load_decoder_config(card.get("decoder_config", "decoder-base")).with_layers(
            layers or None
        )
        CLIP4IDC.from_weights(
            weights,
            "caption" if has["decoder."] else "retrieval",
            card.get("intra_num_hidden_layers", 0),
            patch,
            config,
            "tight" if has["cross."] and not has["decoder."] else "loose",
        )
    except WeightMismatch as error:
        return [*lines, "fits       no:", *(f"           {problem}" for problem in error.problems)]
    except ValueError as error:
        return [*lines, f"fits       no: {error}"]
    return [*lines, "fits       yes: nothing is missing or left over"]


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source",
        nargs="?",
        type=Address,
        metavar="IN",
        help="a file, a folder, an address, a name of OpenAI's or of the hub",
    )
    parser.add_argument("target", nargs="?", type=Path, metavar="OUT", help="what to write")
    parser.add_argument(
        "--inspect", type=Address, metavar="FILE", help="say what this is, write nothing"
    )
    parser.add_argument(
        "--quick_gelu",
        action="store_true",
        help="vouch for CLIP weights that do not say their activation",
    )
    args = parser.parse_args(argv)
    if args.inspect and args.source or not (args.inspect or args.target and args.target.name):
        parser.error("give either IN and OUT, or --inspect FILE")
    if args.inspect:
        return run_command(
            parser.prog, lambda: show("\n".join(map(one_line, inspect(args.inspect))))
        )
    return run_command(parser.prog, lambda: convert(args.source, args.target, args.quick_gelu))


if __name__ == "__main__":
    sys.exit(main())
