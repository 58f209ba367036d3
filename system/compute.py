"""Device and arithmetic: GPU or CPU, the precision, and how torch multiplies matrices."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

# Sums of 512 products are off by some 1e-5 in float32, and by some 1e-1 in bfloat16.
MAX_FLOAT32_ERROR = 1e-3


def select_device(local_rank: int | None = None) -> torch.device:
    """Select this process's GPU, else Apple's MPS, else the CPU.

    A GPU also becomes CUDA's current device. The launcher's LOCAL_RANK takes precedence over the
    argument. Raises ValueError if there are more processes than GPUs.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    if torch.cuda.is_available():
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: {count} are visible; start no "
                "more processes than GPUs"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 on GPUs that have it (from Ampere on), fp16 on older ones, else fp32."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    major, _ = torch.cuda.get_device_capability(device)
    return "bf16" if major >= 8 else "fp16"


@contextmanager
def use_deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """Inside, if `wanted`, torch uses only deterministic algorithms and fails if it has none."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        # cuBLAS reads it when it is first used.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def use_fast_matmuls(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, float32 matmuls are as fast as they can be at the requested precision.

    On GPUs at bf16 or fp16, the few matmuls that stay float32 may use TF32. On AMD's CPUs, MKL is
    slow and oneDNN up to twice as fast. torch uses oneDNN only at `medium`, which also allows it to
    round to bfloat16 if that is faster (AMX). So `medium` is set only if a trial shows that
    results stay float32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(_choose_matmul_setting(device, precision))
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def allows_onednn() -> bool:
    """Whether torch may use oneDNN for float32 matmuls on this CPU, as `use_fast_matmuls` chose."""
    return torch.get_float32_matmul_precision() == "medium"


def _choose_matmul_setting(device: torch.device, precision: str) -> str:
    if device.type == "cuda":
        return "highest" if precision == "fp32" else "high"
    is_slow_mkl = torch.backends.mkl.is_available() and _is_amd_processor()
    if device.type == "cpu" and is_slow_mkl and _stays_float32("medium"):
        return "medium"
    return "highest"


@cache
def _stays_float32(setting: str) -> bool:
    """Whether results have float32's precision at this setting; tried once."""
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    product = left @ right
    exact = left.double() @ right.double()
    torch.set_float32_matmul_precision(before)
    error = (product - exact).abs().max().item()
    return error < MAX_FLOAT32_ERROR


def _is_amd_processor() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        first, *_ = cpuinfo.read_text().split("\n\n")
        return "AuthenticAMD" in first
    return "AuthenticAMD" in platform.processor()


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse instead of returning it to the kernel.

    On CPUs a training step frees and allocates gigabytes, and the kernel would clear each page
    again. Does nothing without glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no libc that can be loaded, or another one
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)
