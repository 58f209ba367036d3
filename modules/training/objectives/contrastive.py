"""Adaptation: sentences and their image pairs become similar (docs/reference.md, Losses)."""

import torch
import torch.distributed as dist
from torch import Tensor

from dataloaders.samples import RetrievalSamples
from modules.losses import contrastive_loss
from modules.model.backbone import Features
from modules.training.objectives import Objective, Recipe


class _ConcatenateOverProcesses(torch.autograd.Function):
    """Rows of all processes in rank order; backward gives each process the gradients of its own.

    Every process computes the same loss from the gathered rows, so backward sums the gradients over
    the processes. DistributedDataParallel then averages, which leaves the gradient of the whole
    batch.
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
        first = dist.get_rank() * ctx.num_rows
        return gradient[first : first + ctx.num_rows]


def concatenate_over_processes(rows: Tensor) -> Tensor:
    """(n, …) rows of each process → (n·processes, …), with gradients."""
    return _ConcatenateOverProcesses.apply(rows) if dist.is_initialized() else rows


class Contrastive(Objective):
    """Images (B, 2, 3, R, R) uint8 and text_ids (B, L) → contrastive loss over the global batch.

    Each process scores its own texts against the pairs of all, and gets the others' rows.
    """

    task = "retrieval"
    samples = RetrievalSamples
    fewest_pairs = 2  # each pair is told from the others; the loss of one alone is 0
    recipe = Recipe("cosine", betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, patience=None)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        pair = self.model.encode_pairs(self.model.normalize_images(batch["images"]))
        text = self.model.encode_text(batch["text_ids"])
        tokens = pair.tokens
        if self.model.uses_cross_encoder:  # the cosine needs no tokens
            tokens = concatenate_over_processes(tokens)
        all_pairs = Features(tokens, concatenate_over_processes(pair.pooled))
        similarity = concatenate_over_processes(self.model.score_pairs(text, all_pairs))
        return contrastive_loss(similarity)
