"""Check a dataset before training on it: counts, bad images, captions, splits that overlap.

    python preprocess/check_dataset.py --datatype pairs --data_path pairs.csv \\
        --contact_sheet sheet.png

Exit code 0: nothing is wrong. 1: a line says WRONG, for example about missing or broken images,
about pairs in two splits, or about a train or test split that is absent or cannot be read. 2: wrong
options, or no table.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()


from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.pairs import SPLITS, ImagePair, PairDataset, list_captions
from preprocess.training_commands import format_training_commands
from system.command import Advice, run_command
from system.escaping import show, to_one_line
from system.file_names import find_unportable
from system.flags import (
    MAX_SEED,
    MAX_WORKERS,
    add_entry_flags,
    bounded,
    list_settings,
    read_settings,
)
from system.parser import OneLineParser
from system.processes import start_pool
from system.progress import show_progress

FEW_PAIRS = 30  # in a split whose scores are to say something
NUM_EXAMPLES = 5  # shown for each finding
SHEET_PAIRS = 12
NEEDED_SPLITS = ("train", "test")  # in training
NO_ERRORS = "OK: found nothing that would stop training"


@dataclass
class SplitReport:
    """What was found in one split: counts, and lists of what to look at."""

    pairs: int = 0
    captions: int = 0
    unreadable: str = ""  # why the annotations cannot be read
    missing: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    unportable: list[str] = field(default_factory=list)
    in_other_splits: list[str] = field(default_factory=list)  # pairs that an earlier split has too
    num_empty: int = 0
    num_repeated: int = 0  # beyond the first of each
    longest: int = 0  # tokens, the end token included
    num_truncated: int = 0  # longer than --max_words

    @property
    def has_errors(self) -> bool:
        """Whether training would stop at it, or whether its scores would be misleading."""
        lists = (self.missing, self.broken, self.in_other_splits)
        return bool(self.unreadable) or any(lists)


def inspect_pair(paths: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """A pair's images → missing files, what is wrong with broken ones, copies of the first."""
    import numpy as np

    from dataloaders.images import load_image

    missing: list[str] = []
    broken: list[str] = []
    images = []
    for path in paths:
        try:
            images.append(load_image(path).numpy())
        except FileNotFoundError:
            missing.append(path)
        except (ValueError, OSError) as error:
            broken.append(str(error))
    if missing or broken:
        return missing, broken, []
    others = zip(paths[1:], images[1:], strict=True)
    identical = [path for path, image in others if np.array_equal(image, images[0])]
    return [], [], identical


def check_split(
    pairs: Sequence[ImagePair], max_words: int, workers: int, split: str
) -> SplitReport:
    """Check the captions and images of a split whose annotations could be read."""
    report = _check_captions(pairs, max_words)
    with start_pool(workers) as pool:
        paths = [pair.image_paths for pair in pairs]
        inspected = pool.map(inspect_pair, paths, chunksize=16)
        progress = show_progress(inspected, f"{split}: pairs checked", total=len(paths))
        for missing, broken, identical in progress:
            report.missing += missing
            report.broken += broken
            report.identical += identical
    files = dict.fromkeys(Path(path).as_posix() for of_pair in paths for path in of_pair)
    report.unportable = find_unportable(files)
    return report


def _check_captions(pairs: Sequence[ImagePair], max_words: int) -> SplitReport:
    from modules.tokenizer import load_clip_tokenizer

    captions = list_captions(pairs)
    lengths = [len(load_clip_tokenizer().encode(caption)) + 1 for caption in captions]
    distinct = Counter(" ".join(caption.lower().split()) for caption in captions)
    return SplitReport(
        pairs=len(pairs),
        captions=len(captions),
        num_empty=sum(not caption.strip() for caption in captions),
        num_repeated=len(captions) - len(distinct),
        longest=max(lengths),
        num_truncated=sum(length > max_words for length in lengths),
    )


def format_report(split: str, report: SplitReport, max_words: int) -> str:
    """The findings as lines of text."""
    if report.unreadable:
        return f"{split}: WRONG: {to_one_line(report.unreadable)}"
    counts = f"{report.pairs} pairs, {report.captions} captions"
    lines = [f"{split}: {counts}, the longest {report.longest} tokens"]
    if split != "train" and report.pairs < FEW_PAIRS:
        lines.append(
            f"  with fewer than {FEW_PAIRS} pairs, scores and the choice of the best epoch are "
            "largely chance"
        )
    if report.num_truncated:
        lines.append(
            f"  {report.num_truncated} captions are longer than --max_words {max_words} and will "
            "be cut"
        )
    if report.num_empty:
        lines.append(f"  {report.num_empty} captions are empty")
    if report.num_repeated:
        lines.append(f"  {report.num_repeated} captions are repeats of others")
    findings = (
        (report.missing, "WRONG: {} images are missing"),
        (report.broken, "WRONG: {} images are broken"),
        (report.in_other_splits, "WRONG: {} pairs are in another split too"),
        (report.unportable, "{} names cannot be used on Windows, or differ only in capitals"),
        (report.identical, "{} images equal their pair's first, pixel by pixel, at 224 × 224"),
    )
    for names, text in findings:
        if names:
            lines.append(f"  {text.format(len(names))}")
            lines += [f"    {to_one_line(name)}" for name in names[:NUM_EXAMPLES]]
        if len(names) > NUM_EXAMPLES:
            lines.append("    …")
    return "\n".join(lines)


def draw_contact_sheet(path: Path, pairs: Sequence[ImagePair], seed: int) -> None:
    """Write a PNG of some random pairs, before next to after, the first caption below."""
    from modules.report.pictures import draw_pairs
    from system.files import atomic_write

    numbers = random.Random(seed).sample(range(len(pairs)), min(SHEET_PAIRS, len(pairs)))
    chosen = [pairs[number] for number in numbers]
    sheet = draw_pairs([(pair.before, pair.after, [pair.id, pair.captions[0]]) for pair in chosen])
    with atomic_write(path) as temporary:
        sheet.save(temporary, "PNG")


def check(dataset: PairDataset, args: argparse.Namespace) -> bool:
    """Check all splits and print what was found. Returns whether anything is wrong."""
    reports = {}
    needs_sheet = args.contact_sheet is not None
    seen: set[tuple[str, str]] = set()
    splits = args.splits or list(dataset.splits())
    for split in splits:
        pairs, report = _read_and_check(dataset, split, args)
        images = [(pair.before, pair.after) for pair in pairs]
        report.in_other_splits = [
            pair.id for pair, key in zip(pairs, images, strict=True) if key in seen
        ]
        seen.update(images)
        show(format_report(split, report, args.max_words), flush=True)
        reports[split] = report
        if needs_sheet and not report.has_errors:
            draw_contact_sheet(args.contact_sheet, pairs, args.seed)
            show(f"  {to_one_line(args.contact_sheet)}: random pairs")
            needs_sheet = False
    if needs_sheet:
        show(f"{to_one_line(args.contact_sheet)} is not drawn: no split is free of errors")
    absent = [] if args.splits else [split for split in NEEDED_SPLITS if split not in splits]
    if absent:
        print(f"WRONG: no {' and no '.join(absent)} split, which training needs")
    has_errors = bool(absent) or any(report.has_errors for report in reports.values())
    print("something is WRONG, see above" if has_errors else NO_ERRORS)
    if "train" in reports and not has_errors:
        show(_format_commands(dataset, reports["train"], args))
    return has_errors


def _format_commands(dataset: PairDataset, report: SplitReport, args: argparse.Namespace) -> str:
    if dataset.ground_truth_splits:  # a published dataset, with published settings
        name = dataset.name
        return f"The published commands are in scripts/adapt_{name}.sh and finetune_{name}.sh."
    words = ["--datatype", args.datatype, "--data_path", str(args.data_path)]
    if args.features_path:
        words += ["--features_path", str(args.features_path)]
    for option in list_settings(type(dataset)):
        value = getattr(args, option.name)
        if value != option.default:
            words += [f"--{option.name}", *([] if value is True else [str(value)])]
    return format_training_commands(words, report.pairs, report.captions, report.longest)


def _read_and_check(
    dataset: PairDataset, split: str, args: argparse.Namespace
) -> tuple[Sequence[ImagePair], SplitReport]:
    """A split's pairs and what was found in them; no pairs if they cannot be read."""
    try:
        pairs = dataset.checked_pairs(split, need_images=False)
    except (ValueError, OSError) as error:
        return [], SplitReport(unreadable=" ".join(str(error).split()))
    return pairs, check_split(pairs, args.max_words, args.workers, split)


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = _parser()
    entry = add_entry_flags(parser, DATASETS, "datatype", argv)
    args = parser.parse_args(argv)
    settings = read_settings(entry, vars(args))
    results: list[bool] = []

    def job() -> None:
        dataset = open_dataset(args.datatype, args.data_path, args.features_path, settings=settings)
        problems = dataset.find_problems()
        if problems:
            raise ValueError(f"--datatype {args.datatype}: {'; '.join(problems)}")
        results.append(check(dataset, args))

    run_command(parser.prog, job, Advice(worker_killed="use fewer --workers"))
    return int(results[0])


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--datatype",
        choices=DATASETS,
        metavar="NAME",
        required=True,
        help="dataset: %(choices)s",
    )
    parser.add_argument("--data_path", type=Path, required=True, help="as in training")
    parser.add_argument("--features_path", type=Path, help="as in training")
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=SPLITS,
        help="splits to check (default: all; for a table of pairs, those that it names)",
    )
    parser.add_argument(
        "--max_words",
        type=bounded(int, 3),
        default=32,
        help="longest caption that training will keep whole (default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        type=bounded(int, 1, MAX_WORKERS),
        default=2,
        help="processes that read images (default: 2)",
    )
    parser.add_argument(
        "--contact_sheet",
        type=Path,
        help="PNG to draw random pairs into, of the first split without errors",
    )
    parser.add_argument(
        "--seed",
        type=bounded(int, 0, MAX_SEED),
        default=0,
        help="for the contact sheet's random pairs",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
