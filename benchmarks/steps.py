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
import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import torch
from torch import Tensor

from benchmarks import flops
from benchmarks.machine import all_cores, gemm_rate, machine_info, time_runs
from dataloaders.batches import trim_padding
from modules.clip4idc import CLIP4IDC
from modules.generation import generate
from modules.model.clip_sizes import ClipSizes
from modules.options.decoding import Decoding
from modules.options.groups import TrainingOptions
from modules.registries import OBJECTIVES
from modules.tokenizer import PAD, SOT, VOCAB_SIZE, tokenize_caption
from modules.training.loop import train_epoch
from modules.training.objectives import TrainingData
from modules.training.output import NoOutput
from modules.training.pace import Pace
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from modules.weights.sources import random_clip
from system.compute import DTYPES, keep_freed_memory, select_device, use_fast_matmuls
from system.flags import device_name
from system.launcher import read_place
from system.parser import OneLineParser, first_line
from system.runtime import Runtime
from system.signals import StopSignals

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
OBJECTIVE_OF = {"retrieval": "contrastive", "caption": "cross_entropy"}
# Batch name → name in `tokenize_caption`'s arrays.
TEXT_ARRAYS = {
    "retrieval": {"text_ids": "retrieval_text_ids", "text_mask": "retrieval_text_mask"},
    "caption": {name: name for name in ("caption_input_ids", "caption_mask", "caption_target_ids")},
}


class Model(NamedTuple):
    """The sizes of a model. `decoder` is the captioner's configuration, or None: the published."""

    clip: ClipSizes
    intra_layers: int
    max_words: int
    decoder: dict[str, Any] | None = None


PUBLISHED = Model(ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12), 9, 32)


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


def random_model(task: str, sizes: Model) -> CLIP4IDC:
    """The model of a task, with random weights from a fixed seed."""
    torch.manual_seed(0)
    decoder = sizes.decoder if task == "caption" else None
    weights = random_clip(sizes.clip)
    return CLIP4IDC.from_weights(weights, task, sizes.intra_layers, decoder_config=decoder)


def random_batch(task: str, num_pairs: int, sizes: Model) -> dict[str, Any]:
    """Images of noise with sentences, in the form of the loaders' batches."""
    sentences = [SENTENCES[number % len(SENTENCES)] for number in range(num_pairs)]
    arrays = [tokenize_caption(sentence, sizes.max_words) for sentence in sentences]
    side = sizes.clip.image_resolution
    batch: dict[str, Any] = {
        "images": torch.randint(0, 256, (num_pairs, 2, 3, side, side), dtype=torch.uint8),
        "id": [str(number) for number in range(num_pairs)],
    }
    for name, array_name in TEXT_ARRAYS[task].items():
        rows = torch.stack([torch.from_numpy(array[array_name]) for array in arrays])
        rows = _fit_to_vocabulary(rows, sizes.clip.vocab_size)
        batch[name] = rows if task == "retrieval" else rows[:, None]  # (B, L) or (B, 1, L)
    return trim_padding(batch)


def _fit_to_vocabulary(ids: Tensor, size: int) -> Tensor:
    """The tokenizer's ids, or a mask, for a model with a smaller vocabulary: other words, but pads
    and the ids that start and end a caption stay what they are."""
    is_special = ids >= SOT
    return torch.where(is_special, ids - VOCAB_SIZE + size, ids % (SOT - VOCAB_SIZE + size))


def build_trainer(
    task: str,
    model: CLIP4IDC,
    batch: dict[str, Any],
    runtime: Runtime,
    compiled: bool = False,
    steps: int = 1,
) -> Trainer:
    """A trainer of either stage, whose epochs are `steps` steps on the same batch."""
    objective = OBJECTIVES[OBJECTIVE_OF[task]]
    return Trainer.build(
        model,
        objective(model, TrainingData([], PUBLISHED.max_words)),
        RepeatedBatch(batch, steps),
        TrainingOptions(coef_lr=1e-3, compile=compiled),
        SEED,
        runtime,
        StopSignals(),
        train_token_embedding=task == "caption",
    )


def train_one_epoch(trainer: Trainer) -> None:
    """The real training loop, without output."""
    train_epoch(trainer, NoOutput(), Progress(), Pace(), log_every=10**6)


def training_gflop(task: str, model: CLIP4IDC, batch: dict[str, Any], sizes: Model) -> float:
    """The least GFLOP of a training step, per pair: backward takes twice as many as forward."""
    forward = flops.pair_encoder(sizes.clip, sizes.intra_layers)
    if task == "retrieval":
        forward += flops.text_encoder(sizes.clip, batch["text_ids"].shape[-1])
    else:
        num_targets = int((batch["caption_target_ids"] != PAD).sum()) / len(batch["images"])
        num_words = batch["caption_mask"].shape[-1]
        forward += sum(_captioner_flops(model, num_words, num_targets, sizes))
    return 3e-9 * forward


def _captioner_flops(
    model: CLIP4IDC, num_words: int, num_targets: float, sizes: Model
) -> tuple[float, float]:
    """Operations of the captioner's encoder, and those of its decoder with the vocabulary."""
    config = model.decoder.config
    num_tokens = 2 * sizes.clip.num_tokens
    decoder = flops.caption_decoder(config, num_tokens, num_words)
    vocabulary = flops.vocabulary(sizes.clip, num_targets)
    return flops.caption_encoder(config, num_tokens), decoder + vocabulary


def time_training(
    task: str, num_pairs: int, runtime: Runtime, repeats: int, compiled: bool = False
) -> Timing:
    """Steps of the real training loop on this process's `num_pairs`."""
    model = random_model(task, PUBLISHED)
    batch = random_batch(task, num_pairs, PUBLISHED)
    trainer = build_trainer(task, model, batch, runtime, compiled)
    seconds = time_runs(lambda: train_one_epoch(trainer), runtime.device, repeats)
    return Timing(seconds, training_gflop(task, model, batch, PUBLISHED))


def random_captioner(runtime: Runtime, sizes: Model) -> CLIP4IDC:
    """A captioner whose captions never end, so that all have `max_words` words."""
    model = random_model("caption", sizes).to(runtime.device).eval()
    with torch.no_grad():
        model.decoder.predictions.bias[-1] = -1e4  # EOT never comes
    return model


@torch.no_grad()
def caption_images(
    model: CLIP4IDC, images: Tensor, decoding: Decoding, runtime: Runtime, max_words: int
) -> None:
    """Encode and caption (B, 2, 3, R, R) uint8. Raises RuntimeError if captions ended early."""
    with runtime.autocast():
        normalized = model.normalize_images(images.to(runtime.device))
        tokens = model.encode_against_first(normalized).tokens
        num_words = generate(model, tokens, max_words, decoding).shape[-1]
    if num_words != max_words:
        raise RuntimeError(
            f"decoding ended after {num_words} steps of {max_words}: "
            "the count of operations is wrong"
        )


def captioning_gflop(model: CLIP4IDC, num_captions: int, sizes: Model) -> float:
    """The least GFLOP to write `num_captions` captions of a pair, or that many beams of one."""
    encoder, decoder = _captioner_flops(model, sizes.max_words, sizes.max_words, sizes)
    pair = flops.pair_encoder(sizes.clip, sizes.intra_layers)
    return 1e-9 * (pair + encoder + num_captions * decoder)


def time_captioning(num_pairs: int, runtime: Runtime, repeats: int, beams: int) -> Timing:
    """Captions of a batch by greedy or beam search, each of the published number of words."""
    decoding = Decoding(beam_size=beams)
    model = random_captioner(runtime, PUBLISHED)
    images = random_batch("caption", num_pairs, PUBLISHED)["images"]

    def work() -> None:
        caption_images(model, images, decoding, runtime, PUBLISHED.max_words)

    seconds = time_runs(work, runtime.device, repeats)
    return Timing(seconds, captioning_gflop(model, beams, PUBLISHED))


class Benchmark(NamedTuple):
    """What is timed, the pairs of a batch, and whether `run` can be told to use --compile.

    `run` takes the number of this process's pairs, the runtime and the number of repeats.
    """

    run: Callable[..., Timing]
    num_pairs: int
    can_compile: bool = False


BENCHMARKS = {
    "finetuning": Benchmark(partial(time_training, "caption"), 16, can_compile=True),
    "adaptation": Benchmark(partial(time_training, "retrieval"), 32, can_compile=True),
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
    parser = OneLineParser(description=first_line(__doc__))
    parser.add_argument("--what", choices=BENCHMARKS, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--pairs", type=int, help="pairs in a batch (default: 16, adaptation 32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="train with --compile")
    parser.add_argument("--device", type=device_name, default="auto")
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
    rank, processes, _ = read_place()
    args = _parse_arguments(processes)
    device = select_device(args.device)
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
