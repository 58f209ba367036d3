"""The model's hand-written arithmetic against plain calls of torch that compute the same.

    python benchmarks/hand_written.py --precision bf16

prints one JSON line for each part: milliseconds of ours and of the plain calls, which take turns,
and each one's time relative to ours. Above 1, the hand-written code is faster. For the caption loss
it also gives the memory that a step adds, each measured in a process of its own.
"""

import json
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.machine import machine_info, synchronize
from modules.losses import vocabulary_loss
from modules.model.clip_vision import embed_patches_2d, embed_patches_3d
from modules.optimization import BertAdam
from system.compute import DTYPES, keep_freed_memory, select_device, use_fast_matmuls
from system.flags import device_name
from system.parser import OneLineParser, first_line

PROC = Path("/proc/self/status")


class Sizes(NamedTuple):
    """ViT-B/32 and the published batch."""

    vocabulary: int = 49408
    embed_dim: int = 512
    width: int = 768
    resolution: int = 224
    patch: int = 32
    pairs: int = 16
    targets: tuple[int, ...] = (160, 1600)


Works = dict[str, Callable[[], object]]  # the name of each way, and what it runs


def caption_loss(sizes: Sizes, num_targets: int, device: torch.device) -> Works:
    """Forward and backward of the loss over the vocabulary, without chunks and in torch's own."""
    states = torch.randn(num_targets, sizes.embed_dim, device=device, requires_grad=True)
    embeddings = torch.randn(sizes.vocabulary, sizes.embed_dim, device=device) / 50
    embeddings.requires_grad_()
    bias = torch.zeros(sizes.vocabulary, device=device, requires_grad=True)
    target = torch.randint(1, sizes.vocabulary, (num_targets,), device=device)
    weights = torch.full((num_targets,), 1 / num_targets, device=device)

    def plain() -> Tensor:
        logits = F.linear(states, embeddings, bias).float()
        return (weights * F.cross_entropy(logits, target, reduction="none")).sum()

    def in_chunks() -> Tensor:
        options = nn.LinearCrossEntropyOptions()
        return F.linear_cross_entropy(states, embeddings, target, linear_bias=bias, options=options)

    losses = {
        "ours": lambda: vocabulary_loss(states, embeddings, bias, target, weights),
        "cross_entropy": plain,
    }
    if hasattr(nn, "LinearCrossEntropyOptions"):  # torch 2.14 or newer
        losses["linear_cross_entropy"] = in_chunks
    leaves = (states, embeddings, bias)
    return {name: _with_gradients(loss, leaves) for name, loss in losses.items()}


def patches_2d(sizes: Sizes, device: torch.device) -> Works:
    """The patches of all images of a batch, with the kernel's gradient."""
    images = torch.randn(2 * sizes.pairs, 3, sizes.resolution, sizes.resolution, device=device)
    kernel = torch.randn(sizes.width, 3, sizes.patch, sizes.patch, device=device)
    kernel.requires_grad_()
    works = {
        "ours": lambda: embed_patches_2d(images, kernel),
        "conv2d": lambda: F.conv2d(images, kernel, stride=sizes.patch),
    }
    return {name: _with_gradients(work, (kernel,)) for name, work in works.items()}


def patches_3d(sizes: Sizes, device: torch.device) -> Works:
    """The patches of a batch of pairs as two frames, with the kernel's gradient."""
    pairs = torch.randn(sizes.pairs, 2, 3, sizes.resolution, sizes.resolution, device=device)
    kernel = torch.randn(sizes.width, 3, 3, sizes.patch, sizes.patch, device=device)
    kernel.requires_grad_()
    stride = (1, sizes.patch, sizes.patch)
    works = {
        "ours": lambda: embed_patches_3d(pairs, kernel),
        "conv3d": lambda: F.conv3d(pairs.transpose(1, 2), kernel, None, stride, (1, 0, 0)),
    }
    return {name: _with_gradients(work, (kernel,)) for name, work in works.items()}


def optimizer_step(sizes: Sizes, device: torch.device) -> Works:
    """A step with each parameter clipped to its own norm, over a layer's worth of parameters.

    torch's AdamW corrects the bias of its moments, which BertAdam does not; it is here for time.
    """
    layers = [nn.Linear(sizes.width, sizes.width) for _ in range(16)]
    parameters = [p for layer in layers for p in layer.to(device).parameters()]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    ours = BertAdam(parameters, lr=1e-7, max_grad_norm=1.0)
    plain = torch.optim.AdamW(parameters, lr=1e-7, fused=True)

    def step_plainly() -> None:
        for parameter in parameters:
            nn.utils.clip_grad_norm_(parameter, 1.0)
        plain.step()

    return {"ours": ours.step, "clip_grad_norm_ and AdamW": step_plainly}


def _with_gradients(work: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], None]:
    """`work`, and the gradients of its sum for `leaves`."""

    def run() -> None:
        torch.autograd.grad(work().float().sum(), leaves)

    return run


def build_parts(sizes: Sizes, device: torch.device) -> dict[str, Callable[[], Works]]:
    """Each part's name → what builds its rivals: only one part at a time is in memory."""
    parts: dict[str, Callable[[], Works]] = {
        f"caption loss, {num} targets": lambda num=num: caption_loss(sizes, num, device)
        for num in sizes.targets
    }
    return {
        **parts,
        "2d patches": lambda: patches_2d(sizes, device),
        "3d patches": lambda: patches_3d(sizes, device),
        "optimizer step": lambda: optimizer_step(sizes, device),
    }


def time_in_turn(works: Works, device: torch.device, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, after a round that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + 1):
        for name, work in works.items():
            synchronize(device)
            start = time.perf_counter()
            work()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(times[1:]) for name, times in seconds.items()}


def added_memory(sizes: Sizes, part: str, name: str, precision: str) -> float:
    """MB by which this process's peak grows when it runs one work on the CPU (Linux only)."""
    cpu = torch.device("cpu")
    work = build_parts(sizes, cpu)[part]()[name]
    before = _peak_memory()
    with use_fast_matmuls(cpu, precision), _autocast(cpu, precision):
        work()
    return (_peak_memory() - before) / 1024


def _peak_memory() -> int:
    """KB that this process has held at most; `ru_maxrss` would count its parent's, too."""
    lines = PROC.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, dtype=DTYPES[precision], enabled=precision != "fp32")


def measure(sizes: Sizes, device: torch.device, precision: str, repeats: int, part: str) -> dict:
    """One part's row."""
    works = build_parts(sizes, device)[part]()
    with use_fast_matmuls(device, precision), _autocast(device, precision):
        milliseconds = time_in_turn(works, device, repeats)
    relative = {name: round(ms / milliseconds["ours"], 2) for name, ms in milliseconds.items()}
    row: dict[str, object] = {
        "benchmark": "hand_written",
        "part": part,
        "precision": precision,
        "milliseconds": {name: round(ms, 2) for name, ms in milliseconds.items()},
        "relative": relative,
    }
    if part.startswith("caption loss") and device.type == "cpu" and PROC.exists():
        with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
            memory = {
                name: pool.submit(added_memory, sizes, part, name, precision) for name in works
            }
            row["added_mb"] = {name: round(future.result()) for name, future in memory.items()}
    return {**row, **machine_info(device)}


def _parse_arguments() -> Namespace:
    parser = OneLineParser(description=first_line(__doc__))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", type=device_name, default="auto")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats is expected to be at least 1")
    return args


def main() -> None:
    """Print one JSON line for each part."""
    args = _parse_arguments()
    device = select_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    sizes = Sizes()
    for part in build_parts(sizes, device):
        print(json.dumps(measure(sizes, device, args.precision, args.repeats, part)), flush=True)


if __name__ == "__main__":
    main()
