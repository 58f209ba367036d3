"""What works here and what is missing: a line for each part, and a caption of an example.

    clip4idc doctor --data images

✔ works, ✘ does not, and – is not there but needed for some tasks only. The exit code is 0 if the
bundled model captions the example pair, else 1.
"""

import argparse
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.pairs import SPLITS, PairDataset
from system.command import run_command
from system.escaping import show, summarize_error, to_one_line
from system.files import choose_cache_folder
from system.java import ensure_java
from system.json_files import read_json
from system.parser import OneLineParser
from system.places import ROOT, VERSION, list_ckpts_folders
from system.requirements import (
    EXTRAS,
    advise_extra,
    advise_setup,
    explain_missing,
    find_problems,
    list_requirements,
)

EXAMPLES = ROOT / "docs" / "examples"
EXAMPLE = "removed"
SPOT_IMAGES = "images_test"  # the images of Spot-the-Diff, beside its lists
TABLE_ENDINGS = (".csv", ".tsv", ".jsonl")
WEIGHTS = re.compile(r"(?!training_state).*\.(?:safetensors|pth?|bin)(?:\.\w+)?")
MAX_SHOWN = 6
LITTLE_SPACE = 2e9  # bytes

# None: not there, and not needed for every task.
MARKS = {True: "✔", False: "✘", None: "–"}
PLAIN_MARKS = {True: "ok", False: "NO", None: "--"}


class Finding(NamedTuple):
    """Whether a part works, what was found, and what to do."""

    works: bool | None
    part: str
    text: str


def check_python(data: Path) -> Iterator[Finding]:
    """The interpreter, and its packages."""
    yield Finding(True, "Python", f"{platform.python_version()}, {sys.executable}")
    problems = find_problems()
    if problems:
        advice = advise_setup(" ".join(problems))
        yield Finding(False, "packages", f"{shorten_list(problems.values())}: {advice}")
    else:
        yield Finding(True, "packages", f"all {len(list_requirements())} that every task needs")
    for extra, purpose in EXTRAS.items():
        problems = find_problems(extra)
        part = f"{extra} ({purpose})"
        if problems:
            text = f"{shorten_list(problems.values())}: {advise_extra(extra)}"
            yield Finding(None, part, text)
        else:
            yield Finding(True, part, "all packages")


def shorten_list(texts: Collection[str]) -> str:
    """Some texts in one, the first few if there are many."""
    first = ", ".join(list(texts)[:MAX_SHOWN])
    more = len(texts) - MAX_SHOWN
    return f"{first} and {more} more" if more > 0 else first


def check_device(data: Path) -> Iterator[Finding]:
    """Where it would compute, and in which precision."""
    import torch

    from system.compute import choose_precision, select_device, why_no_gpu

    device = select_device()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"no GPU: {why_no_gpu()}"
    precision = choose_precision("auto", device)
    yield Finding(
        True, "device", f"{device}, in {precision}, with torch {torch.__version__} ({name})"
    )


def check_java(data: Path) -> Iterator[Finding]:
    """The Java that scores need."""
    ensure_java("Scores")
    java = shutil.which("java")
    done = subprocess.run([java, "-version"], capture_output=True, text=True, check=True)
    version = next((line for line in done.stderr.splitlines() if "version" in line), "it runs")
    yield Finding(True, "Java", f"{version}, {java}")


def check_places(data: Path) -> Iterator[Finding]:
    """The disk and the folder for downloads."""
    free = shutil.disk_usage(ROOT).free
    advice = "" if free >= LITTLE_SPACE else ": make room, since a run writes weights"
    yield Finding(not advice, "disk", f"{free / 1e9:.1f} GB free at {ROOT}{advice}")
    cache = choose_cache_folder(None)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    can_write = os.access(existing, os.W_OK)
    advice = "for downloads" if can_write else "not writable: set XDG_CACHE_HOME to another folder"
    yield Finding(can_write, "cache", f"{cache}, {advice}")


def check_weights(data: Path) -> Iterator[Finding]:
    """Files of weights in ckpts/ and its folders."""
    for folder in list_ckpts_folders():
        files = sorted(path for path in folder.rglob("*") if WEIGHTS.fullmatch(path.name))
        sizes = [path.stat().st_size / 1e6 for path in files]
        names = [
            f"{path.relative_to(folder)} ({size:.0f} MB)"
            for path, size in zip(files, sizes, strict=True)
        ]
        if names:
            yield Finding(True, "weights", f"in {folder}: {shorten_list(names)}")


def check_datasets(data: Path) -> Iterator[Finding]:
    """The datasets in a folder and in those inside it."""
    found = False
    for name, dataset in find_datasets(data):
        found = True
        path = dataset.source.data_path
        try:
            counts = [f"{len(dataset.checked_pairs(s, False))} {s}" for s in dataset.splits()]
        except (ValueError, OSError) as error:
            yield Finding(False, "dataset", summarize_error(error))
        else:
            text = f"{path}, {dataset.title}: {', '.join(counts)} pairs"
            yield Finding(True, "dataset", f"{text} (--datatype {name} --data_path {path})")
    if not found:
        text = f"none in {data.resolve()} or its folders: --data DIR looks elsewhere"
        yield Finding(None, "dataset", text)


def find_datasets(folder: Path) -> Iterator[tuple[str, PairDataset]]:
    """Name and opened dataset for each that seems to be in a folder, or in a folder inside it."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")
    for place in (folder, *inside):
        for name in DATASETS:
            images = place / SPOT_IMAGES
            dataset = open_dataset(name, place, images if images.is_dir() else place)
            if any(dataset.annotation_file(split).is_file() for split in SPLITS):
                yield name, dataset
        for path in sorted(place.iterdir()):
            if path.suffix.lower() in TABLE_ENDINGS and _is_table_of_pairs(path):
                yield "pairs", open_dataset("pairs", path)


def _is_table_of_pairs(path: Path) -> bool:
    with open(path, "rb") as file:
        first_line = file.readline(1000)
    return b"before" in first_line and b"after" in first_line


def check_caption(data: Path) -> Iterator[Finding]:
    """The bundled model on an example pair."""
    logging.disable()
    try:
        from modules.predictor import Predictor

        predictor = Predictor.load()
        start = time.perf_counter()
        pair = (EXAMPLES / f"{EXAMPLE}_before.png", EXAMPLES / f"{EXAMPLE}_after.png")
        caption = predictor.caption(*pair)
        seconds = time.perf_counter() - start
    finally:
        logging.disable(logging.NOTSET)
    expected = read_json(EXAMPLES / "captions.json", dict)[EXAMPLE]
    if caption == expected:
        yield Finding(True, "caption", f'"{caption}", in {seconds:.1f} s')
    else:
        advice = "this device computes something else, so use --device cpu"
        yield Finding(False, "caption", f'"{caption}" instead of "{expected}": {advice}')


CHECKS = (
    check_python,
    check_device,
    check_java,
    check_places,
    check_weights,
    check_datasets,
    check_caption,
)


def run_check(check: Callable[[Path], Iterator[Finding]], data: Path) -> Iterator[Finding]:
    """A check's findings; an error is one too."""
    part = check.__name__.removeprefix("check_")
    try:
        yield from check(data)
    except ImportError as error:
        yield Finding(False, part, explain_missing(error) or summarize_error(error))
    except Exception as error:  # whatever it is, the other checks go on
        yield Finding(False, part, summarize_error(error))


def examine(data: Path) -> bool:
    """Print all findings. Returns whether the example was captioned."""
    marks = choose_marks(sys.stdout.encoding)
    show(f"clip4idc {VERSION}")
    finding = None
    for check in CHECKS:
        for finding in run_check(check, data):
            line = f"{marks[finding.works]} {finding.part}: {finding.text}"
            show(to_one_line(line), flush=True)
    works = finding is not None and finding.works is True
    print("Captioning works." if works else "Captioning does not work yet: see the lines above.")
    return works


def choose_marks(encoding: str | None) -> dict[bool | None, str]:
    """The marks, as words where the terminal's encoding lacks them."""
    try:
        "".join(MARKS.values()).encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return PLAIN_MARKS
    return MARKS


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. Returns 0 if captioning works, else 1."""
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("."),
        metavar="DIR",
        help="folder in which to look for datasets (default: this one)",
    )
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        parser.error(f"--data {args.data} is not a folder")
    results: list[bool] = []
    run_command(parser.prog, lambda: results.append(examine(args.data)))
    return 0 if results == [True] else 1
