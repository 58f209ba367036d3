"""The data path at full size: start-up, memory that each worker adds to the shared one, pairs a second.

    python benchmarks/data_path.py --datatype clevr --scenes 40000 --workers 1 2 4

prints one JSON line. 60 scenes are drawn and stand, under other names, for all; `--datatype spot --annotations FOLDER` takes the
ids and sentences of a real train.json instead. Images are read and resized for `--read` pairs only, all captions once.
"""

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_info
from dataloaders.batches import build_loader
from dataloaders.datasets import open_dataset
from dataloaders.datasets.clevr_change import FOLDERS
from dataloaders.datasets.spot_the_diff import merge_entries, read_annotations
from dataloaders.images import ImageFiles
from dataloaders.pairs import ImagePair
from dataloaders.samples import CaptionSamples, RetrievalSamples
from dataloaders.storage.packed_list import PackedList
from modules.tokenizer import tokenize_caption
from preprocess import synthesize
from system.command import OneLineParser, run_command
from system.json_files import read_json, write_json

DRAWN = 60
tokenize = partial(tokenize_caption, max_words=32)


class NoImages:
    """Stands in for the images where only the annotations are looked at."""

    def __call__(self, paths: list[str]) -> torch.Tensor:
        return torch.zeros(len(paths), 3, 1, 1, dtype=torch.uint8)


def enlarge_clevr(drawn: Path, root: Path, scenes: int) -> None:
    """The drawn scenes again and again under `scenes` numbers: hard links and repeated captions."""
    for folder, prefix in FOLDERS.items():
        (root / folder).mkdir(parents=True)
        for number in range(scenes):
            os.link(
                drawn / folder / f"{prefix}{number % DRAWN:06d}.png",
                root / folder / f"{prefix}{number:06d}.png",
            )
    for name in ("change_captions.json", "no_change_captions.json"):
        captions = list(read_json(drawn / name, dict).values())
        write_json(
            root / name, {f"CLEVR_default_{n:06d}.png": captions[n % DRAWN] for n in range(scenes)}
        )
    write_json(root / "splits.json", {"train": list(range(scenes)), "val": [], "test": []})


def enlarge_spot(drawn: Path, root: Path, annotations: Path) -> None:
    """A real train.json, reformatted, with drawn images under its ids."""
    (root / "images_test").mkdir(parents=True)
    pictures = sorted((drawn / "images_test").glob("*_2.png"))
    write_json(
        root / "reformat_train.json",
        merge_entries(read_annotations(annotations / "train.json")),
    )
    for number, (image_id, _) in enumerate(read_annotations(root / "reformat_train.json")):
        after = pictures[number % len(pictures)]
        os.link(after, root / "images_test" / f"{image_id}_2.png")
        os.link(
            after.with_name(after.name.replace("_2.png", ".png")),
            root / "images_test" / f"{image_id}.png",
        )


def private_memory(process: int) -> float:
    """MB that a process shares with nobody."""
    with open(f"/proc/{process}/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Private_")) / 1024


def captions_only(samples: type, scenes: Sequence[ImagePair], workers: int) -> dict[str, float]:
    """All sentences once without images: samples a second, and what the worker that grows most adds to its own memory."""
    loader = build_loader(samples(scenes, NoImages(), tokenize), 64, True, workers)
    batches = iter(loader.loader)
    next(batches)
    before = [private_memory(worker.pid) for worker in batches._workers]
    start = time.perf_counter()
    for _ in range(len(loader) - 2):  # not to the end, where workers may be gone
        next(batches)
    rate = (len(loader) - 2) * 64 / (time.perf_counter() - start)
    grown = [
        private_memory(worker.pid) - mb for worker, mb in zip(batches._workers, before, strict=True)
    ]
    return {"captions_only_per_second": round(rate), "worker_grows_mb": round(max(grown), 1)}


def pairs_per_second(samples: type, scenes: Sequence[ImagePair], workers: int, read: int) -> float:
    """Pairs decoded, resized, tokenised and collated."""
    batches = iter(build_loader(samples(scenes, ImageFiles(), tokenize), 16, True, workers))
    next(batches)
    start = time.perf_counter()
    for _ in range(read // 16):
        next(batches)
    return round(read // 16 * 16 / (time.perf_counter() - start), 1)


def run(datatype: str, root: Path, workers: list[int], read: int) -> dict[str, object]:
    """All measurements of one dataset."""
    start = time.perf_counter()
    scenes = PackedList(open_dataset(datatype, root, root / "images_test").checked_pairs("train"))
    startup = time.perf_counter() - start
    results: dict[str, object] = {"scenes": len(scenes), "startup_seconds": round(startup, 2)}
    objects = list(scenes)  # as it would be without shared tensors
    for name, samples in (("adaptation", RetrievalSamples), ("finetuning", CaptionSamples)):
        results[name] = captions_only(samples, scenes, max(workers))
        results[name]["worker_grows_mb_by_objects"] = captions_only(samples, objects, max(workers))[
            "worker_grows_mb"
        ]
        results[name]["pairs_per_second"] = {
            str(n): pairs_per_second(samples, scenes, n, read) for n in workers
        }
    return results


def main(argv: list[str] | None = None) -> int:
    """Print one JSON line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--datatype", choices=("clevr", "spot"), required=True)
    parser.add_argument(
        "--scenes", type=int, default=4000, help="CLEVR-Change's scenes (default: 4000)"
    )
    parser.add_argument("--annotations", type=Path, help="folder of Spot-the-Diff's train.json")
    parser.add_argument(
        "--workers",
        type=int,
        nargs="+",
        default=[1, 2, 4],
        help="numbers of workers (default: 1 2 4)",
    )
    parser.add_argument(
        "--read", type=int, default=480, help="pairs whose images are read (default: 480)"
    )
    args = parser.parse_args(argv)
    if args.datatype == "spot" and not args.annotations:
        parser.error("--datatype spot needs --annotations")
    if args.scenes < 256 or min(args.workers) < 1 or args.read < 16:
        parser.error(
            "expected --scenes of at least 256, --workers of at least 1 and --read of at least 16"
        )
    return run_command(parser.prog, lambda: print(json.dumps(measure(args))))


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Draw, enlarge, measure."""
    with tempfile.TemporaryDirectory() as folder:
        drawn, root = Path(folder) / "drawn", Path(folder) / "data"
        with contextlib.redirect_stdout(sys.stderr):
            splits = f"--train {DRAWN} --val 0 --test 0".split()
            synthesize.main(["--output", str(drawn), "--datatype", args.datatype, *splits])
        if args.datatype == "clevr":
            enlarge_clevr(drawn, root, args.scenes)
        else:
            enlarge_spot(drawn, root, args.annotations)
        head = {"benchmark": f"data path, {args.datatype}", "workers": max(args.workers)}
        return {
            **head,
            **run(args.datatype, root, args.workers, args.read),
            **machine_info(torch.device("cpu")),
        }


if __name__ == "__main__":
    raise SystemExit(main())
