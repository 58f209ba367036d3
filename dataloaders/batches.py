"""TODO."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from dataloaders.samples import Key, PairSamples
from system.signals import ignore_signals_in_worker


class ShuffledSampler(DistributedSampler):
    """DistributedSampler's shuffled, padded share of this process, from number `start` on, as (epoch, index) keys."""

    start = 0

    def __iter__(self) -> Iterator[Key]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))


class SequentialSampler(Sampler):
    """Items rank, rank + world, …: nothing dropped, nothing twice."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.items = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Key]:
        return ((0, index) for index in self.items)


class ErrorsAsItems(Dataset):
    """Hands a sample's ValueError or OSError over as a value, so that a worker's traceback does not bury its one line."""

    def __init__(self, dataset: PairSamples) -> None:
        self.dataset = dataset

    def __getitem__(self, key: Key) -> dict[str, Any] | Exception:
        try:
            return self.dataset[key]
        except (ValueError, OSError) as error:
            return error


def _collate(samples: list[dict[str, Any] | Exception]) -> dict[str, Any] | Exception:
    failed = next((sample for sample in samples if isinstance(sample, Exception)), None)
    return failed or trim_padding(default_collate(samples))


def trim_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Text arrays (..., L) cut to the batch's longest sentence: what follows takes part in nothing but costs the same."""
    if "text_ids" in batch:
        return {
            **batch,
            "text_ids": batch["text_ids"][..., : int(batch["text_ids"].argmax(dim=-1).max()) + 1],
        }  # up to EOT
    if "caption_mask" not in batch:
        return batch
    longest = int(batch["caption_mask"].sum(dim=-1).max())
    return {
        name: value[..., :longest] if name.startswith("caption_") else value
        for name, value in batch.items()
    }


class Batches:
    """An iterable of batches, each a dict of tensors (and ids); raises the ValueError or OSError of an unreadable sample."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch whose order and draws the next iteration gives, and how many of its batches are left out, being done."""
        self.loader.sampler.set_epoch(epoch)
        self.loader.sampler.start = done * self.loader.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for batch in self.loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


def build_loader(
    dataset: PairSamples,
    batch_size: int,
    training: bool,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
) -> Batches:
    """Batches of `batch_size` per process: shuffled by epoch with the last incomplete one dropped, or in file order.

    Raises ValueError where a training split fills no batch.
    """
    if training and len(dataset) < batch_size * world_size:
        raise ValueError(
            f"the training split has {len(dataset)} samples, fewer than one batch of {batch_size * world_size}: "
            "lower --batch_size"
        )
    sampler = (
        ShuffledSampler(dataset, world_size, rank, shuffle=True, seed=seed)
        if training
        else SequentialSampler(len(dataset), rank, world_size)
    )
    return Batches(
        DataLoader(
            ErrorsAsItems(dataset),
            batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            drop_last=training,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=training and num_workers > 0,
            worker_init_fn=ignore_signals_in_worker,
        )
    )
