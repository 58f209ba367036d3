"""What the parts of benchmarks/gpu.py share: sizes, rows, drawn scenes, runs of the scripts."""

import gc
import json
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.machine import all_cores
from benchmarks.steps import PUBLISHED, Model
from modules.model.clip_sizes import ClipSizes
from modules.tokenizer import VOCAB_SIZE
from preprocess import synthesize
from system.compute import choose_precision
from system.escaping import summarize_error
from system.places import ROOT
from system.runtime import Runtime

Row = dict[str, Any]
ERROR_LINE = re.compile(r"^(\[rank\d+\]: )?[\w.]*(Error|Exception): \S")
STAGES = {"adaptation": "retrieval", "finetuning": "caption"}
TINY_DECODER = {
    "hidden_size": 64,
    "num_attention_heads": 1,
    "intermediate_size": 64,
    "num_decoder_layers": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TINY = Model(ClipSizes(64, 64, 2, 64, 32, 77, 600, 64, 1), 1, 12, TINY_DECODER)


class Scale(NamedTuple):
    """How large everything is."""

    model: Model
    matrix_size: int
    training_batches: tuple[int, ...]
    fp16_batch: int
    compiled_batch: int
    captioning_batches: tuple[int, ...]
    steps: int
    """Of a timed run."""
    repeats: int
    scenes: int
    """The loader's pairs are these drawn ones, repeated."""
    loader_pairs: int
    loader_batch: int
    read_pairs: int
    demo_scenes: int
    demo_test_scenes: int
    demo_epochs: tuple[int, int]
    """Of adaptation and of finetuning."""
    run_scenes: int
    """Of the short runs that are stopped and continued."""
    golden_patches: tuple[str, ...] = ("2d", "3d")


FULL = Scale(
    model=PUBLISHED,
    matrix_size=8192,
    training_batches=(128, 256, 64, 16),
    fp16_batch=64,
    compiled_batch=128,
    captioning_batches=(1024, 256, 64),
    steps=5,
    repeats=3,
    scenes=60,
    loader_pairs=2048,
    loader_batch=64,
    read_pairs=8192,
    demo_scenes=1000,
    demo_test_scenes=200,
    demo_epochs=(5, 20),
    run_scenes=60,
)
SMOKE = Scale(
    model=TINY,
    matrix_size=256,
    training_batches=(4, 2),
    fp16_batch=2,
    compiled_batch=4,
    captioning_batches=(4, 2),
    steps=1,
    repeats=1,
    scenes=2,
    loader_pairs=16,
    loader_batch=4,
    read_pairs=8,
    demo_scenes=4,
    demo_test_scenes=2,
    demo_epochs=(1, 1),
    run_scenes=4,
    golden_patches=("2d",),
)


@dataclass(frozen=True)
class Setting:
    """Where a part runs: device, sizes, and a folder of its own that is deleted afterwards."""

    device: torch.device
    scale: Scale
    folder: Path

    @property
    def workers(self) -> int:
        """Processes that read images."""
        return 2 if self.scale is SMOKE else min(16, all_cores())

    def runtime(self, precision: str) -> Runtime:
        """A single process. Raises ValueError for a precision that the device lacks."""
        return Runtime(device=self.device, precision=choose_precision(precision, self.device))


def attempt(what: str, work: Callable[[], Row], **fields: Any) -> Row:
    """A row of `fields` and of what `work` returns, or of the reason for which it failed."""
    row = {"what": what, **fields}
    try:
        return {**row, **work()}
    except (Exception, SystemExit) as error:  # the scripts end with SystemExit
        traceback.clear_frames(error.__traceback__)  # they hold tensors
        reason = summarize_error(error)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**row, "failed": reason}


def check(condition: bool, **facts: Any) -> Row:
    """The row of a check."""
    return {"ok": bool(condition), **facts}


def draw_scenes(setting: Setting, name: str, train: int, test: int = 0) -> Path:
    """A new folder with drawn scenes in CLEVR-Change's layout."""
    folder = setting.folder / name
    workers = 1 if setting.scale is SMOKE else min(16, all_cores())
    words = ["--output", str(folder), "--train", str(train), "--val", "0", "--test", str(test)]
    words += ["--captions_per_image", "3", "--jitter", "0", "--workers", str(workers)]
    if synthesize.main(words):
        raise RuntimeError("no scenes could be drawn")
    return folder


def write_sizes(folder: Path, sizes: ClipSizes) -> Path:
    """The file of sizes from which a script makes a CLIP with random weights.

    Its vocabulary is the tokenizer's, whatever that of the sizes is.
    """
    path = folder / "sizes.json"
    path.write_text(json.dumps({**asdict(sizes), "vocab_size": VOCAB_SIZE}))
    return path


def adaptation_words(setting: Setting, data: Path, output: Path, *more: str) -> list[str]:
    """The command line of an adaptation on drawn scenes, without the interpreter."""
    found = ["main_task_retrieval.py", "--do_train", "--datatype", "clevr"]
    found += ["--data_path", str(data), "--output_dir", str(output)]
    found += ["--device", setting.device.type, "--n_display", "1", "--freeze_layer_num", "-1"]
    return [*found, *more]


@contextmanager
def start(words: Sequence[str]) -> Iterator[subprocess.Popen]:
    """A script of this project in a process of its own, killed at the end of the block.

    What it prints, on both channels, is its `stdout`.
    """
    process = subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.stdout.close()
        process.wait()


def run_to_end(words: Sequence[str]) -> str:
    """What a script prints. Raises RuntimeError, with its last line, if it fails."""
    with start(words) as process:
        printed, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{words[0]} ended with {process.returncode}: {find_reason(printed)}")
    return printed


def wait_for_line(process: subprocess.Popen, text: str) -> float:
    """Seconds until a line contains the text. Raises RuntimeError if the process ends before."""
    start_time = time.perf_counter()
    line = ""
    for line in process.stdout:
        if text in line:
            return time.perf_counter() - start_time
    raise RuntimeError(f"it ended before {text!r}: {line.strip()}")


def find_reason(printed: str) -> str:
    """The line of a failed process that says why: the last one with an error, else the last one.

    torchrun prints a summary after the line of the process that failed.
    """
    lines = printed.strip().splitlines() or [""]
    errors = [line for line in lines if ERROR_LINE.search(line)]
    return (errors or lines)[-1]


def last_line(text: str) -> str:
    """The last line of a text; empty if it has none."""
    return text.strip().rpartition("\n")[2]
