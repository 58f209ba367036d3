"""Spot-the-Diff's raw lists, in which an id can occur several times → one entry a pair (SPEC §3).

Run bare inside the annotation folder, it reformats train.json, val.json and test.json there.
"""

import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.datasets.spot_the_diff import read_annotations
from dataloaders.pairs import SPLITS
from system.command import OneLineParser, run_command
from system.json_files import write_json


def merge_entries(entries: list[tuple[str, list[str]]]) -> list[dict]:
    """Entries of the same id become one, sentences in order, ids in order of first appearance."""
    merged: dict[str, list[str]] = {}
    for image_id, sentences in entries:
        merged.setdefault(image_id, []).extend(sentences)
    return [{"img_id": image_id, "sentences": sentences} for image_id, sentences in merged.items()]


def reformat(data_path: Path, splits: list[str], output: Path) -> None:
    """`data_path/{split}.json` → `output/reformat_{split}.json`; nothing is written unless all splits can be read."""
    raw = {split: read_annotations(data_path / f"{split}.json") for split in splits}
    for split, entries in raw.items():
        merged = merge_entries(entries)
        write_json(output / f"reformat_{split}.json", merged)
        print(f"{output / f'reformat_{split}.json'}: {len(entries)} entries, {len(merged)} pairs")


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
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
    return run_command(
        parser.prog, lambda: reformat(args.data_path, args.split, args.output or args.data_path)
    )


if __name__ == "__main__":
    sys.exit(main())
