"""Draw a dataset of scenes in which something changes, in CLEVR-Change's or Spot-the-Diff's layout.

    python preprocess/synthesize.py --output data --train 40 --val 8 --test 12

The scenes look like CLEVR's, and the sentences follow CLEVR-Change's grammar; no data from either
is used. Scene i depends only on (--seed, i), so neither the sizes of the splits nor the number of
workers changes it.
"""

import os
import secrets
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import cv2

from dataloaders.clevr_vocabulary import ATTRIBUTES, CHANGE_TYPES
from dataloaders.datasets.clevr_change import CAPTION_FILES, FOLDERS
from dataloaders.pairs import SPLITS
from preprocess.scenes.drawing import render
from preprocess.scenes.geometry import Scene
from preprocess.scenes.sampling import (
    Change,
    ScenePair,
    referent,
    sample_clevr_pair,
    sample_spot_pair,
)
from preprocess.scenes.sentences import change_sentences, no_change_sentences
from system.command import Advice, run_command
from system.escaping import show
from system.flags import MAX_SEED, MAX_WORKERS, bounded
from system.json_files import write_json
from system.parser import OneLineParser, first_line
from system.processes import start_pool
from system.progress import show_progress

DRAWN_CLEVR_FILES = (*CAPTION_FILES, "splits.json", "type_mapping.json", "changed_object.json")
SPOT_FOLDER = "images_test"

DEFAULT_COUNTS = {"train": 1000, "val": 100, "test": 200}
DEFAULT_CAPTIONS = 6
DEFAULT_JITTER = 1.0
MAX_SCENES = 1_000_000  # file names have six digits

_SPOT_ID_RANGE = 1_000_003  # a prime, so that no two scenes have the same id
_SPOT_ID_STEP = 350_003
_SECOND_ANNOTATOR_SHARE = 0.15  # of the pairs have one, as in Spot-the-Diff

# Several times as fast as OpenCV's defaults; the files are a fifth larger.
_PNG_SETTINGS = [
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_SUB,
]

Record = dict[str, Any]


@dataclass(frozen=True)
class DrawingJob:
    """Everything that the drawing of a scene depends on, except the scene's index."""

    folder: Path
    datatype: str
    seed: int
    captions_per_image: int
    jitter: float


class Layout(NamedTuple):
    """How a dataset is laid out: its image folders, its other files, and who writes them."""

    folders: tuple[str, ...]
    files: tuple[str, ...]
    draw: Callable[[DrawingJob, int], Record]
    write: Callable[[DrawingJob, dict[str, list[int]], list[Record]], None]


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. Wrong input prints one line and exits with 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    advice = Advice(worker_killed="use fewer --workers")
    return run_command(parser.prog, lambda: synthesize(args), advice)


def _parser() -> OneLineParser:
    parser = OneLineParser(description=first_line(__doc__))
    output = "folder to make; it must not exist, or be empty"
    layout = "layout (default: clevr)"
    seed = "another seed gives other scenes (default: 0)"
    captions = (
        f"clevr: captions for each pair (default: {DEFAULT_CAPTIONS}); spot has one for each change"
    )
    jitter = (
        "clevr: how much the camera and the lamps move between the pictures of a scene, "
        f"1 as in CLEVR-Change, 0 not at all (default: {DEFAULT_JITTER:g})"
    )
    workers = "processes (default: one for each core)"
    overwrite = "replace a dataset drawn there before"
    parser.add_argument("--output", type=Path, required=True, help=output)
    parser.add_argument("--datatype", choices=tuple(LAYOUTS), default="clevr", help=layout)
    for split, count in DEFAULT_COUNTS.items():
        text = f"scenes in {split} (default: {count})"
        parser.add_argument(f"--{split}", type=bounded(int, 0), default=count, help=text)
    parser.add_argument("--seed", type=bounded(int, 0, MAX_SEED), default=0, help=seed)
    parser.add_argument("--captions_per_image", type=bounded(int, 1, 100), help=captions)
    parser.add_argument("--jitter", type=bounded(float, 0, 1), help=jitter)
    parser.add_argument(
        "--workers", type=bounded(int, 1, MAX_WORKERS), default=os.cpu_count(), help=workers
    )
    parser.add_argument("--overwrite", action="store_true", help=overwrite)
    return parser


def synthesize(args: Namespace) -> None:
    """Draw the dataset that the options describe.

    Raises ValueError or OSError if that is not possible, and then leaves nothing behind.
    """
    problems = _problems(args)
    if problems:
        raise ValueError("; ".join(problems))
    splits = _split_indices(args)
    count = sum(map(len, splits.values()))
    layout = LAYOUTS[args.datatype]
    captions = args.captions_per_image or DEFAULT_CAPTIONS
    jitter = DEFAULT_JITTER if args.jitter is None else args.jitter
    start = time.perf_counter()
    with _atomic_folder(args.output) as folder:
        for name in layout.folders:
            (folder / name).mkdir()
        job = DrawingJob(folder, args.datatype, args.seed, captions, jitter)
        records = _draw_all(job, count, args.workers)
        layout.write(job, splits, records)
    seconds = time.perf_counter() - start
    show(
        f"{count} scenes drawn in {args.output} in {seconds:.1f} s "
        f"({count / seconds:.0f} scenes/s, {args.workers} workers)"
    )


def _problems(args: Namespace) -> list[str]:
    """Everything that is wrong with the options."""
    problems = _problems_with_counts(args)
    if args.captions_per_image is not None and args.datatype == "spot":
        problems.append(
            "--captions_per_image is for --datatype clevr: leave it out, "
            "spot has one sentence for each change"
        )
    if args.jitter is not None and args.datatype == "spot":
        problems.append("--jitter is for --datatype clevr: leave it out, spot has a fixed camera")
    return problems + _problems_with_output(args.output, args.overwrite)


def _problems_with_counts(args: Namespace) -> list[str]:
    total = sum(getattr(args, split) for split in SPLITS)
    if 0 < total <= MAX_SCENES:
        return []
    return [
        f"--train, --val and --test ask for {total} scenes: expected 1 to {MAX_SCENES} together"
    ]


def _problems_with_output(output: Path, overwrite: bool) -> list[str]:
    if output.exists() and not output.is_dir():
        return [f"--output {output} is a file: give a folder"]
    found = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    if found and not overwrite:
        return [
            f"--output {output} is not empty: give another folder, or --overwrite to replace it"
        ]
    foreign = found - _drawn_names()
    if foreign:
        return [
            f"--output {output} has {min(foreign)} in it, which is not part of a drawn dataset: "
            "give another folder"
        ]
    return []


def _drawn_names() -> set[str]:
    """What a folder that is replaced may hold: drawn datasets and their reformatted lists."""
    names = {f"reformat_{split}.json" for split in SPLITS}
    for layout in LAYOUTS.values():
        names.update(layout.folders, layout.files)
    return names


def _split_indices(args: Namespace) -> dict[str, list[int]]:
    """The numbers of each split's scenes, one split after the other."""
    indices = {}
    start = 0
    for split in SPLITS:
        stop = start + getattr(args, split)
        indices[split] = list(range(start, stop))
        start = stop
    return indices


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder next to `folder` that replaces it on success and is deleted on failure."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial_folder = folder.with_name(f"{folder.name}.partial-{token}")
    replaced = folder.with_name(f"{folder.name}.replaced-{token}")
    partial_folder.mkdir()
    try:
        yield partial_folder
        if folder.exists():
            _replace_folder(folder, partial_folder, replaced)
        else:
            partial_folder.rename(folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _replace_folder(folder: Path, new: Path, replaced: Path) -> None:
    """Put `new` at `folder`, whose content is at `replaced` until then. On failure it goes back."""
    folder.rename(replaced)
    try:
        new.rename(folder)
    except BaseException:
        replaced.rename(folder)
        raise
    shutil.rmtree(replaced)


def _draw_all(job: DrawingJob, count: int, workers: int) -> list[Record]:
    """Draw scenes 0 to count - 1, and return their records in order."""
    draw = partial(_draw, job)
    progress = partial(show_progress, what="scenes drawn", total=count, unit="scene")
    if workers == 1:
        return list(progress(map(draw, range(count))))
    # Spawned, because a forked process would inherit locks that OpenCV's threads hold.
    with start_pool(min(workers, count), cv2.setNumThreads, (1,), "spawn") as pool:
        return list(progress(pool.map(draw, range(count), chunksize=8)))


def _draw(job: DrawingJob, index: int) -> Record:
    """Write the pictures of one scene pair, and return what the JSON files say about it."""
    return LAYOUTS[job.datatype].draw(job, index)


def _write_picture(path: Path, scene: Scene, alpha: bool) -> None:
    picture = render(scene)
    if alpha:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA)
    path.write_bytes(cv2.imencode(".png", picture, _PNG_SETTINGS)[1])


def _sentences(pair: ScenePair, change: Change, count: int, rng: Random) -> list[str]:
    scene, scene_object = referent(pair, change)
    return change_sentences(change.type, scene, scene_object, change.value, count, rng)


def _draw_clevr(job: DrawingJob, index: int) -> Record:
    pair = sample_clevr_pair(job.seed, index, job.jitter)
    scenes = (pair.before, pair.after, pair.distractor)
    for (folder, prefix), scene in zip(FOLDERS.items(), scenes, strict=True):
        _write_picture(job.folder / folder / f"{prefix}{index:06d}.png", scene, alpha=True)
    (change,) = pair.changes
    rng = Random(f"{job.seed} captions {index}")
    return {
        "change_captions.json": _sentences(pair, change, job.captions_per_image, rng),
        "no_change_captions.json": no_change_sentences(job.captions_per_image, rng),
        "changed_object": _changed_object(change),
    }


def _changed_object(change: Change) -> dict[str, str]:
    """The changed object before the change, or an added one after it; its new color or material."""
    scene_object = change.before or change.after
    row = {"type": change.type}
    for name in ATTRIBUTES:
        row[name] = getattr(scene_object, name)
    if change.value:
        row[f"new_{change.type}"] = change.value
    return row


def _write_clevr(job: DrawingJob, splits: dict[str, list[int]], records: list[Record]) -> None:
    named = {f"{index:06d}.png": record for index, record in enumerate(records)}
    prefix = FOLDERS["images"]
    for file in CAPTION_FILES:
        captions = {f"{prefix}{name}": record[file] for name, record in named.items()}
        write_json(job.folder / file, captions)
    changed = {name: record["changed_object"] for name, record in named.items()}
    types: dict[str, list[str]] = {change_type: [] for change_type in CHANGE_TYPES}
    for name, row in changed.items():
        types[row["type"]].append(name)
    write_json(job.folder / "splits.json", splits)
    write_json(job.folder / "type_mapping.json", types)
    write_json(job.folder / "changed_object.json", changed)


def _draw_spot(job: DrawingJob, index: int) -> Record:
    pair = sample_spot_pair(job.seed, index)
    image_id = _spot_id(job.seed, index)
    folder = job.folder / SPOT_FOLDER
    _write_picture(folder / f"{image_id}.png", pair.before, alpha=False)
    _write_picture(folder / f"{image_id}_2.png", pair.after, alpha=False)
    rng = Random(f"{job.seed} captions {index}")
    annotators = 2 if rng.random() < _SECOND_ANNOTATOR_SHARE else 1
    entries = []
    for _ in range(annotators):
        sentences = [_sentences(pair, change, 1, rng)[0] for change in pair.changes]
        entries.append({"img_id": image_id, "sentences": sentences})
    return {"entries": entries}


def _spot_id(seed: int, index: int) -> str:
    first = Random(f"{seed} ids").randrange(_SPOT_ID_RANGE)
    return str((index * _SPOT_ID_STEP + first) % _SPOT_ID_RANGE)


def _write_spot(job: DrawingJob, splits: dict[str, list[int]], records: list[Record]) -> None:
    for split, indices in splits.items():
        entries = [entry for index in indices for entry in records[index]["entries"]]
        Random(f"{job.seed} {split}").shuffle(entries)
        write_json(job.folder / f"{split}.json", entries)


LAYOUTS = {
    "clevr": Layout(tuple(FOLDERS), DRAWN_CLEVR_FILES, _draw_clevr, _write_clevr),
    "spot": Layout(
        (SPOT_FOLDER,), tuple(f"{split}.json" for split in SPLITS), _draw_spot, _write_spot
    ),
}


if __name__ == "__main__":
    sys.exit(main())
