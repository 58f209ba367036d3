"""What to do about a training step that needs more memory than the GPU has."""

import gc
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from modules.training.trainer import Trainer


@contextmanager
def advise_on_memory(trainer: Trainer, batch: dict[str, Any]) -> Iterator[None]:
    """Inside, `trainer` takes a step on `batch`, one process's pairs.

    Raises ValueError where the GPU's memory does not suffice; it names a batch that does.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)  # they hold the step's tensors
        raise ValueError(_describe(trainer, batch)) from None


def _describe(trainer: Trainer, batch: dict[str, Any]) -> str:
    num_pairs = len(batch["images"])
    needed = f"out of GPU memory with {num_pairs} pairs at a time"
    if trainer.runtime.world_size > 1:
        # The other processes take no part in trying smaller batches.
        needed += " in each process"
        return f"{needed}: try {_name_flags(trainer, num_pairs, max(num_pairs // 2, 1))}"
    fitting = _find_fitting(trainer, batch)
    if fitting is None:
        return f"{needed}, and a single pair does not fit either: use a smaller model"
    return f"{needed}; {fitting} fit: use {_name_flags(trainer, num_pairs, fitting)}"


def _name_flags(trainer: Trainer, num_pairs: int, fitting: int) -> str:
    """The flags with which a process takes `fitting` pairs at a time instead of `num_pairs`."""
    micro_batches = trainer.options.gradient_accumulation_steps
    batch_size = fitting * micro_batches * trainer.runtime.world_size
    flags = f"--batch_size {batch_size}"
    if num_pairs % fitting == 0:
        more = micro_batches * num_pairs // fitting
        flags += f", or --gradient_accumulation_steps {more} and the same --batch_size"
    return flags


def _find_fitting(trainer: Trainer, batch: dict[str, Any]) -> int | None:
    """The largest half, quarter and so on of a batch that fits, tried without taking a step."""
    size = len(batch["images"]) // 2
    while size:
        if _fits(trainer, {name: values[:size] for name, values in batch.items()}):
            return size
        size //= 2
    return None


def _fits(trainer: Trainer, batch: dict[str, Any]) -> bool:
    trainer.discard_gradients()
    gc.collect()
    torch.cuda.empty_cache()
    try:
        moments = [
            torch.empty_like(p, device=trainer.runtime.device) for p in _new_moments(trainer)
        ]
        trainer.backward(batch, is_last_micro_batch=True)
    except torch.OutOfMemoryError as error:
        traceback.clear_frames(error.__traceback__)
        return False
    del moments
    return True


def _new_moments(trainer: Trainer) -> list[Tensor]:
    """A parameter for each moment that the optimizer has yet to make: two for each parameter."""
    if trainer.optimizer.state:
        return []
    groups = trainer.optimizer.param_groups
    return [parameter for group in groups for parameter in group["params"]] * 2
