"""Pairs → training samples and evaluation items, as dictionaries of tensors.

Dimensions: L words, K captions, R resolution. Images are uint8 (2 or 3, 3, R, R): before, after
and, if the dataset has one, the distractor. Source: docs/reference.md, Data.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dataloaders.pairs import ImagePair

# Paths → (n, 3, R, R) uint8: `images.ImageFiles` or `storage.image_cache.ImageCache`.
ImageReader = Callable[[Sequence[str]], Tensor]
# A caption → the arrays (L,) that `modules.tokenizer.tokenize_caption` names.
CaptionTokenizer = Callable[[str], Mapping[str, np.ndarray]]
# (epoch, index): all that a sample's random draws may depend on, besides the seed.
SampleKey = tuple[int, int]


class PairSamples(Dataset):
    """The base: pairs and their images. A key gives the same sample in every process and run."""

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        images: ImageReader,
        tokenize: CaptionTokenizer | None = None,
        seed: int = 0,
    ) -> None:
        self.pairs = pairs
        self.images = images
        self.tokenize = tokenize
        self.seed = seed

    def __len__(self) -> int:
        return len(self.pairs)

    def make_rng(self, key: SampleKey) -> random.Random:
        """The generator of a sample's random draws."""
        epoch, index = key
        return random.Random(f"{self.seed}/{epoch}/{index}")


class RetrievalSamples(PairSamples):
    """Adaptation: one sample per caption of a change.

    If there is a distractor, it takes the place of the before image half of the time.
    """

    def __init__(
        self,
        pairs: Sequence[ImagePair],
        images: ImageReader,
        tokenize: CaptionTokenizer,
        seed: int = 0,
    ) -> None:
        super().__init__(pairs, images, tokenize, seed)
        rows = [
            (pair_index, index_in_pair)
            for pair_index, pair in enumerate(pairs)
            for index_in_pair in range(len(pair.captions))
        ]
        # A row per caption: the index of its pair, and its own index among that pair's captions.
        self.caption_index = torch.tensor(rows)

    def __len__(self) -> int:
        return len(self.caption_index)

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """images (2, 3, R, R), the pair's id, text_ids (L,) and text_mask (L,)."""
        pair_index, index_in_pair = self.caption_index[key[1]].tolist()
        pair = self.pairs[pair_index]
        before = pair.before
        if pair.distractor is not None and self.make_rng(key).random() < 0.5:
            before = pair.distractor
        arrays = self.tokenize(pair.captions[index_in_pair])
        return {
            "images": self.images([before, pair.after]),
            "id": pair.id,
            "text_ids": torch.from_numpy(arrays["retrieval_text_ids"]),
            "text_mask": torch.from_numpy(arrays["retrieval_text_mask"]),
        }


class CaptionSamples(PairSamples):
    """Finetuning: one sample per pair, with one of its captions, and one of its distractor's."""

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """images (2 or 3, 3, R, R), the pair's id and index, caption ids and mask (K, L)."""
        pair = self.pairs[key[1]]
        rng = self.make_rng(key)
        captions = [rng.choice(texts) for texts in pair.captions_by_id.values()]
        arrays = [self.tokenize(caption) for caption in captions]
        sample = {"images": self.images(pair.image_paths), "id": pair.id, "index": key[1]}
        for name in ("caption_input_ids", "caption_mask", "caption_target_ids"):
            sample[name] = torch.from_numpy(np.stack([array[name] for array in arrays]))
        return sample


class EvaluationPairs(PairSamples):
    """Evaluation: each pair's images once. `distractors=False` leaves the third image unread."""

    def __init__(self, pairs: Sequence[ImagePair], images: ImageReader, distractors: bool) -> None:
        super().__init__(pairs, images)
        self.distractors = distractors

    def __getitem__(self, key: SampleKey) -> dict[str, Any]:
        """images (2 or 3, 3, R, R) and the pair's id."""
        pair = self.pairs[key[1]]
        paths = pair.image_paths if self.distractors else [pair.before, pair.after]
        return {"images": self.images(paths), "id": pair.id}
