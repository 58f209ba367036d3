"""The cost of a training step and of captioning, with images that are already decoded.

    python benchmarks/steps.py --what finetuning --precision fp32
    torchrun --nproc_per_node=2 benchmarks/steps.py --what adaptation

print one JSON line. The cost of a pair is seconds × the machine's float32 GEMM rate ÷ pairs; see
README.md here. The model is ViT-B/32 in the published sizes, with random weights. Several processes
share the pairs of a batch.
"""

import contextlib
import json
import logging
import os
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flops
from benchmarks.machine import all_cores, gemm_rate, machine_info, time_runs
from dataloaders.batches import trim_padding
from modules.clip4idc import CLIP4IDC
from modules.generation import generate
from modules.model.clip_sizes import ClipSizes
from modules.options.decoding import Decoding
from modules.options.groups import TrainingOptions
from modules.registries import OBJECTIVES
from modules.tokenizer import PAD, tokenize_caption
from modules.training.loop import train_epoch
from modules.training.objectives import TrainingData
from modules.training.output import NoOutput
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from modules.weights.sources import random_clip
from system.command import OneLineParser
from system.compute import DTYPES, keep_freed_memory, use_fast_matmuls
from system.runtime import Runtime
from system.signals import StopSignals

VIT_B_32 = ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12)
INTRA_LAYERS = 9
MAX_WORDS = 32
BEAM_SIZE = 5
SEED = 42

# Similar to Spot-the-Diff's in kind and length.
SENTENCES = (
    "the white car near the entrance is gone",
    "there are two more people walking on the sidewalk",
    "the man in the dark shirt has moved closer to the truck",
    "a person carrying a bag is now at the corner",
    "the group by the door is no longer there",
    "one of the parked cars has left",
    "the van is a little further to the right",
    "a cyclist has appeared in the middle of the road",
)
# Batch name → name in `tokenize_caption`'s arrays.
TEXT_ARRAYS = {
    "retrieval": {"text_ids": "retrieval_text_ids", "text_mask": "retrieval_text_mask"},
    "caption": {name: name for name in ("caption_input_ids", "caption_mask", "caption_target_ids")},
}


class Timing(NamedTuple):
    """Seconds of each run, and the least operations that a pair needs, in GFLOP."""

    seconds: list[float]
    min_gflop_per_pair: float


class RepeatedBatch:
    """A loader that yields the same batch `steps` times."""

    def __init__(self, batch: dict[str, Any], steps: int) -> None:
        self.batch = batch
        self.steps = steps

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """All epochs are the same."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([self.batch] * self.steps)


def random_model(task: str) -> CLIP4IDC:
    """ViT-B/32 and, for captions, the published captioner; random weights from a fixed seed."""
    torch.manual_seed(0)
    return CLIP4IDC.from_weights(random_clip(VIT_B_32), task)


def random_batch(task: str, num_pairs: int) -> dict[str, Any]:
    """Images of noise with sentences, in the form of the loaders' batches."""
    sentences = [SENTENCES[number % len(SENTENCES)] for number in range(num_pairs)]
    arrays = [tokenize_caption(sentence, MAX_WORDS) for sentence in sentences]
    side = VIT_B_32.image_resolution
    batch: dict[str, Any] = {
        "images": torch.randint(0, 256, (num_pairs, 2, 3, side, side), dtype=torch.uint8),
        "id": [str(number) for number in range(num_pairs)],
    }
    for name, array_name in TEXT_ARRAYS[task].items():
        rows = torch.stack([torch.from_numpy(array[array_name]) for array in arrays])
        batch[name] = rows if task == "retrieval" else rows[:, None]  # (B, L) or (B, 1, L)
    return trim_padding(batch)


def time_adaptation(
    num_pairs: int, runtime: Runtime, repeats: int, compiled: bool = False
) -> Timing:
    """Steps of the real training loop on this process's `num_pairs`."""
    model = random_model("retrieval")
    batch = random_batch("retrieval", num_pairs)
    seconds = _time_training("contrastive", model, batch, runtime, repeats, compiled)
    pair = flops.pair_encoder(VIT_B_32, INTRA_LAYERS)
    text = flops.text_encoder(VIT_B_32, batch["text_ids"].shape[-1])
    return Timing(seconds, _training_gflop(pair + text))


def time_finetuning(
    num_pairs: int, runtime: Runtime, repeats: int, compiled: bool = False
) -> Timing:
    """Steps of the real training loop on this process's `num_pairs`."""
    model = random_model("caption")
    batch = random_batch("caption", num_pairs)
    seconds = _time_training("cross_entropy", model, batch, runtime, repeats, compiled)
    pair = flops.pair_encoder(VIT_B_32, INTRA_LAYERS)
    num_targets = int((batch["caption_target_ids"] != PAD).sum()) / num_pairs
    num_words = batch["caption_mask"].shape[-1]
    encoder, decoder = _captioner_flops(model, num_words, num_targets)
    return Timing(seconds, _training_gflop(pair + encoder + decoder))


def _captioner_flops(model: CLIP4IDC, num_words: int, num_targets: float) -> tuple[float, float]:
    """Operations of the captioner's encoder, and those of its decoder with the vocabulary."""
    config = model.decoder.config
    num_tokens = 2 * VIT_B_32.num_tokens
    decoder = flops.caption_decoder(config, num_tokens, num_words)
    vocabulary = flops.vocabulary(VIT_B_32, num_targets)
    return flops.caption_encoder(config, num_tokens), decoder + vocabulary


def _training_gflop(forward: float) -> float:
    """GFLOP of forward and backward passes; backward takes twice as many operations as forward."""
    return 3e-9 * forward


def _time_training(
    objective_name: str,
    model: CLIP4IDC,
    batch: dict[str, Any],
    runtime: Runtime,
    repeats: int,
    compiled: bool,
) -> list[float]:
    trainer = Trainer.build(
        model,
        OBJECTIVES[objective_name](model, TrainingData([], MAX_WORDS)),
        RepeatedBatch(batch, 1),
        TrainingOptions(coef_lr=1e-3, compile=compiled),
        SEED,
        runtime,
        StopSignals(),
        train_token_embedding=objective_name == "cross_entropy",
    )

    def work() -> None:
        train_epoch(trainer, NoOutput(), Progress(), log_every=100)

    return time_runs(work, runtime.device, repeats)


def time_captioning(num_pairs: int, runtime: Runtime, repeats: int, beams: int) -> Timing:
    """Captions of a batch by greedy or beam search, each of MAX_WORDS words."""
    decoding = Decoding(beam_size=beams)
    model = random_model("caption").to(runtime.device).eval()
    with torch.no_grad():
        model.decoder.predictions.bias[-1] = -1e4  # EOT never comes: no caption ends early
    images = random_batch("caption", num_pairs)["images"]

    @torch.no_grad()
    def work() -> None:
        with runtime.autocast():
            normalized = model.normalize_images(images.to(runtime.device))
            tokens = model.encode_against_first(normalized).tokens
            num_words = generate(model, tokens, MAX_WORDS, decoding).shape[-1]
        if num_words != MAX_WORDS:
            raise RuntimeError(
                f"decoding ended after {num_words} steps of {MAX_WORDS}: "
                "the count of operations is wrong"
            )

    seconds = time_runs(work, runtime.device, repeats)
    pair = flops.pair_encoder(VIT_B_32, INTRA_LAYERS)
    encoder, decoder = _captioner_flops(model, MAX_WORDS, MAX_WORDS)
    return Timing(seconds, 1e-9 * (pair + encoder + beams * decoder))


class Benchmark(NamedTuple):
    """What is timed, the pairs of a batch, and whether `run` can be told to use --compile.

    `run` takes the number of this process's pairs, the runtime and the number of repeats.
    """

    run: Callable[..., Timing]
    num_pairs: int
    can_compile: bool = False


BENCHMARKS = {
    "finetuning": Benchmark(time_finetuning, 16, can_compile=True),
    "adaptation": Benchmark(time_adaptation, 32, can_compile=True),
    "greedy": Benchmark(partial(time_captioning, beams=1), 16),
    "beam": Benchmark(partial(time_captioning, beams=BEAM_SIZE), 16),
}
COMPILABLE = [name for name, benchmark in BENCHMARKS.items() if benchmark.can_compile]


def whole_machine_rate(dtype: torch.dtype, runtime: Runtime) -> float:
    """The GEMM rate with all cores, even if the launcher leaves fewer to each process.

    The main process measures while the others wait.
    """
    threads = torch.get_num_threads()
    if runtime.device.type == "cpu":
        torch.set_num_threads(all_cores())
    rate = runtime.on_main(lambda: gemm_rate(dtype, runtime.device))
    torch.set_num_threads(threads)
    return rate


def measure(
    what: str, runtime: Runtime, pairs: int | None, repeats: int, compiled: bool = False
) -> dict[str, object]:
    """One benchmark's numbers.

    The plain rate is that of torch's own choice of matrix product, measured before and after; the
    benchmark uses the product that the scripts use (`system.compute.use_fast_matmuls`).
    """
    benchmark = BENCHMARKS[what]
    pairs = pairs or benchmark.num_pairs
    run = partial(benchmark.run, compiled=True) if compiled else benchmark.run
    device = runtime.device
    if device.type == "cpu":
        keep_freed_memory()
    rate_before = whole_machine_rate(torch.float32, runtime)
    with use_fast_matmuls(device, runtime.precision):
        timing = run(pairs // runtime.world_size, runtime, repeats)
        tuned = whole_machine_rate(torch.float32, runtime)
        own = whole_machine_rate(DTYPES[runtime.precision], runtime)
    plain = (rate_before + whole_machine_rate(torch.float32, runtime)) / 2
    seconds = statistics.median(timing.seconds)
    return {
        "benchmark": what,
        "precision": runtime.precision,
        "processes": runtime.world_size,
        "compiled": compiled,
        "pairs": pairs,
        "repeats": repeats,
        "seconds": round(seconds, 4),
        "fastest": round(min(timing.seconds), 4),
        "pairs_per_second": round(pairs / seconds, 1),
        "gemm_plain_gflops": round(plain, 1),
        "gemm_tuned_gflops": round(tuned, 1),
        "gemm_own_gflops": round(own, 1),
        "cost_per_pair": round(seconds * plain / pairs, 1),
        "cost_per_pair_tuned": round(seconds * tuned / pairs, 1),
        "gflop_per_pair": round(timing.min_gflop_per_pair, 1),
        "share_of_gemm": round(timing.min_gflop_per_pair * pairs / seconds / own, 5),
        **machine_info(device),
    }


@contextlib.contextmanager
def silence_logs() -> Iterator[None]:
    """In this block, the parts that are measured log nothing below warnings."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _parse_arguments(processes: int) -> Namespace:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--what", choices=BENCHMARKS, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--pairs", type=int, help="pairs in a batch (default: 16, adaptation 32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="train with --compile")
    parser.add_argument("--device", default=default_device)
    args = parser.parse_args()
    if args.repeats < 1 or (args.pairs is not None and args.pairs < 1):
        parser.error("--repeats and --pairs are expected to be at least 1")
    if args.compile and args.what not in COMPILABLE:
        parser.error(f"--compile is measured for {' and '.join(COMPILABLE)} only")
    if args.pairs is not None and args.pairs % processes:
        parser.error(f"--pairs {args.pairs} is not divisible by {processes} processes")
    return args


def main() -> None:
    """Print one JSON line."""
    rank = int(os.environ.get("RANK", "0"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    args = _parse_arguments(processes)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if processes > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with silence_logs():
        runtime = Runtime(rank, processes, device, args.precision)
        row = measure(args.what, runtime, args.pairs, args.repeats, args.compile)
    if rank == 0:
        print(json.dumps(row))
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
