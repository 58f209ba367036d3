"""Finetuning: the captioner predicts each token of a sentence (docs/reference.md, Losses)."""

import torch.distributed as dist
from torch import Tensor

from dataloaders.samples import CaptionSamples
from modules.losses import IGNORED_ID
from modules.training.objectives import Objective, Recipe


class CrossEntropy(Objective):
    """Images (B, 1+K, 3, R, R) uint8 and caption arrays (B, K, L) → token cross-entropy.

    K is 2 with a distractor, else 1. The loss is the sum of the mean over the changes' tokens and
    the mean over the distractors', each over all processes.
    """

    task = "caption"
    samples = CaptionSamples
    recipe = Recipe("linear", betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, patience=11)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pairs = self.model.encode_against_first(self.model.normalize_images(batch["images"]))
        ids = _changes_first(batch["caption_input_ids"])
        mask = _changes_first(batch["caption_mask"])
        target = _changes_first(batch["caption_target_ids"])
        weights = _token_weights(target)
        return self.model.weighted_caption_loss(
            pairs.tokens,
            ids.flatten(0, 1),
            mask.flatten(0, 1),
            target.flatten(0, 1),
            weights.flatten(0, 1),
        )


def _changes_first(captions: Tensor) -> Tensor:
    """(B, K, L) → (K, B, L): all change captions, then all distractors'."""
    return captions.transpose(0, 1)


def _token_weights(target: Tensor) -> Tensor:
    """(K, B, L) target ids → the weight of each token: processes / tokens, and 0 for an id 0.

    `tokens` counts those of all changes' captions, or of all distractors', on all processes.
    """
    is_counted = target != IGNORED_ID
    counts = is_counted.sum(dim=(1, 2)).float()
    scale = 1
    if dist.is_initialized():
        dist.all_reduce(counts)
        scale = dist.get_world_size()  # undone by DistributedDataParallel's mean
    return is_counted * (scale / counts.clamp(min=1))[:, None, None]
