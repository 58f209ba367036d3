"""TODO."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloaders.pairs import ImagePair
from modules.tokenizer import tokenize_caption

ImageReader = Callable[
    [Sequence[str]], Tensor
]  # paths → (n, 3, H, W) uint8: ImageFiles or ImageCache


Key = tuple[
    int, int
]  # (epoch, index): all that a sample's random draws may depend on, beside the seed


class PairSamples(Dataset):
    """The base: scenes, their images, and draws that depend on (seed, epoch, index) alone."""

    def __init__(
        self, scenes: Sequence[ImagePair], images: ImageReader, max_words: int, seed: int = 0
    ) -> None:
        self.pairs, self.images, self.max_words, self.seed = scenes, images, max_words, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def draw(self, key: Key) -> random.Random:
        """The random source of one sample."""
        return random.Random(f"{self.seed}/{key[0]}/{key[1]}")


class RetrievalSamples(PairSamples):
    """Training of stage 1: one sample per sentence; a distractor stands in for before half of the time."""

    def __init__(
        self, scenes: Sequence[ImagePair], images: ImageReader, max_words: int, seed: int = 0
    ) -> None:
        super().__init__(scenes, images, max_words, seed)
        self.index = torch.tensor(
            [(s, c) for s, scene in enumerate(scenes) for c in range(len(scene.captions))]
        )

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: Key) -> dict[str, Any]:
        scene_index, caption_index = self.index[key[1]].tolist()
        scene = self.pairs[scene_index]
        swap = scene.distractor is not None and self.draw(key).random() < 0.5
        arrays = tokenize_caption(scene.captions[caption_index], self.max_words)
        return {
            "images": self.images([scene.distractor if swap else scene.before, scene.after]),
            "id": scene.id,
            "text_ids": torch.from_numpy(arrays["retrieval_text_ids"]),
        }


class CaptionSamples(PairSamples):
    """Training of stage 2: one sample per scene, one of its sentences drawn, and one of the distractor's where there is one."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        scene, draw = self.pairs[key[1]], self.draw(key)
        captions = [draw.choice(scene.captions)] + (
            [draw.choice(scene.distractor_captions)] if scene.distractor else []
        )
        arrays = [tokenize_caption(caption, self.max_words) for caption in captions]
        words = {
            name: torch.stack([torch.from_numpy(array[name]) for array in arrays])  # (captions, L)
            for name in ("caption_input_ids", "caption_mask", "caption_target_ids")
        }
        return {"images": self.images(scene.image_paths), "id": scene.id, "scene": key[1], **words}


class EvaluationPairs(PairSamples):
    """Evaluation: each scene's images once; `distractors=False` leaves the third image unread."""

    def __init__(self, scenes: Sequence[ImagePair], images: ImageReader, distractors: bool) -> None:
        super().__init__(scenes, images, max_words=0)
        self.distractors = distractors

    def __getitem__(self, key: Key) -> dict[str, Any]:
        scene = self.pairs[key[1]]
        return {
            "images": self.images(scene.image_paths if self.distractors else scene.image_paths[:2]),
            "id": scene.id,
        }
