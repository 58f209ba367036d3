"""TODO."""

import ctypes
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Inside, torch takes none of the ways that add up in another order each time, and refuses what has no other."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
        )  # cuBLAS reads it when it is first used
    torch.use_deterministic_algorithms(wanted or before)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def matmul_precision(device: torch.device, precision: str) -> Iterator[None]:
    """Inside, float32 matrix products run as fast as the device can without leaving the precision asked for.

    On GPUs at bf16 or fp16 the few that stay float32 may use TF32. On CPUs that are not Intel's, MKL takes a slow path of its own
    and oneDNN is up to twice as fast; torch goes there at `medium`, which allows oneDNN to round to bfloat16 where it gains by
    that (AMX). So it is used only where a trial shows that the products stay float32.
    """
    before = torch.get_float32_matmul_precision()
    setting = "high" if device.type == "cuda" and precision != "fp32" else "highest"
    if (
        device.type == "cpu"
        and torch.backends.mkl.is_available()
        and "AuthenticAMD" in _processor()
        and _stays_float32("medium")
    ):
        setting = "medium"
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _stays_float32(setting: str) -> bool:
    """Whether products are float32 at this setting; tried once."""
    left, right = torch.randn(2, 512, 512, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    error = (left @ right - left.double() @ right.double()).abs().max().item()
    torch.set_float32_matmul_precision(before)
    return error < 1e-3  # sums of 512 products: float32 is off by some 1e-5, bfloat16 by some 1e-1


def _processor() -> str:
    """The first processor's description, its vendor's name in it."""
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text().split("\n\n")[0] if cpuinfo.is_file() else platform.processor()


def keep_freed_memory() -> None:
    """Let glibc hand freed memory out again instead of giving it back to the kernel, which would clear every page of it anew.

    On CPUs a training step frees and takes gigabytes. Does nothing elsewhere than on glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no libc to be asked, or another one
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, -1)


def choose_device(local_rank: int | None = None) -> torch.device:
    """This process' GPU, else Apple's MPS, else the CPU. Raises ValueError where there are more processes than GPUs."""
    local_rank = int(os.environ.get("LOCAL_RANK", local_rank or 0))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: {torch.cuda.device_count()} are visible; start no "
                "more processes than GPUs"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def choose_precision(wanted: str, device: torch.device) -> str:
    """What `auto` means on a device: bf16 on GPUs that compute in it (Ampere on), fp16 on older ones, fp32 elsewhere."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "fp32"
    return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
