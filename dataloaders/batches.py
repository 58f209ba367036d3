"""Samples → batches: in what order, in which process, and how they are put together."""

import logging
from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from dataloaders.samples import PairSamples, SampleKey
from system.processes import count_free_files, has_room_for_sockets, read_free_shared_memory
from system.signals import holding_sigterm_back, leave_signals_to_parent

log = logging.getLogger(__name__)

MASK_ENDING = "mask"
FEW_FILES = 32  # that a run opens besides: its log, weights, images

Samples = list[dict[str, Any] | Exception]


class ShuffledSampler(DistributedSampler):
    """This process's share of an epoch's order, shuffled and padded, as (epoch, index) keys.

    The first `start` samples are left out: a resumed epoch has seen them.
    """

    start = 0

    def __iter__(self) -> Iterator[SampleKey]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))


class ShareSampler(Sampler):
    """This process's share: items rank, rank + world_size, …, so that none comes twice."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.items = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[SampleKey]:
        return ((0, index) for index in self.items)


class ErrorsAsItems(Dataset):
    """Returns a sample's ValueError or OSError instead of raising it.

    Raised in a worker process, the one-line message would be buried in a traceback.
    """

    def __init__(self, dataset: PairSamples) -> None:
        self.dataset = dataset

    def __getitem__(self, key: SampleKey) -> dict[str, Any] | Exception:
        try:
            return self.dataset[key]
        except (ValueError, OSError) as error:
            return error


def _collate(samples: Samples) -> dict[str, Any] | Exception:
    for sample in samples:
        if isinstance(sample, Exception):
            return sample
    return trim_padding(default_collate(samples))


def _as_arrays(samples: Samples) -> Samples:
    """With arrays for tensors: processes share the memory of tensors, and copy arrays."""
    return [sample if isinstance(sample, Exception) else _to_arrays(sample) for sample in samples]


def _to_arrays(sample: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.numpy() if isinstance(value, Tensor) else value
        for name, value in sample.items()
    }


def trim_padding(batch: dict[str, Any]) -> dict[str, Any]:
    """Cut text arrays (..., L) to the batch's longest text. The padding after it has no effect.

    Arrays belong together by the first word of their names: `text_mask` says how long `text_ids`
    are, and `caption_mask` all that begins with `caption_`.
    """
    lengths = {
        name.removesuffix(MASK_ENDING): int(mask.sum(dim=-1).max())
        for name, mask in batch.items()
        if name.endswith(f"_{MASK_ENDING}")
    }
    trimmed = dict(batch)
    for prefix, length in lengths.items():
        for name, array in batch.items():
            if name.startswith(prefix):
                trimmed[name] = array[..., :length]
    return trimmed


class Batches:
    """An iterable of batches, each a dictionary of tensors and ids.

    Raises the ValueError or OSError of a sample that cannot be read.
    """

    def __init__(self, loader: DataLoader, collate_here: bool = False) -> None:
        """With `collate_here` the loader's workers return lists of samples."""
        self.loader = loader
        self.collate_here = collate_here

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, skip_batches: int = 0) -> None:
        """Choose the epoch of the next iteration, without its first `skip_batches` batches.

        For training only: batches for evaluation have no epochs.
        """
        self.loader.sampler.set_epoch(epoch)
        self.loader.sampler.start = skip_batches * self.loader.batch_size

    def __iter__(self) -> Iterator[dict[str, Any]]:
        with holding_sigterm_back():
            loaded = iter(self.loader)
        for found in loaded:
            batch = _collate(found) if self.collate_here else found
            if isinstance(batch, Exception):
                raise batch
            yield batch


def build_batches(
    dataset: PairSamples,
    batch_size: int,
    training: bool,
    num_workers: int,
    rank: int = 0,
    world_size: int = 1,
    seed: int = 0,
    for_gpu: bool = False,
) -> Batches:
    """Batches of `batch_size` for each process.

    Training batches are reshuffled each epoch, and the last incomplete batch is dropped. Evaluation
    batches are in file order. With `for_gpu` they are in memory from which a GPU copies fastest.
    Raises ValueError if a training split fills no batch.
    """
    if training and len(dataset) < batch_size * world_size:
        raise ValueError(
            f"the training split has {len(dataset)} samples, fewer than one batch of "
            f"{batch_size * world_size}: lower --batch_size"
        )
    if training:
        sampler = ShuffledSampler(dataset, world_size, rank, shuffle=True, seed=seed)
    else:
        sampler = ShareSampler(len(dataset), rank, world_size)
    samples = ErrorsAsItems(dataset)
    obstacle = None
    if num_workers:
        obstacle = _find_obstacle_to_sharing(samples, batch_size, num_workers, world_size)
    if obstacle:
        log.warning("batches are copied from the workers, which is slower: %s", obstacle)
    loader = DataLoader(
        samples,
        batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=_as_arrays if obstacle else _collate,
        drop_last=training,
        pin_memory=for_gpu,
        persistent_workers=training and num_workers > 0,
        worker_init_fn=leave_signals_to_parent,
    )
    return Batches(loader, collate_here=obstacle is not None)


def _find_obstacle_to_sharing(
    samples: ErrorsAsItems, batch_size: int, num_workers: int, world_size: int
) -> str | None:
    """Why workers cannot share the memory of the batches that they prepare; None if they can.

    If they tried, they would crash or wait for ever. All processes are taken to be on this machine.
    """
    sample = samples[0, 0]
    if isinstance(sample, Exception):
        return None  # it ends the run at its turn
    tensors = [value for value in sample.values() if isinstance(value, Tensor)]
    # The loader prepares two for each worker; one more may be in use, and one on its way.
    num_batches = 2 * num_workers + 2
    num_samples = min(num_batches * batch_size, len(samples.dataset))
    size = world_size * num_samples * sum(tensor.nbytes for tensor in tensors)
    free_size = read_free_shared_memory()
    if size > free_size:
        return (
            f"shared memory (/dev/shm) has {free_size / 1e9:.3f} GB free, sharing needs "
            f"{size / 1e9:.3f} GB (docker run --shm-size gives more)"
        )
    if not has_room_for_sockets():
        return "the path of the folder for temporary files (TMPDIR) is too long"
    num_files = num_batches * (len(tensors) + 1) + FEW_FILES
    free_files = count_free_files()
    if num_files > free_files:
        return (
            f"{free_files} more files may be open, sharing needs {num_files} (ulimit -n raises "
            "that)"
        )
    return None
