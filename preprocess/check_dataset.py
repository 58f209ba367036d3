"""Check a dataset before training on it: counts, missing and broken images, captions, pairs that are no pairs; a contact sheet.

    python preprocess/check_dataset.py --datatype pairs --data_path pairs.csv --contact_sheet sheet.png

Exit code 0: nothing wrong; 1: images that are missing or broken, or a split that cannot be read; 2: wrong options, no table.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.pairs import SPLITS
from system.command import OneLineParser, run_command
from system.escaping import one_line, show

NUM_EXAMPLES = 5  # examples of each finding


SHEET_PAIRS = 12


@dataclass
class SplitReport:
    """What one split has: numbers to be told, and lists of what is worth a look."""

    pairs: int = 0
    captions: int = 0
    unreadable: str = ""
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    shared: list[str] = field(default_factory=list)  # pairs that an earlier split has too
    empty: int = 0
    repeated: int = 0  # beyond the first of each
    longest: int = 0  # tokens, the end's included
    cut: int = 0  # longer than --max_words

    @property
    def is_wrong(self) -> bool:
        """Whether training would stop at it, or its scores would lie."""
        return bool(self.unreadable or self.missing or self.broken or self.shared)


def inspect_pair(paths: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """A scene's images, before first → missing files, reasons of broken ones, images that equal the first pixel by pixel."""
    import numpy as np

    from dataloaders.images import load_image

    missing, broken, images = [], [], []
    for path in paths:
        try:
            images.append(load_image(path).numpy())
        except FileNotFoundError:
            missing.append(path)
        except ValueError as error:
            broken.append(str(error))
    if missing or broken:
        return missing, broken, []
    return (
        [],
        [],
        [
            path
            for path, image in zip(paths[1:], images[1:], strict=True)
            if np.array_equal(image, images[0])
        ],
    )


def check_split(scenes: Sequence, max_words: int, workers: int, split: str) -> SplitReport:
    """Everything about a split whose annotations could be read."""
    from modules.tokenizer import clip_tokenizer

    captions = [c for scene in scenes for c in scene.captions + scene.distractor_captions]
    lengths = [len(clip_tokenizer().encode(caption)) + 1 for caption in captions]
    counts = Counter(" ".join(caption.lower().split()) for caption in captions)
    found = SplitReport(
        len(scenes),
        len(captions),
        empty=sum(not c.strip() for c in captions),
        longest=max(lengths),
        repeated=len(captions) - len(counts),
        cut=sum(length > max_words for length in lengths),
    )
    with ProcessPoolExecutor(workers) as pool:
        paths = [scene.image_paths for scene in scenes]
        looks = pool.map(inspect_pair, paths, chunksize=16)
        for missing, broken, same in tqdm(looks, f"{split}: images", len(paths), disable=None):
            found.missing += missing
            found.broken += broken
            found.identical += same
    return found


def format_split(split: str, found: SplitReport, max_words: int) -> str:
    """The findings as lines of text."""
    if found.unreadable:
        return f"{split}: WRONG: {one_line(found.unreadable)}"
    lines = [
        f"{split}: {found.pairs} pairs, {found.captions} captions, the longest {found.longest} tokens"
    ]
    if found.cut:
        lines.append(
            f"  {found.cut} captions are longer than --max_words {max_words} and will be cut"
        )
    said = ((found.empty, "empty"), (found.repeated, "repeats of others"))
    lines += [f"  {count} captions are {what}" for count, what in said if count]
    for names, what in (
        (found.missing, "WRONG: {} images are missing"),
        (found.broken, "WRONG: {} images are broken"),
        (found.shared, "WRONG: {} pairs stand in another split too"),
        (found.identical, "{} images equal their pair's first, pixel by pixel, at 224 × 224"),
    ):
        if names:
            lines.append("  " + what.format(len(names)))
            lines += [f"    {one_line(name)}" for name in names[:NUM_EXAMPLES]] + (
                ["    …"] if len(names) > NUM_EXAMPLES else []
            )
    return "\n".join(lines)


def draw_contact_sheet(path: Path, scenes: Sequence, seed: int) -> None:
    """A PNG of some pairs drawn at random, before beside after, their first captions below."""
    from modules.report.pictures import draw_pairs
    from system.files import atomic_write

    chosen = random.Random(seed).sample(range(len(scenes)), min(SHEET_PAIRS, len(scenes)))
    sheet = draw_pairs(
        [(scenes[n].before, scenes[n].after, [scenes[n].id, scenes[n].captions[0]]) for n in chosen]
    )
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def check(args: argparse.Namespace) -> bool:
    """Check all splits and print what was found; returns whether anything is wrong."""
    from dataloaders.datasets import load_pairs
    from dataloaders.datasets.pair_table import table_splits

    wrong, seen = False, set()
    splits = args.splits or (
        table_splits(args.data_path) if args.datatype == "pairs" else list(SPLITS)
    )
    for split in splits:
        try:
            scenes = load_pairs(
                args.datatype, args.data_path, args.features_path, split, need_images=False
            )
            found = check_split(scenes, args.max_words, args.workers, split)
            found.shared = [scene.id for scene in scenes if (scene.before, scene.after) in seen]
            seen.update((scene.before, scene.after) for scene in scenes)
        except (ValueError, OSError) as error:
            scenes, found = [], SplitReport(unreadable=" ".join(str(error).split()))
        show(format_split(split, found, args.max_words), flush=True)
        wrong |= found.is_wrong
        if args.contact_sheet and split == splits[0] and not found.is_wrong:
            draw_contact_sheet(args.contact_sheet, scenes, args.seed)
            show(f"  {one_line(args.contact_sheet)}: pairs drawn at random")
    lacking = [split for split in ("train", "test") if split not in splits and not args.splits]
    if lacking:
        print(f"WRONG: no {' and no '.join(lacking)} split, which training needs")
        wrong = True
    print("something is WRONG, see above" if wrong else "nothing that would stop a training")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--datatype", choices=("spot", "clevr", "pairs"), required=True)
    parser.add_argument("--data_path", type=Path, required=True, help="as in training")
    parser.add_argument("--features_path", type=Path, help="Spot-the-Diff's images")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        help="default: all; of a table of pairs, those that it names",
    )
    parser.add_argument(
        "--max_words",
        type=int,
        default=32,
        help="captions' limit, as training will be told (default: 32)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read images (default: 2)"
    )
    parser.add_argument(
        "--contact_sheet", type=Path, help="PNG to draw pairs of the first split into"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the contact sheet's draw")
    args = parser.parse_args(argv)
    if args.datatype == "spot" and not args.features_path:
        parser.error("--datatype spot needs --features_path")
    if args.workers < 1 or args.max_words < 3:
        parser.error("expected --workers of at least 1 and --max_words of at least 3")
    results: list[bool] = []
    run_command(parser.prog, lambda: results.append(check(args)))
    return int(results[0])


if __name__ == "__main__":
    sys.exit(main())
