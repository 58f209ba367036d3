"""One process among several: its rank, device and precision, and what the processes exchange."""

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from system.compute import (
    DTYPES,
    choose_precision,
    keep_freed_memory,
    select_device,
    use_deterministic_algorithms,
    use_fast_matmuls,
)
from system.launcher import read_meeting_point, read_place, read_restart_count
from system.logs import logging_to_terminal
from system.progress import show_progress
from system.signals import stopping_at_once

try:
    import resource
except ImportError:  # Windows
    resource = None

# How long a collective may take before the job is aborted.
STEP_TIMEOUT = timedelta(minutes=10)

PORT_IN_USE = "EADDRINUSE"  # part of torch's message

# The same for what the main process does alone, such as scoring.
MAIN_TIMEOUT = timedelta(hours=6)

Value = TypeVar("Value")
Items = TypeVar("Items")


@dataclass(frozen=True)
class Runtime:
    """One process among `world_size`, and the device and precision that it computes with.

    `cpu_group` is the process group in which the others wait for the main process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    precision: str = "fp32"
    cpu_group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process logs, writes and scores."""
        return self.rank == 0

    def autocast(self) -> torch.autocast:
        """A context in which torch computes in this precision. Weights stay float32."""
        is_lower = self.precision != "fp32"
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision], enabled=is_lower)

    def describe_peak_memory(self) -> str:
        """The most memory that this process has used so far, such as "1.2 GB": of its GPU, or else
        main memory."""
        if self.device.type == "cuda":
            size = torch.cuda.max_memory_allocated(self.device)
        elif resource is None:
            return "unknown"
        else:
            unit = 1 if sys.platform == "darwin" else 1024
            size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return f"{size / 1e9:.1f} GB"

    def seed(self, *parts: int) -> None:
        """Seed torch from numbers such as seed, epoch and step, and from this process's rank."""
        state = np.random.SeedSequence([*parts, self.rank]).generate_state(2, np.uint32)
        torch.manual_seed((int(state[0]) << 31) ^ int(state[1]))

    def progress_bar(
        self, iterable: Any, what: str, unit: str = "batch", has_lines: bool = True
    ) -> tqdm:
        """`show_progress` on the main process."""
        return show_progress(iterable, what, self.is_main, has_lines, unit=unit)

    def own_share(self, items: Items) -> Items:
        """This process's part of a sequence or tensor: items rank, rank + world_size, …"""
        return items[self.rank :: self.world_size]

    def merge_shares(self, share: Sequence[Value]) -> list[Value]:
        """Merge what each process made of its `own_share` into item order, on every process."""
        shares = self.gather_objects(share)
        merged: list[Any] = [None] * sum(map(len, shares))
        return _interleave(shares, merged)

    def merge_rows(self, rows: Tensor) -> Tensor:
        """Like `merge_shares`, for a tensor's rows, (n, …) on each process. Returns all rows, on
        the CPU."""
        shares = self.gather_objects(rows.cpu())
        merged = shares[0].new_empty(sum(map(len, shares)), *rows.shape[1:])
        return _interleave(shares, merged)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every process's value, in rank order, on every process."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def on_main(self, job: Callable[[], Value]) -> Value:
        """Run `job` on the main process only.

        Every process returns its result, or raises its ValueError or OSError.
        """
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

    def wait_for_main(self) -> None:
        """Wait until the main process is here, however long its work before takes."""
        self.on_main(lambda: None)

    def any_process(self, value: bool) -> bool:
        """Whether the value is true on any process."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(int(value), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def sum_over_processes(self, value: Tensor) -> Tensor:
        """The sum of a detached tensor over all processes."""
        if self.world_size > 1:
            value = value.clone()
            dist.all_reduce(value)
        return value


def _interleave(shares: Sequence[Any], merged: Items) -> Items:
    """Fill `merged` with the processes' shares: item i comes from process i modulo their number."""
    for rank, share in enumerate(shares):
        merged[rank :: len(shares)] = share
    return merged


@contextmanager
def open_runtime(
    precision: str = "auto",
    local_rank: int | None = None,
    seed: int = 42,
    deterministic: bool = False,
    quiet: bool = False,
    device_name: str = "auto",
) -> Iterator[Runtime]:
    """Choose device and precision, join the launcher's process group if there is one, start
    logging (warnings only if `quiet`), and seed torch.

    Raises ValueError for a device or precision that this process cannot have, or if the launcher's
    restarts cannot work.
    """
    place = read_place()
    rank, world_size = place.rank, place.world_size
    level = logging.WARNING if quiet else logging.INFO
    with logging_to_terminal(is_main=rank == 0, level=level):
        device = select_device(device_name, local_rank)
        precision = choose_precision(precision, device)
        cpu_group = None
        if world_size > 1:
            with stopping_at_once():
                cpu_group = _join_process_group(rank, world_size, device)
        if device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(seed)  # the same on all processes: they must initialize alike
        with use_fast_matmuls(device, precision), use_deterministic_algorithms(deterministic):
            yield Runtime(rank, world_size, device, precision, cpu_group)
        if world_size > 1:
            dist.destroy_process_group()


def _join_process_group(rank: int, world_size: int, device: torch.device) -> dist.ProcessGroup:
    """Join the others in the default group, for collectives; returns a second one on the CPU."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    host, port = read_meeting_point()  # torch's own messages name no variable
    store = _open_restart_store()
    if store is None:
        try:
            dist.init_process_group(backend, timeout=STEP_TIMEOUT)  # reads the environment
        except RuntimeError as error:
            if PORT_IN_USE not in str(error):
                raise
            raise OSError(
                f"MASTER_PORT {port} is in use on {host}: choose another, or give torchrun "
                "--standalone"
            ) from None
    else:
        dist.init_process_group(
            backend, timeout=STEP_TIMEOUT, store=store, rank=rank, world_size=world_size
        )
    return dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)


def _open_restart_store() -> dist.Store | None:
    """The store in which processes that torchrun may restart find each other, or None for PyTorch's
    default.

    The launcher's own store outlives a restart: in it, the new processes would find addresses of
    the old ones, where nobody listens any more. With one agent, its restart count keeps attempts
    apart. Several agents count separately, so they must not share the store: ValueError.
    """
    restart_count = read_restart_count()
    if restart_count is None:
        return None
    if os.environ.get("GROUP_WORLD_SIZE", "1") != "1":
        raise ValueError(
            "several torchrun agents with --max-restarts need --rdzv_backend=c10d and, in the "
            "environment of each, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: restarted processes "
            "would wait for those before them"
        )
    host, port = read_meeting_point()
    store = dist.TCPStore(host, port, is_master=False, timeout=STEP_TIMEOUT)
    return dist.PrefixStore(f"attempt_{restart_count}", store)
