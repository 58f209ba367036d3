"""TODO."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dataloaders.images import normalize
from modules.clip4idc import CLIP4IDC
from modules.losses import contrastive_loss
from modules.model.clip import Features


class _GatherRows(torch.autograd.Function):
    """Rows of all processes in rank order; backward hands each process the sum of the gradients for its own rows.

    With every process computing the same loss on what is gathered, and DistributedDataParallel averaging, the outcome is the
    gradient of one process on the global batch.
    """

    @staticmethod
    def forward(ctx, rows: Tensor) -> Tensor:
        ctx.num_rows = len(rows)
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank() * ctx.num_rows :][: ctx.num_rows]


def gather_rows(rows: Tensor) -> Tensor:
    """(n, …) rows of each process → (n·processes, …), with gradients."""
    return _GatherRows.apply(rows) if dist.is_initialized() else rows


class Contrastive(nn.Module):
    """Stage 1: images (B, 2, 3, H, W) uint8 and text_ids (B, L) → contrastive loss over the global batch."""

    def __init__(self, model: CLIP4IDC) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pair = self.model.encode_pairs(normalize(batch["images"]))
        text = self.model.encode_text(batch["text_ids"])
        tokens = (
            gather_rows(pair.tokens) if hasattr(self.model, "cross") else pair.tokens
        )  # the cosine alone does without
        everyone = Features(tokens, gather_rows(pair.pooled))
        return contrastive_loss(gather_rows(self.model.score_pairs(text, everyone)))
