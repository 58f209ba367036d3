"""Draw a dataset of scenes in which something changes, in CLEVR-Change's or Spot-the-Diff's own layout (SPEC §3).

The scenes look like CLEVR's and their sentences follow CLEVR-Change's grammar; none of either's data is used. Scene i
depends on (--seed, i) alone, so neither the sizes of the splits nor the number of workers changes it.
"""

import json
import multiprocessing
import os
import secrets
import shutil
import signal
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import cv2
from tqdm import tqdm

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataloaders.pairs import SPLITS
from preprocess.scenes.drawing import render
from preprocess.scenes.geometry import Scene
from preprocess.scenes.sampling import (
    CHANGE_TYPES,
    Change,
    ScenePair,
    referent,
    sample_clevr_pair,
    sample_spot_pair,
)
from preprocess.scenes.sentences import change_sentences, no_change_sentences
from system.command import OneLineParser, run_command

CLEVR_FOLDERS = {"images": "default", "sc_images": "semantic", "nsc_images": "nonsemantic"}


CLEVR_FILES = ("change_captions", "no_change_captions", "splits", "type_mapping", "changed_object")


SPOT_FOLDER = "images_test"


MAX_SCENES = 1_000_000  # names have six digits


_SPOT_ID_RANGE = 1_000_003  # a prime, so that ids of different scenes differ


_SECOND_ANNOTATOR_SHARE = 0.15  # share of Spot's pairs that two people described


# Several times as fast as OpenCV's defaults; the files are a fifth larger.
_PNG = [
    cv2.IMWRITE_PNG_COMPRESSION,
    1,
    cv2.IMWRITE_PNG_STRATEGY,
    cv2.IMWRITE_PNG_STRATEGY_RLE,
    cv2.IMWRITE_PNG_FILTER,
    cv2.IMWRITE_PNG_FILTER_SUB,
]


@dataclass(frozen=True)
class DrawingJob:
    """Everything the drawing of one scene needs besides its index."""

    folder: Path
    datatype: str
    seed: int
    captions_per_image: int
    jitter: float


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help. Wrong input prints one line and exits with 2."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output", type=Path, required=True, help="folder to make; must not exist, or be empty"
    )
    parser.add_argument(
        "--datatype", choices=("clevr", "spot"), default="clevr", help="layout (default: clevr)"
    )
    for split, count in zip(SPLITS, (1000, 100, 200), strict=True):
        parser.add_argument(
            f"--{split}", type=int, default=count, help=f"scenes in {split} (default: {count})"
        )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed gives other scenes (default: 0)"
    )
    parser.add_argument(
        "--captions_per_image",
        type=int,
        help="clevr: different sentences a pair (default: 6); spot has one a change",
    )
    parser.add_argument(
        "--jitter",
        type=float,
        default=1.0,
        help="clevr: how much camera and lamps move between the pictures of "
        "a scene, 1 as in CLEVR-Change, 0 not at all (default: 1)",
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: one a core)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a dataset drawn there before"
    )
    args = parser.parse_args(argv)
    return run_command(parser.prog, lambda: synthesize(args))


def synthesize(args: Namespace) -> None:
    """Draw the dataset the options ask for; ValueError or OSError, and nothing written, where that cannot be."""
    _check(args)
    counts = [getattr(args, split) for split in SPLITS]
    stops = list(accumulate(counts))
    splits = {
        name: list(range(stop - count, stop))
        for name, count, stop in zip(SPLITS, counts, stops, strict=True)
    }
    start = time.perf_counter()
    with _atomic_folder(args.output) as folder:
        job = DrawingJob(
            folder, args.datatype, args.seed, args.captions_per_image or 6, args.jitter
        )
        for name in CLEVR_FOLDERS if args.datatype == "clevr" else (SPOT_FOLDER,):
            (folder / name).mkdir()
        records = _draw_all(job, stops[-1], args.workers)
        (_write_clevr if args.datatype == "clevr" else _write_spot)(job, splits, records)
    seconds = time.perf_counter() - start
    print(
        f"{stops[-1]} scenes drawn in {args.output} in {seconds:.1f} s "
        f"({stops[-1] / seconds:.0f} scenes/s, {args.workers} workers)"
    )


def _check(args: Namespace) -> None:
    """Raise one ValueError that names all wrong options."""
    problems = [
        f"--{s} is {getattr(args, s)}: expected 0 or more" for s in SPLITS if getattr(args, s) < 0
    ]
    total = sum(getattr(args, split) for split in SPLITS)
    if not problems and not 0 < total <= MAX_SCENES:
        problems.append(
            f"--train, --val and --test ask for {total} scenes: expected 1 to {MAX_SCENES} together"
        )
    if args.captions_per_image is not None and args.datatype == "spot":
        problems.append(
            "--captions_per_image is for --datatype clevr: leave it out, spot has one sentence a change"
        )
    elif args.captions_per_image is not None and args.captions_per_image < 1:
        problems.append(f"--captions_per_image is {args.captions_per_image}: expected 1 or more")
    if not 0 <= args.jitter <= 1:
        problems.append(f"--jitter is {args.jitter}: expected 0 to 1")
    if args.workers < 1:
        problems.append(f"--workers is {args.workers}: expected 1 or more")
    problem = _problem_with_output(args.output, args.overwrite)
    if problem:
        problems.append(problem)
    if problems:
        raise ValueError("; ".join(problems))


def _problem_with_output(output: Path, overwrite: bool) -> str | None:
    if output.exists() and not output.is_dir():
        return f"--output {output} is a file: give a folder"
    there = {entry.name for entry in output.iterdir()} if output.is_dir() else set()
    ours = {
        *CLEVR_FOLDERS,
        SPOT_FOLDER,
        *(f"{name}.json" for name in (*CLEVR_FILES, *SPLITS)),
        *(f"reformat_{split}.json" for split in SPLITS),
    }
    if there and not overwrite:
        return f"--output {output} is not empty: give another folder, or --overwrite to replace it"
    if there - ours:
        return f"--output {output} holds {min(there - ours)}, which no dataset of ours has: give another folder"
    return None


@contextmanager
def _atomic_folder(folder: Path) -> Iterator[Path]:
    """A new sibling folder that takes the folder's place when the block ends well, and is gone when it does not."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    partial_folder, replaced = (
        folder.with_name(f"{folder.name}.{word}-{token}") for word in ("partial", "replaced")
    )
    partial_folder.mkdir()
    try:
        yield partial_folder
        if folder.exists():
            folder.rename(replaced)
        partial_folder.rename(folder)
        if replaced.exists():
            shutil.rmtree(replaced)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def _draw_all(job: DrawingJob, count: int, workers: int) -> list[dict[str, Any]]:
    """Draw scenes 0 to count - 1 and return their records in order."""
    progress = partial(tqdm, total=count, unit="scene", disable=None)
    if workers == 1:
        return list(progress(map(partial(_draw, job), range(count))))
    # Not forked: OpenCV's threads, once started in this process, would leave locks that nobody opens.
    with multiprocessing.get_context("spawn").Pool(min(workers, count), _start_worker) as pool:
        return list(progress(pool.imap(partial(_draw, job), range(count), chunksize=8)))


def _start_worker() -> None:
    cv2.setNumThreads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers


def _draw(job: DrawingJob, index: int) -> dict[str, Any]:
    """Write the pictures of one scene and return what the JSON files say of it."""
    return (_draw_clevr if job.datatype == "clevr" else _draw_spot)(job, index)


def _write_picture(path: Path, scene: Scene, alpha: bool = False) -> None:
    picture = render(scene)
    if alpha:
        picture = cv2.cvtColor(picture, cv2.COLOR_BGR2BGRA)
    path.write_bytes(cv2.imencode(".png", picture, _PNG)[1])


def _sentences(pair: ScenePair, change: Change, count: int, rng: Random) -> list[str]:
    return change_sentences(change.type, *referent(pair, change), change.value, count, rng)


def _draw_clevr(job: DrawingJob, index: int) -> dict[str, Any]:
    pair = sample_clevr_pair(job.seed, index, job.jitter)
    scenes = (pair.before, pair.after, pair.distractor)
    for (folder, name), scene in zip(CLEVR_FOLDERS.items(), scenes, strict=True):
        _write_picture(job.folder / folder / f"CLEVR_{name}_{index:06d}.png", scene, alpha=True)
    (change,) = pair.changes
    rng = Random(f"{job.seed} captions {index}")
    return {
        "change_captions": _sentences(pair, change, job.captions_per_image, rng),
        "no_change_captions": no_change_sentences(job.captions_per_image, rng),
        "changed_object": _changed_object(change),
    }


def _changed_object(change: Change) -> dict[str, str]:
    thing = change.before or change.after
    new = {f"new_{change.type}": change.value} if change.value else {}
    looks = {name: getattr(thing, name) for name in ("size", "color", "material", "shape")}
    return {"type": change.type, **looks, **new}


def _write_clevr(
    job: DrawingJob, splits: dict[str, list[int]], records: list[dict[str, Any]]
) -> None:
    names = [f"{index:06d}.png" for index in range(len(records))]
    types: dict[str, list[str]] = {kind: [] for kind in CHANGE_TYPES}
    for name, record in zip(names, records, strict=True):
        types[record["changed_object"]["type"]].append(name)
    captions = {
        kind: {
            f"CLEVR_default_{name}": record[kind]
            for name, record in zip(names, records, strict=True)
        }
        for kind in ("change_captions", "no_change_captions")
    }
    changed = {name: record["changed_object"] for name, record in zip(names, records, strict=True)}
    for name, value in zip(CLEVR_FILES, (*captions.values(), splits, types, changed), strict=True):
        (job.folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")


def _draw_spot(job: DrawingJob, index: int) -> dict[str, Any]:
    pair = sample_spot_pair(job.seed, index)
    image_id = str(
        (index * 350_003 + Random(f"{job.seed} ids").randrange(_SPOT_ID_RANGE)) % _SPOT_ID_RANGE
    )
    for suffix, scene in (("", pair.before), ("_2", pair.after)):
        _write_picture(job.folder / SPOT_FOLDER / f"{image_id}{suffix}.png", scene)
    rng = Random(f"{job.seed} captions {index}")
    annotators = 1 + (rng.random() < _SECOND_ANNOTATOR_SHARE)
    said = [
        [_sentences(pair, change, 1, rng)[0] for change in pair.changes] for _ in range(annotators)
    ]
    return {"entries": [{"img_id": image_id, "sentences": sentences} for sentences in said]}


def _write_spot(
    job: DrawingJob, splits: dict[str, list[int]], records: list[dict[str, Any]]
) -> None:
    for split, indices in splits.items():
        entries = [entry for index in indices for entry in records[index]["entries"]]
        Random(f"{job.seed} {split}").shuffle(entries)
        (job.folder / f"{split}.json").write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
