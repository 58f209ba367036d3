"""The data path at full size: start-up, memory of the workers, pairs per second.

    python benchmarks/data_path.py --datatype clevr --scenes 40000 --workers 1 2 4

prints one JSON line. 60 scenes are drawn and reused under other names. With `--datatype spot
--annotations FOLDER` ids and sentences come from a real train.json. Images are read and resized for
`--read` pairs only; the captions of all pairs are read once.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import torch

from benchmarks.machine import machine_info
from dataloaders.batches import build_batches
from dataloaders.datasets import open_dataset
from dataloaders.datasets.clevr_change import CAPTION_FILES, FOLDERS
from dataloaders.datasets.spot_the_diff import merge_entries, read_annotations
from dataloaders.images import ImageFiles
from dataloaders.pairs import ImagePair
from dataloaders.samples import CaptionSamples, ImageReader, RetrievalSamples
from dataloaders.storage.packed_list import PackedList
from modules.tokenizer import tokenize_caption
from preprocess import synthesize
from system.command import run_command
from system.json_files import read_json, write_json
from system.parser import OneLineParser, first_line

NUM_DRAWN = 60
MAX_WORDS = 32
CAPTION_BATCH = 64
IMAGE_BATCH = 16
MIN_SCENES = 256
PREFETCHED = 2  # batches that a worker makes ahead, by torch's default
SAMPLES = {"adaptation": RetrievalSamples, "finetuning": CaptionSamples}

tokenize = partial(tokenize_caption, max_words=MAX_WORDS)


class BlankImages:
    """An image reader that reads nothing, for runs in which only captions matter."""

    def __call__(self, paths: Sequence[str]) -> torch.Tensor:
        return torch.zeros(len(paths), 3, 1, 1, dtype=torch.uint8)


def replicate_clevr(drawn: Path, root: Path, num_scenes: int, num_drawn: int = NUM_DRAWN) -> None:
    """Repeat the drawn scenes under `num_scenes` numbers; images are hard links."""
    for folder, prefix in FOLDERS.items():
        (root / folder).mkdir(parents=True)
        for number in range(num_scenes):
            source = drawn / folder / f"{prefix}{number % num_drawn:06d}.png"
            os.link(source, root / folder / f"{prefix}{number:06d}.png")
    for file in CAPTION_FILES:
        captions = list(read_json(drawn / file, dict).values())
        replicated = {
            f"CLEVR_default_{number:06d}.png": captions[number % num_drawn]
            for number in range(num_scenes)
        }
        write_json(root / file, replicated)
    write_json(root / "splits.json", {"train": list(range(num_scenes)), "val": [], "test": []})


def replicate_spot(drawn: Path, root: Path, entries: list[dict[str, Any]]) -> None:
    """The merged entries of a train.json, with drawn images under their ids."""
    images = root / "images_test"
    images.mkdir(parents=True)
    write_json(root / "reformat_train.json", entries)
    afters = sorted((drawn / "images_test").glob("*_2.png"))
    for number, entry in enumerate(entries):
        after = afters[number % len(afters)]
        before = after.with_name(after.name.replace("_2.png", ".png"))
        os.link(after, images / f"{entry['img_id']}_2.png")
        os.link(before, images / f"{entry['img_id']}.png")


def private_memory(process: int) -> float:
    """MB that a process does not share with any other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def caption_rate(samples_class: type, pairs: Sequence[ImagePair], workers: int) -> dict[str, float]:
    """Samples per second over all captions without images, and how much a worker's memory grows.

    That is the largest growth of a worker's private memory, in MB.
    """
    loader = build_batches(
        samples_class(pairs, BlankImages(), tokenize), CAPTION_BATCH, True, workers
    )
    batches = iter(loader.loader)
    next(batches)
    processes = [worker.pid for worker in batches._workers]
    memory_before = [private_memory(process) for process in processes]
    start = time.perf_counter()
    num_batches = len(loader) - 2  # workers may be gone when the last batch arrives
    for _ in range(num_batches):
        next(batches)
    rate = num_batches * CAPTION_BATCH / (time.perf_counter() - start)
    memory = [private_memory(process) for process in processes]
    grown = max(after - before for after, before in zip(memory, memory_before, strict=True))
    return {"captions_only_per_second": round(rate), "worker_grows_mb": round(grown, 1)}


def pair_rate(
    samples_class: type,
    pairs: Sequence[ImagePair],
    workers: int,
    num_pairs: int,
    images: ImageReader,
    batch_size: int = IMAGE_BATCH,
    for_gpu: bool = False,
) -> float:
    """Pairs per second that are read, resized, tokenized and collated, once workers are at work."""
    samples = samples_class(pairs, images, tokenize)
    loader = build_batches(samples, batch_size, True, workers, for_gpu=for_gpu)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    ready = workers * PREFETCHED
    for _ in range(ready + 1):
        next(batches)
    num_batches = max(num_pairs // batch_size, 1)
    start = time.perf_counter()
    for _ in range(num_batches):
        next(batches)
    return round(num_batches * batch_size / (time.perf_counter() - start), 1)


def measure_dataset(
    datatype: str, root: Path, workers: Sequence[int], num_read: int
) -> dict[str, object]:
    """All measurements of one dataset."""
    start = time.perf_counter()
    dataset = open_dataset(datatype, root, root / "images_test")
    pairs = PackedList(dataset.checked_pairs("train"))
    startup = time.perf_counter() - start
    results: dict[str, object] = {"scenes": len(pairs), "startup_seconds": round(startup, 2)}
    objects = list(pairs)  # Python objects instead of shared tensors
    most_workers = max(workers)
    for training, samples_class in SAMPLES.items():
        row: dict[str, object] = dict(caption_rate(samples_class, pairs, most_workers))
        by_objects = caption_rate(samples_class, objects, most_workers)
        row["worker_grows_mb_by_objects"] = by_objects["worker_grows_mb"]
        row["pairs_per_second"] = {
            str(count): pair_rate(samples_class, pairs, count, num_read, ImageFiles())
            for count in workers
        }
        results[training] = row
    return results


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Draw scenes, replicate them, and measure."""
    entries = []
    if args.datatype == "spot":  # read first, so that a wrong folder is refused at once
        entries = merge_entries(read_annotations(args.annotations / "train.json"))
    with tempfile.TemporaryDirectory() as folder:
        drawn = Path(folder) / "drawn"
        root = Path(folder) / "data"
        draw = ["--output", str(drawn), "--datatype", args.datatype, "--train", str(NUM_DRAWN)]
        with contextlib.redirect_stdout(sys.stderr):
            synthesize.main([*draw, "--val", "0", "--test", "0"])
        if args.datatype == "clevr":
            replicate_clevr(drawn, root, args.scenes)
        else:
            replicate_spot(drawn, root, entries)
        return {
            "benchmark": f"data path, {args.datatype}",
            "workers": max(args.workers),
            **measure_dataset(args.datatype, root, args.workers, args.read),
            **machine_info(torch.device("cpu")),
        }


def _parser() -> OneLineParser:
    parser = OneLineParser(description=first_line(__doc__))
    scenes = "clevr: number of scenes (default: 4000)"
    annotations = "spot: folder of Spot-the-Diff's train.json"
    workers = "numbers of workers (default: 1 2 4)"
    read = "pairs whose images are read (default: 480)"
    parser.add_argument("--datatype", choices=("clevr", "spot"), required=True)
    parser.add_argument("--scenes", type=int, default=4000, help=scenes)
    parser.add_argument("--annotations", type=Path, help=annotations)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4], help=workers)
    parser.add_argument("--read", type=int, default=480, help=read)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Print one JSON line."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.datatype == "spot" and not args.annotations:
        parser.error("--datatype spot needs --annotations")
    if args.scenes < MIN_SCENES or min(args.workers) < 1 or args.read < IMAGE_BATCH:
        parser.error(
            f"expected --scenes of at least {MIN_SCENES}, --workers of at least 1 "
            f"and --read of at least {IMAGE_BATCH}"
        )
    return run_command(parser.prog, lambda: print(json.dumps(measure(args))))


if __name__ == "__main__":
    sys.exit(main())
