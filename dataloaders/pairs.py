"""Scenes → training samples and evaluation items → batches of tensors. Knows no dataset's files (SPEC §3).

Letters: B samples, L words. Images are uint8 (B, 2|3, 3, H, W): before, after and, where a dataset has it, the distractor.
"""

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Sampler, default_collate

from modules.stopping import leave_signals_to_parent
from modules.tokenizer import tokenize_caption

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scene:
    """A pair with its captions; CLEVR-Change's scenes also have a distractor: another picture in which nothing changed."""

    id: str
    before: str
    after: str
    captions: tuple[str, ...]
    distractor: str | None = None
    distractor_id: str | None = None
    distractor_captions: tuple[str, ...] = ()
    change_type: str | None = None

    @property
    def image_paths(self) -> list[str]:
        """before, after and, if there is one, the distractor."""
        return [self.before, self.after] + ([self.distractor] if self.distractor else [])


ImageReader = Callable[
    [Sequence[str]], Tensor
]  # paths → (n, 3, H, W) uint8: ImageFiles or ImageCache
Key = tuple[
    int, int
]  # (epoch, index): all that a sample's random draws may depend on, beside the seed


class SceneDataset(Dataset):
    """The base: scenes, their images, and draws that depend on (seed, epoch, index) alone."""

    def __init__(
        self, scenes: Sequence[Scene], images: ImageReader, max_words: int, seed: int = 0
    ) -> None:
        self.scenes, self.images, self.max_words, self.seed = scenes, images, max_words, seed

    def __len__(self) -> int:
        return len(self.scenes)

    def draw(self, key: Key) -> random.Random:
        """The random source of one sample."""
        return random.Random(f"{self.seed}/{key[0]}/{key[1]}")


class AdaptationSamples(SceneDataset):
    """Training of stage 1: one sample per sentence; a distractor stands in for before half of the time."""

    def __init__(
        self, scenes: Sequence[Scene], images: ImageReader, max_words: int, seed: int = 0
    ) -> None:
        super().__init__(scenes, images, max_words, seed)
        self.index = torch.tensor(
            [(s, c) for s, scene in enumerate(scenes) for c in range(len(scene.captions))]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        scene_index, caption_index = self.index[key[1]].tolist()
        scene = self.scenes[scene_index]
        swap = scene.distractor is not None and self.draw(key).random() < 0.5
        arrays = tokenize_caption(scene.captions[caption_index], self.max_words)
        return {
            "images": self.images([scene.distractor if swap else scene.before, scene.after]),
            "id": scene.id,
            "text_ids": torch.from_numpy(arrays["retrieval_text_ids"]),
        }


class FinetuningSamples(SceneDataset):
    """Training of stage 2: one sample per scene, one of its sentences drawn, and one of the distractor's where there is one."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        scene, draw = self.scenes[key[1]], self.draw(key)
        captions = [draw.choice(scene.captions)] + (
            [draw.choice(scene.distractor_captions)] if scene.distractor else []
        )
        arrays = [tokenize_caption(caption, self.max_words) for caption in captions]
        words = {
            name: torch.stack([torch.from_numpy(array[name]) for array in arrays])  # (captions, L)
            for name in ("caption_input_ids", "caption_mask", "caption_target_ids")
        }
        return {"images": self.images(scene.image_paths), "id": scene.id, "scene": key[1], **words}


class EvaluationPairs(SceneDataset):
    """Evaluation: each scene's images once; `distractors=False` leaves the third image unread."""

    def __init__(self, scenes: Sequence[Scene], images: ImageReader, distractors: bool) -> None:
        super().__init__(scenes, images, max_words=0)
        self.distractors = distractors

    def __getitem__(self, key: Key) -> dict[str, Any]:
        scene = self.scenes[key[1]]
        return {
            "images": self.images(scene.image_paths if self.distractors else scene.image_paths[:2]),
            "id": scene.id,
        }


class _TrainingOrder(DistributedSampler):
    """DistributedSampler's shuffled, padded share of this process, from number `start` on, as (epoch, index) keys."""

    start = 0

    def __iter__(self) -> Iterator[Key]:
        return ((self.epoch, index) for index in islice(super().__iter__(), self.start, None))


class _FileOrder(Sampler):
    """Items rank, rank + world, …: nothing dropped, nothing twice."""

    def __init__(self, size: int, rank: int, world_size: int) -> None:
        self.items = range(rank, size, world_size)

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Key]:
        return ((0, index) for index in self.items)


class _Fallible(Dataset):
    """Hands a sample's ValueError or OSError over as a value, so that a worker's traceback does not bury its one line."""

    def __init__(self, dataset: SceneDataset) -> None:
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
    dataset: SceneDataset,
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
        _TrainingOrder(dataset, world_size, rank, shuffle=True, seed=seed)
        if training
        else _FileOrder(len(dataset), rank, world_size)
    )
    return Batches(
        DataLoader(
            _Fallible(dataset),
            batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_collate,
            drop_last=training,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=training and num_workers > 0,
            worker_init_fn=leave_signals_to_parent,
        )
    )


def check_scenes(scenes: Sequence[Scene], source: str) -> None:
    """Refuse an empty split and scenes without a sentence; count and say empty captions."""
    if not scenes:
        raise ValueError(f"{source} lists no pairs")
    for scene in scenes:
        if not (scene.captions and (scene.distractor is None or scene.distractor_captions)):
            raise ValueError(f"{source}: pair {scene.id} has no caption")
    captions = [
        caption for scene in scenes for caption in scene.captions + scene.distractor_captions
    ]
    empty = sum(not caption.strip() for caption in captions)
    log.info(
        "%s: %d pairs, %d captions%s",
        source,
        len(scenes),
        len(captions),
        f", {empty} of them empty" if empty else "",
    )
