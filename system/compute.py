"""Device and arithmetic: GPU or CPU, the precision, and how torch multiplies matrices."""

import ctypes
import os
import platform
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from system.flags import device_name
from system.launcher import read_place

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# From glibc's malloc.h.
M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4

# Sums of 512 products are off by some 1e-5 in float32, and by some 1e-1 in bfloat16.
MAX_FLOAT32_ERROR = 1e-3


def select_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """The device that `name` stands for; `system.flags.device_name` says which names there are.

    `auto` is this process's GPU, else Apple's MPS, else the CPU; `cuda` is this process's GPU. The
    launcher's LOCAL_RANK takes precedence over the argument. A GPU also becomes CUDA's current
    device. Raises ValueError for a device that this machine, this torch or a job of several
    processes cannot use.
    """
    try:
        device_name(name)
    except ArgumentTypeError as error:
        raise ValueError(str(error)) from None
    place = read_place()
    is_alone = place.is_alone
    local_rank = (local_rank or 0) if place.local_rank is None else place.local_rank
    has_mps = torch.backends.mps.is_available()
    if name == "auto":
        without_cuda = "mps" if has_mps and is_alone else "cpu"
        name = "cuda" if torch.cuda.is_available() else without_cuda
    if name.startswith("cuda"):
        return _select_gpu(name, local_rank, is_alone)
    if name == "mps" and not has_mps:
        raise ValueError("device mps: this machine or this torch has no MPS (GPUs of Apple's Macs)")
    if name == "mps" and not is_alone:
        raise ValueError("device mps computes in one process only; several need cpu, or GPUs")
    return torch.device(name)


def _select_gpu(name: str, local_rank: int, is_alone: bool) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        raise ValueError(f"device {name}: no GPU was found ({why_no_gpu()}); cpu always works")
    _, _, number = name.partition(":")
    if number and not is_alone:
        raise ValueError(
            f"device {name} is one GPU for several processes: cuda gives each process its own"
        )
    index = int(number) if number else local_rank
    if number and index >= count:
        raise ValueError(f"device {name}: {count} GPUs are visible, numbered from 0")
    if index >= count:
        raise ValueError(
            f"process {index} of this machine has no GPU: {count} are visible; start no "
            "more processes than GPUs"
        )
    device = torch.device("cuda", index)
    _require_supported(device)
    torch.cuda.set_device(device)
    return device


def why_no_gpu() -> str:
    """Why torch finds no GPU, as the end of a message."""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is a build without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides all of them"
    return "torch sees no NVIDIA driver, or none that is new enough for it"


def _require_supported(device: torch.device) -> None:
    """Raise ValueError for a GPU that is too old for this torch."""
    if torch.version.hip is not None:
        return
    major, minor = torch.cuda.get_device_capability(device)
    built_for = [arch for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    oldest = min((int(arch.removeprefix("sm_").rstrip("af")) for arch in built_for), default=0)
    if 10 * major + minor < oldest:
        raise ValueError(
            f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor}) is too old "
            f"for torch {torch.__version__}, which needs {oldest // 10}.{oldest % 10}: install an "
            "older torch, or use the device cpu"
        )


def choose_precision(wanted: str, device: torch.device) -> str:
    """Resolve `auto`: bf16 on GPUs that have it (from Ampere on), fp16 on older ones, else fp32.

    Raises ValueError for an unknown name, and for bf16 on a GPU without units for it.
    """
    if wanted != "auto" and wanted not in DTYPES:
        raise ValueError(f"precision {wanted!r} is unknown, expected auto, {', '.join(DTYPES)}")
    if device.type != "cuda":
        return "fp32" if wanted == "auto" else wanted
    major, _ = torch.cuda.get_device_capability(device)
    has_bf16 = major >= 8
    if wanted == "bf16" and not has_bf16:
        name = torch.cuda.get_device_name(device)
        raise ValueError(f"precision bf16: {name} computes it only slowly; use fp16, or auto")
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16 else "fp16"


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
def allow_all_algorithms() -> Iterator[None]:
    """Inside, torch may use any algorithm: for an operation that is deterministic as it is used."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(False)
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


def check_finite(values: torch.Tensor) -> None:
    """Raise ValueError for NaN or infinities among what a model computes."""
    if not torch.isfinite(values).all():
        raise ValueError(
            "the model computes numbers that are not finite (NaN or infinity): its weights are "
            "damaged, or too large for this precision; --precision fp32 has the widest range"
        )
