"""The machine that a benchmark runs on, and its matrix-product rate, the unit of all costs."""

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

GEMM_SIZE = 2048
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished the work that was queued on it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_runs(
    work: Callable[[], object], device: torch.device, repeats: int, warm_up: bool = True
) -> list[float]:
    """Seconds of each of `repeats` runs, after one run to warm up."""
    times = []
    for _ in range(repeats + warm_up):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return times[-repeats:]


def gemm_rate(dtype: torch.dtype, device: torch.device, size: int = GEMM_SIZE) -> float:
    """GFLOP/s of a product of two square matrices of this size, in the fastest of several runs."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    repeats = 6 if device.type == "cpu" else 50
    seconds = min(time_runs(lambda: left @ right, device, repeats))
    return 2e-9 * size**3 / seconds


def machine_info(device: torch.device) -> dict[str, object]:
    """Hardware and versions, for the JSON line of a benchmark."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _cpu_name() -> str:
    """The processor's model, and which of CPU_FEATURES it has."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    values: dict[str, str] = {}
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        values.setdefault(key.strip(), value.strip())
    flags = values.get("flags", "").split()
    features = [feature for feature in CPU_FEATURES if feature in flags]
    name = values.get("model name", platform.processor())
    return f"{name} ({', '.join(features)})" if features else name


def all_cores() -> int:
    """How many CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
