"""Cost of a training step and of captioning, images already decoded: seconds × the machine's float32 GEMM rate ÷ pairs.

    python benchmarks/steps.py --what finetuning --precision fp32
    torchrun --nproc_per_node=2 benchmarks/steps.py --what adaptation

print one JSON line. The model is ViT-B/32 in the published sizes with random weights. Several processes share the pairs of a batch.
"""

import contextlib
import json
import logging
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flops
from benchmarks.machine import all_cores, gemm_rate, machine_info, time_steps
from dataloaders.batches import trim_padding
from modules.clip4idc import CLIP4IDC
from modules.generation.beam import beam_search
from modules.generation.greedy import greedy_search
from modules.model.clip_sizes import ClipSizes
from modules.options import parse_options
from modules.registries import OBJECTIVES
from modules.tokenizer import tokenize_caption
from modules.training.loop import train_epoch
from modules.training.objectives import TrainingData
from modules.training.output import NoOutput
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from modules.weights.sources import random_clip
from system.command import OneLineParser
from system.compute import DTYPES, keep_freed_memory, matmul_precision
from system.runtime import Runtime
from system.signals import StopSignals

VIT_B_32 = ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12)
MAX_WORDS, BEAMS = 32, 5
OBJECTIVE_OF = {"retrieval": "contrastive", "caption": "cross_entropy"}
SENTENCES = (  # of Spot-the-Diff's kind and length
    "the white car near the entrance is gone",
    "there are two more people walking on the sidewalk",
    "the man in the dark shirt has moved closer to the truck",
    "a person carrying a bag is now at the corner",
    "the group by the door is no longer there",
    "one of the parked cars has left",
    "the van is a little further to the right",
    "a cyclist has appeared in the middle of the road",
)


class SameBatch:
    """A loader that gives one batch `steps` times."""

    def __init__(self, batch: dict[str, torch.Tensor], steps: int) -> None:
        self.batch, self.steps = batch, steps

    def __len__(self) -> int:
        return self.steps

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Nothing changes."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter([self.batch] * self.steps)


def random_model(task: str) -> CLIP4IDC:
    """ViT-B/32 and, for captions, the published captioner; seeded random weights."""
    torch.manual_seed(0)
    return CLIP4IDC.from_weights(random_clip(VIT_B_32), task)


def random_batch(stage: str, pairs: int) -> dict[str, Any]:
    """Images of noise with real sentences, as the loaders give them."""
    arrays = [tokenize_caption(SENTENCES[n % len(SENTENCES)], MAX_WORDS) for n in range(pairs)]

    def stacked(name: str) -> torch.Tensor:
        return torch.stack([torch.from_numpy(words[name]) for words in arrays])

    side = VIT_B_32.image_resolution
    images = torch.randint(0, 256, (pairs, 2, 3, side, side), dtype=torch.uint8)
    common = {"images": images, "id": [str(n) for n in range(pairs)]}
    if stage == "retrieval":
        ids, mask = stacked("retrieval_text_ids"), stacked("retrieval_text_mask")
        return trim_padding({**common, "text_ids": ids, "text_mask": mask})
    names = ("caption_input_ids", "caption_mask", "caption_target_ids")
    return trim_padding({**common, **{name: stacked(name)[:, None] for name in names}})


def training_step(
    stage: str, pairs: int, runtime: Runtime, repeats: int, *more: str
) -> tuple[list[float], float]:
    """Seconds of each step of the real loop on this process' `pairs`, and the necessary GFLOP of a pair."""
    model, batch = random_model(stage), random_batch(stage, pairs)
    flags = (
        f"--do_train --datatype spot --coef_lr 1e-3 --max_words {MAX_WORDS} --batch_size {pairs}"
    )
    places = "--output_dir unused --data_path unused --features_path unused"
    options = parse_options(
        [*flags.split(), *places.split(), *more], stage, "a benchmark", num_processes=1
    )
    objective = OBJECTIVES[OBJECTIVE_OF[stage]](model, TrainingData([], MAX_WORDS))
    loader = SameBatch(batch, 1)
    trainer = Trainer.build(
        model,
        objective,
        loader,
        options.training,
        options.run.seed,
        runtime,
        StopSignals(),
        train_token_embedding=stage == "caption",
    )
    times = time_steps(
        lambda: train_epoch(trainer, NoOutput(), Progress()), runtime.device, repeats
    )
    forward = flops.pair_encoder(VIT_B_32, 9)
    if stage == "retrieval":
        forward += flops.text_encoder(VIT_B_32, batch["text_ids"].shape[-1])
    else:
        targets, tokens = (
            int((batch["caption_target_ids"] != 0).sum()) / pairs,
            2 * VIT_B_32.num_tokens,
        )
        config, words = model.decoder.config, batch["caption_mask"].shape[-1]
        forward += flops.caption_encoder(config, tokens) + flops.caption_decoder(
            config, tokens, words
        )
        forward += flops.vocabulary(VIT_B_32, targets)
    return times, 3e-9 * forward


def captioning(beams: int, pairs: int, runtime: Runtime, repeats: int) -> tuple[list[float], float]:
    """Seconds of captioning a batch with all MAX_WORDS steps, and the necessary GFLOP of a pair."""
    model = random_model("caption").to(runtime.device).eval()
    with torch.no_grad():
        model.decoder.predictions.bias[-1] = -1e4  # EOT never comes: all MAX_WORDS steps are taken
    images = random_batch("caption", pairs)["images"]

    @torch.no_grad()
    def work() -> None:
        with runtime.autocast():
            tokens = model.encode_against_first(model.normalize(images.to(runtime.device))).tokens
            ids = (
                greedy_search(model, tokens, MAX_WORDS)
                if beams == 1
                else beam_search(model, tokens, MAX_WORDS, beams)
            )
        if ids.shape[1] != MAX_WORDS:
            raise RuntimeError(
                f"decoding ended after {ids.shape[1]} steps of {MAX_WORDS}: the count of operations is wrong"
            )

    times = time_steps(work, runtime.device, repeats)
    tokens, config = 2 * VIT_B_32.num_tokens, model.decoder.config
    decoding = beams * (
        flops.caption_decoder(config, tokens, MAX_WORDS) + flops.vocabulary(VIT_B_32, MAX_WORDS)
    )
    return times, 1e-9 * (
        flops.pair_encoder(VIT_B_32, 9) + flops.caption_encoder(config, tokens) + decoding
    )


BENCHMARKS: dict[str, tuple[Callable, object, int]] = {
    "finetuning": (training_step, "caption", 16),
    "adaptation": (training_step, "retrieval", 32),
    "greedy": (captioning, 1, 16),
    "beam": (captioning, BEAMS, 16),
}
COMPILABLE = ("finetuning", "adaptation")


def measure(
    what: str, runtime: Runtime, pairs: int | None, repeats: int, compiled: bool = False
) -> dict[str, object]:
    """One benchmark's numbers. The plain GEMM rate, torch's own choice, is taken before and after, in the same process, while
    the others wait; inside, products run as `fast_products` lets them in the scripts."""
    function, variant, default_pairs = BENCHMARKS[what]
    pairs, device, precision = pairs or default_pairs, runtime.device, runtime.precision

    def rate(dtype: torch.dtype) -> float:
        """Of the whole machine: by all cores, however few of them the launcher leaves each process."""
        threads = torch.get_num_threads()
        torch.set_num_threads(threads if device.type != "cpu" else all_cores())
        found = runtime.on_main(lambda: gemm_rate(dtype, device))
        torch.set_num_threads(threads)
        return found

    if device.type == "cpu":
        keep_freed_memory()
    before = rate(torch.float32)
    with matmul_precision(device, precision):
        more = ["--compile"] if compiled else []
        times, gflop = function(variant, pairs // runtime.world_size, runtime, repeats, *more)
        tuned, own = rate(torch.float32), rate(DTYPES[precision])
    plain, seconds = (before + rate(torch.float32)) / 2, statistics.median(times)
    return {
        "benchmark": what,
        "precision": precision,
        "processes": runtime.world_size,
        "compiled": compiled,
        "pairs": pairs,
        "repeats": repeats,
        "seconds": round(seconds, 4),
        "fastest": round(min(times), 4),
        "pairs_per_second": round(pairs / seconds, 1),
        "gemm_plain_gflops": round(plain, 1),
        "gemm_tuned_gflops": round(tuned, 1),
        "gemm_own_gflops": round(own, 1),
        "cost_per_pair": round(seconds * plain / pairs, 1),
        "cost_per_pair_tuned": round(seconds * tuned / pairs, 1),
        "gflop_per_pair": round(gflop, 1),
        "share_of_gemm": round(gflop * pairs / seconds / own, 5),
        **machine_info(device),
    }


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No log lines of the parts that are measured."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    """Print one JSON line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=BENCHMARKS, required=True)
    parser.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    parser.add_argument("--pairs", type=int, help="pairs a batch (default: 16, adaptation 32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="train with --compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    if args.repeats < 1 or (args.pairs is not None and args.pairs < 1):
        parser.error("--repeats and --pairs are expected to be at least 1")
    if args.compile and args.what not in COMPILABLE:
        parser.error(f"--compile is measured for {' and '.join(COMPILABLE)} only")
    rank, processes = (
        int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    if args.pairs is not None and args.pairs % processes:
        parser.error(f"--pairs {args.pairs} is not divisible by {processes} processes")
    device = (
        torch.device(args.device, int(os.environ.get("LOCAL_RANK", 0)))
        if args.device == "cuda"
        else torch.device(args.device)
    )
    if processes > 1:
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    with quiet():
        runtime = Runtime(rank, processes, device, args.precision)
        results = measure(args.what, runtime, args.pairs, args.repeats, args.compile)
    if rank == 0:
        print(json.dumps(results))
    if processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
