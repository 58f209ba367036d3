"""Process state in one place: process group, device, precision, seeds, logging. Opened by the entry scripts."""

import logging
import logging.handlers
import os
import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from modules.options.groups import Options
from system.compute import (
    DTYPES,
    choose_device,
    choose_precision,
    deterministic,
    keep_freed_memory,
    matmul_precision,
)
from system.logs import logging_to_terminal

log = logging.getLogger(__name__)

try:
    import resource
except ImportError:  # Windows
    resource = None


STEP_TIMEOUT = timedelta(
    minutes=10
)  # so long a process waits for the others' part of common work, then ends the job


MAIN_TIMEOUT = timedelta(
    hours=6
)  # and so long for what the main process does alone, such as scoring


Value = TypeVar("Value")


@dataclass(frozen=True)
class Runtime:
    """One process among `world_size`, and the device and precision that it computes with."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    cpu_group: dist.ProcessGroup | None = (
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

    def on_main(self, job: Callable[[], Value]) -> Value:
        """What `job` gives on the main process, which alone runs it, on every process; its ValueError or OSError likewise."""
        if self.world_size == 1:
            return job()
        box: list[Any] = [None]
        if self.is_main:
            try:
                box = [job()]
            except (ValueError, OSError) as error:
                box = [error]
        dist.broadcast_object_list(box, src=0, group=self.cpu_group)
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
    with logging_to_terminal(
        is_main=rank == 0, level=logging.WARNING if options.run.do_predict else logging.INFO
    ):
        device = choose_device(options.run.local_rank)
        precision = choose_precision("fp16" if options.run.fp16 else options.run.precision, device)
        patient = None
        if world_size > 1:
            backend, store = "nccl" if device.type == "cuda" else "gloo", _restart_store()
            members = (
                {"store": store, "rank": rank, "world_size": world_size} if store else {}
            )  # else from the environment
            dist.init_process_group(backend, timeout=STEP_TIMEOUT, **members)
            patient = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)
        runtime = Runtime(rank, world_size, device, precision, patient)
        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(options.run.seed)  # the same on all processes: they must initialise alike
        with matmul_precision(device, precision), deterministic(options.run.deterministic):
            _log_start(options, runtime)
            if torch.get_float32_matmul_precision() == "medium":
                log.info("float32 matrix products by oneDNN")
            yield runtime
        if world_size > 1:
            dist.destroy_process_group()


def _restart_store() -> dist.Store | None:
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
        around["MASTER_ADDR"], int(around["MASTER_PORT"]), is_master=False, timeout=STEP_TIMEOUT
    )
    return dist.PrefixStore(f"attempt_{around['TORCHELASTIC_RESTART_COUNT']}", store)


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
