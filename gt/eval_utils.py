"""Ground truth for caption scores, in COCO's format; `score` and `changes` evaluate captions.

Run without options inside Spot-the-Diff's annotation folder, it reads test.json and writes
total_change_captions_reformat.json (docs/reference.md, Caption metrics).
"""

import sys
from argparse import Namespace
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from dataloaders.coco_files import coco_ground_truth
from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.datasets.spot_the_diff import SpotTheDiff
from dataloaders.pairs import SPLITS, PairDataset
from gt import caption_accuracy, score_files
from system.command import run_command
from system.escaping import show, to_one_line
from system.flags import add_entry_flags, read_settings
from system.json_files import write_json
from system.parser import OneLineParser

OUTPUT_NAME = "total_change_captions_reformat.json"
SUBCOMMANDS = {"score": score_files.main, "changes": caption_accuracy.main}


def make_ground_truth(dataset: PairDataset, split: str, output: Path) -> None:
    """Write a dataset's ground-truth file and say how large it is.

    CLEVR-Change's covers all splits, whichever is given.
    """
    ground_truth = coco_ground_truth(dataset.ground_truth(split))
    write_json(output, ground_truth)
    num_ids = len({row["id"] for row in ground_truth["images"]})
    num_captions = len(ground_truth["annotations"])
    show(f"{to_one_line(output)}: {num_ids} ids, {num_captions} captions")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments and arguments[0] in SUBCOMMANDS:
        return SUBCOMMANDS[arguments[0]](arguments[1:])
    if arguments and not arguments[0].startswith("-"):
        expected = ", ".join(SUBCOMMANDS)
        OneLineParser().error(
            f"{arguments[0]!r} is not a subcommand: expected {expected}, or options alone for "
            "ground truth"
        )
    parser = _build_parser()
    entry = add_entry_flags(parser, DATASETS, "datatype", arguments)
    args = parser.parse_args(arguments)
    settings = read_settings(entry, vars(args))
    return run_command(parser.prog, lambda: _run(args, settings))


def _run(args: Namespace, settings: object) -> None:
    dataset = open_dataset(args.datatype, args.data_path, args.features_path, settings=settings)
    folder = args.data_path.parent if args.data_path.is_file() else args.data_path
    make_ground_truth(dataset, args.split, args.output or folder / OUTPUT_NAME)


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        description="Ground truth for caption scores, in COCO's format.",
        epilog="score --help: scores of result files; changes --help: whether captions of drawn "
        "scenes are right",
    )
    parser.add_argument(
        "--datatype",
        choices=DATASETS,
        metavar="NAME",
        default=SpotTheDiff.name,
        help=f"dataset: %(choices)s (default: {SpotTheDiff.name})",
    )
    parser.add_argument(
        "--data_path",
        type=Path,
        default=Path("."),
        help="folder of the annotations, or the table of pairs (default: this folder)",
    )
    parser.add_argument(
        "--features_path",
        type=Path,
        help="folder of the images, for datasets that cannot list their captions without it",
    )
    parser.add_argument(
        "--split",
        choices=SPLITS,
        default="test",
        help="split; CLEVR-Change's file covers all of them (default: test)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        help=f"file to write (default: {OUTPUT_NAME} where the annotations are)",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
