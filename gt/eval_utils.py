"""Ground truth in COCO's form for the caption scores (SPEC §6); with `score` as first word the scores of result files, with
`changes` whether captions of drawn scenes are right.

Run bare inside Spot-the-Diff's annotation folder, it reads test.json and writes total_change_captions_reformat.json.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.coco_files import coco_ground_truth
from dataloaders.datasets.clevr_change import CAPTION_FILES, read_captions
from dataloaders.datasets.pair_table import load_pair_table
from dataloaders.datasets.spot_the_diff import read_annotations
from gt import caption_accuracy, score_files
from system.command import OneLineParser, run_command
from system.escaping import one_line, show
from system.json_files import write_json

OUTPUT_NAME = "total_change_captions_reformat.json"


def spot_captions(data_path: Path, split: str) -> list[tuple[str, list[str]]]:
    """(`<id>.png`, sentences) of every entry of a raw list."""
    return [
        (f"{image_id}.png", sentences)
        for image_id, sentences in read_annotations(data_path / f"{split}.json")
    ]


def clevr_captions(data_path: Path) -> list[tuple[str, list[str]]]:
    """(`000000.png`, change captions) of all scenes, then (`000000.png_n`, no-change captions)."""
    change, no_change = (read_captions(data_path / file) for file in CAPTION_FILES)
    return [*change.items(), *((f"{name}_n", sentences) for name, sentences in no_change.items())]


def make_ground_truth(datatype: str, data_path: Path, split: str, output: Path) -> None:
    """Read a dataset's captions and write the ground-truth file; CLEVR-Change's covers all splits."""
    if datatype == "pairs":
        captions = [
            (scene.id, list(scene.captions))
            for scene in load_pair_table(data_path, split, need_images=False)
        ]
    else:
        captions = (
            spot_captions(data_path, split) if datatype == "spot" else clevr_captions(data_path)
        )
    ground_truth = coco_ground_truth(captions)
    write_json(output, ground_truth)
    ids = {row["id"] for row in ground_truth["images"]}
    show(f"{one_line(output)}: {len(ids)} ids, {len(ground_truth['annotations'])} captions")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["score"]:
        return score_files.main(words[1:])
    if words[:1] == ["changes"]:
        return caption_accuracy.main(words[1:])
    if words and not words[0].startswith("-"):
        OneLineParser().error(
            f"{words[0]!r} is no task: expected score, changes, or options alone for ground truth"
        )
    parser = OneLineParser(
        description="Ground truth in COCO's form for the caption scores.",
        epilog="score --help: scores of "
        "result files; changes --help: whether captions of drawn scenes are right",
    )
    parser.add_argument(
        "--datatype",
        choices=("spot", "clevr", "pairs"),
        default="spot",
        help="dataset (default: spot)",
    )
    parser.add_argument(
        "--data_path",
        type=Path,
        default=Path("."),
        help="folder of the annotations, or the table of pairs (default: this folder)",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val", "test"),
        default="test",
        help="split, of Spot-the-Diff or a table (default: test)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"file to write (default: {OUTPUT_NAME} where the annotations are)",
    )
    args = parser.parse_args(words)
    output = (
        args.output
        or (args.data_path.parent if args.datatype == "pairs" else args.data_path) / OUTPUT_NAME
    )
    return run_command(
        parser.prog, lambda: make_ground_truth(args.datatype, args.data_path, args.split, output)
    )


if __name__ == "__main__":
    sys.exit(main())
