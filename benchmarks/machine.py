"""The machine that a benchmark ran on, and its own matrix-product rate, which costs are measured against."""

import os
import platform
import time
from collections.abc import Callable

import torch

GEMM_SIZE = 2048


def wait_for(device: torch.device) -> None:
    """Until the device has done what it was asked to: GPUs answer before they have worked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Wall-clock seconds of each of `repeats` runs, after one that warms up."""
    times = []
    for repeat in range(repeats + 1):
        wait_for(device)
        start = time.perf_counter()
        work()
        wait_for(device)
        if repeat:
            times.append(time.perf_counter() - start)
    return times


def gemm_rate(dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of a product of two square matrices of 2048, the fastest of some: what the machine can do when left alone."""
    left, right = (torch.randn(GEMM_SIZE, GEMM_SIZE, device=device, dtype=dtype) for _ in range(2))
    repeats = 6 if device.type == "cpu" else 50
    return 2e-9 * GEMM_SIZE**3 / min(seconds_of(lambda: left @ right, device, repeats))


def description(device: torch.device) -> dict[str, object]:
    """Hardware and versions, for the JSON line of a benchmark."""
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            lines = file.read().splitlines()
        model = next(
            (line.split(":")[1].strip() for line in lines if line.startswith("model name")), ""
        )
        flags = next((line.split(":")[1] for line in lines if line.startswith("flags")), "")
    else:
        model = platform.processor()
    known = [
        name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in flags.split()
    ]
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{model} ({', '.join(known)})"
    )
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
