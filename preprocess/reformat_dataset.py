"""Merge Spot-the-Diff's raw lists, in which an id can occur several times, to one entry a pair.

Without options it reformats train.json, val.json and test.json in the current folder
(docs/reference.md, Data).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from dataloaders.datasets.spot_the_diff import merge_entries, read_annotations
from dataloaders.pairs import SPLITS
from system.command import run_command
from system.json_files import write_json
from system.parser import OneLineParser, first_line


def reformat(data_path: Path, splits: Sequence[str], output: Path) -> None:
    """Merge `data_path/<split>.json` to `output/reformat_<split>.json`.

    Nothing is written unless all splits can be read.
    """
    raw = {split: read_annotations(data_path / f"{split}.json") for split in splits}
    for split, entries in raw.items():
        path = output / f"reformat_{split}.json"
        merged = merge_entries(entries)
        write_json(path, merged)
        print(f"{path}: {len(entries)} entries, {len(merged)} pairs")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(description=first_line(__doc__))
    parser.add_argument(
        "--data_path",
        type=Path,
        default=Path("."),
        help="folder of {split}.json (default: this folder)",
    )
    parser.add_argument(
        "--split",
        nargs="+",
        choices=SPLITS,
        default=list(SPLITS),
        help="splits (default: all three)",
    )
    parser.add_argument(
        "--output", type=Path, help="folder for reformat_{split}.json (default: --data_path)"
    )
    args = parser.parse_args(argv)
    output = args.output or args.data_path
    return run_command(parser.prog, lambda: reformat(args.data_path, args.split, output))


if __name__ == "__main__":
    sys.exit(main())
