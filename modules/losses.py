"""The two stages' losses (SPEC §5)."""

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = 0  # CLIP's pad id, which is what targets are filled up with


def contrastive_loss(similarity: Tensor) -> Tensor:
    """Symmetric InfoNCE over a square similarity (N, N), the diagonal being right: mean over rows and over columns, halved."""
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def caption_loss(logits: Tensor, target_ids: Tensor, num_tokens: Tensor | None = None) -> Tensor:
    """Mean token cross-entropy of logits (..., V) against ids (...), ignoring id 0.

    `num_tokens` replaces the count of targets in the mean's denominator (the global count under several processes).
    """
    count = (target_ids != IGNORED).sum() if num_tokens is None else num_tokens
    total = F.cross_entropy(logits.flatten(0, -2).float(), target_ids.flatten(), ignore_index=IGNORED, reduction="sum")
    return total / count.clamp(min=1)
