"""Process state in one place: process group, device, precision, seeds, logging. Opened by the entry scripts."""

import ctypes
import logging
import logging.handlers
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from torch import Tensor
from tqdm import tqdm

from modules.escaping import SafeFormatter
from modules.options import Options

try:
    import resource
except ImportError:  # Windows
    resource = None

log = logging.getLogger(__name__)

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HANG = timedelta(
    minutes=10
)  # so long a process waits for the others' part of common work, then ends the job
PATIENCE = timedelta(hours=6)  # and so long for what the main process does alone, such as scoring
LOCK_PATIENCE = 60  # seconds in which an earlier attempt of a job of several processes must have let go of its folder
Value = TypeVar("Value")


@dataclass(frozen=True)
class Runtime:
    """One process among `world_size`, and the device and precision that it computes with."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    patient: dist.ProcessGroup | None = (
        None  # the group, on the CPU, that waits for the main process
    )

    @property
    def is_main(self) -> bool:
        """Whether this process logs, writes and scores."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """The one way into lower precision; weights stay float32."""
        return torch.autocast(
            self.device.type, dtype=DTYPES[self.precision], enabled=self.precision != "fp32"
        )

    def peak_memory(self) -> str:
        """The most memory that this process has held: of its GPU, or of the machine where the system tells."""
        if self.device.type == "cuda":
            return f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f} GB"
        if resource is None:
            return "unknown"
        unit = 1 if sys.platform == "darwin" else 1024
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"

    def seed(self, *parts: int) -> None:
        """Seed torch's draws (dropout) from numbers such as seed, epoch and step, and this process' rank."""
        state = np.random.SeedSequence([*parts, self.rank]).generate_state(2, np.uint32)
        torch.manual_seed(int(state[0]) << 31 ^ int(state[1]))

    def progress(self, iterable: Any, what: str, unit: str = "batch") -> tqdm:
        """A progress bar on the main process' terminal; silent where stderr is none."""
        return tqdm(
            iterable,
            desc=what,
            unit=unit,
            leave=False,
            dynamic_ncols=True,
            disable=None if self.is_main else True,
        )

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process' value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def gather_rows(self, rows: Tensor) -> Tensor:
        """(n, …) rows of items rank, rank + world, … on each process → all rows in the items' order, on the CPU."""
        parts = self.gather_objects(rows.cpu())
        merged = parts[0].new_empty(sum(map(len, parts)), *rows.shape[1:])
        for rank, part in enumerate(parts):
            merged[rank :: self.world_size] = part
        return merged

    def from_main(self, job: Callable[[], Value]) -> Value:
        """What `job` gives on the main process, which alone runs it, on every process; its ValueError or OSError likewise."""
        if self.world_size == 1:
            return job()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [job()]
            except (ValueError, OSError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.patient)
        if isinstance(box[0], ValueError | OSError):
            raise box[0]
        return box[0]

    def any(self, value: bool) -> bool:
        """Whether it holds on any process."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def total(self, value: Tensor) -> Tensor:
        """The sum of a detached tensor over the processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


@contextmanager
def open_runtime(options: Options) -> Iterator[Runtime]:
    """Join the launcher's process group, if any, choose device and precision, start logging, seed everything."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    with _logging(
        is_main=rank == 0, level=logging.WARNING if options.run.do_predict else logging.INFO
    ):
        device = choose_device(options.run.local_rank)
        precision = choose_precision("fp16" if options.run.fp16 else options.run.precision, device)
        patient = None
        if world_size > 1:
            backend, store = "nccl" if device.type == "cuda" else "gloo", _store_of_attempt()
            members = (
                {"store": store, "rank": rank, "world_size": world_size} if store else {}
            )  # else from the environment
            dist.init_process_group(backend, timeout=HANG, **members)
            patient = dist.new_group(backend="gloo", timeout=PATIENCE)
        runtime = Runtime(rank, world_size, device, precision, patient)
        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(options.run.seed)  # the same on all processes: they must initialise alike
        with fast_products(device, precision), _deterministic(options.run.deterministic):
            _log_start(options, runtime)
            if torch.get_float32_matmul_precision() == "medium":
                log.info("float32 matrix products by oneDNN")
            yield runtime
        if world_size > 1:
            dist.destroy_process_group()


def _store_of_attempt() -> dist.Store | None:
    """Where processes that torchrun may restart find each other; None: as usual.

    The launcher's own store outlives a restart, and what the processes before left in it would send the new ones to addresses where
    nobody is. Under one agent its count of restarts keeps attempts apart; several agents count differently, so that they must not
    share it: ValueError.
    """
    around = os.environ
    if (
        around.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or around.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0"
    ):
        return None
    if around.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ValueError(
            "several torchrun agents with --max-restarts need --rdzv_backend=c10d and, in the environment of each, "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: restarted processes would wait for those before them"
        )
    store = dist.TCPStore(
        around["MASTER_ADDR"], int(around["MASTER_PORT"]), is_master=False, timeout=HANG
    )
    return dist.PrefixStore(f"attempt_{around['TORCHELASTIC_RESTART_COUNT']}", store)


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
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
def fast_products(device: torch.device, precision: str) -> Iterator[None]:
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
        and _is_exact_at("medium")
    ):
        setting = "medium"
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _is_exact_at(setting: str) -> bool:
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


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


@contextmanager
def _logging(is_main: bool, level: int) -> Iterator[None]:
    root = logging.getLogger()
    before, handlers = root.level, []
    if is_main:
        terminal = _TerminalHandler()
        terminal.setFormatter(SafeFormatter("%(message)s"))
        # Keeps the lines until the run has a folder: nothing is written before the inputs have been checked.
        early = logging.handlers.MemoryHandler(
            capacity=10_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
        )
        handlers = [terminal, early]
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level if is_main else logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(before)
        for handler in root.handlers[:]:
            if handler in handlers or isinstance(handler, _LogFile):
                root.removeHandler(handler)
                handler.close()


class _LogFile(logging.FileHandler):
    """log.txt of a run."""


@contextmanager
def open_output_dir(options: Options, runtime: Runtime) -> Iterator[Path]:
    """Make the run's folder and, on the main process, write all log lines so far and from now on to its log.txt.

    Raises ValueError, on every process, where another run works in it.
    """
    folder = Path(options.run.output_dir)
    lock = FileLock(folder / ".lock")

    def take() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_PATIENCE if runtime.world_size > 1 else 0)
        except Timeout:
            raise ValueError(
                f"another run works in {folder}: wait for its end, or give another --output_dir"
            ) from None

    runtime.from_main(take)
    try:
        if runtime.is_main:
            _log_into(folder)
        yield folder
    finally:
        lock.release()


def _log_into(folder: Path) -> None:
    """Write all log lines so far, and from now on, to the folder's log.txt."""
    file = _LogFile(folder / "log.txt", encoding="utf-8")
    file.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger()
    for early in [h for h in root.handlers if isinstance(h, logging.handlers.MemoryHandler)]:
        early.setTarget(file)
        early.flush()
        root.removeHandler(early)
    root.addHandler(file)


def _log_start(options: Options, runtime: Runtime) -> None:
    name = (
        torch.cuda.get_device_name(runtime.device)
        if runtime.device.type == "cuda"
        else platform.processor() or "CPU"
    )
    log.info(
        "%s · %d process(es) on %s (%s), %s · torch %s, Python %s",
        options.stage,
        runtime.world_size,
        runtime.device.type,
        name,
        runtime.precision,
        torch.__version__,
        platform.python_version(),
    )
    for option, value in options.items():
        log.info("  --%s = %s", option, value)
    if options.ignored:
        log.warning(
            "accepted but without effect, as in the published code: %s", ", ".join(options.ignored)
        )
