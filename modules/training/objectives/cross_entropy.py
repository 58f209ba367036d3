"""TODO."""

import torch.distributed as dist
from torch import Tensor, nn

from dataloaders.images import normalize
from modules.clip4idc import CLIP4IDC
from modules.losses import IGNORED_ID


class CrossEntropy(nn.Module):
    """Stage 2: images (B, 2|3, 3, H, W) uint8 and caption arrays (B, 1|2, L) → token cross-entropy.

    With a distractor the losses of the two pairs are added, each a mean over its own tokens of all processes.
    """

    def __init__(self, model: CLIP4IDC) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pairs = self.model.encode_against_first(normalize(batch["images"]))
        ids, mask, target = (
            batch[f"caption_{name}"].transpose(
                0, 1
            )  # (1|2, B, L): all change captions, then all distractors'
            for name in ("input_ids", "mask", "target_ids")
        )
        counts = (
            (target != IGNORED_ID).sum(dim=(1, 2)).float()
        )  # tokens of each kind, of all processes
        scale = 1
        if dist.is_initialized():
            dist.all_reduce(counts)
            scale = dist.get_world_size()  # undone by DistributedDataParallel's mean
        weights = (scale / counts.clamp(min=1))[:, None, None].expand_as(target)
        return self.model.caption_loss(
            pairs.tokens, *(part.flatten(0, 1) for part in (ids, mask, target, weights))
        )
