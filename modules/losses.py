"""The losses of both tasks. See docs/reference.md, Losses.

Dimensions: N rows or targets, n targets of a chunk, E hidden size, V vocabulary.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_ID = 0  # CLIP's pad id, used to pad the targets
MIN_CHUNK = 64  # targets whose logits over the vocabulary exist at once; more for wide states


def contrastive_loss(similarity: Tensor) -> Tensor:
    """Symmetric InfoNCE over a similarity (N, N) whose diagonal holds the matching pairs.

    The mean over rows and the mean over columns, halved (paper, section 3.2).
    """
    target = torch.arange(len(similarity), device=similarity.device)
    by_row = F.cross_entropy(similarity, target)
    by_column = F.cross_entropy(similarity.T, target)
    return (by_row + by_column) / 2


def caption_loss(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Mean token cross-entropy of logits (..., V) against ids (...), ignoring id 0.

    For other programs and tests: training takes `vocabulary_loss`, which needs less memory.
    """
    rows = logits.flatten(0, -2).float()
    target = target_ids.flatten()
    total = F.cross_entropy(rows, target, ignore_index=IGNORED_ID, reduction="sum")
    return total / (target != IGNORED_ID).sum().clamp(min=1)


def vocabulary_loss(
    states: Tensor, token_embeddings: Tensor, bias: Tensor, target_ids: Tensor, weights: Tensor
) -> Tensor:
    """Σ weights · cross-entropy of the logits `states @ token_embeddings.T + bias`.

    states (N, E), token_embeddings (V, E), bias (V,), target_ids and weights (N,). The logits
    (N, V) never exist all at once: the gradients are computed along with the loss, chunk by chunk.
    That takes about as long as `F.cross_entropy`, but for 1,600 targets 0.2 GB instead of 0.8 GB
    (benchmarks/hand_written.py). Matrix products follow autocast.
    """
    return _VocabularyLoss.apply(states, token_embeddings, bias, target_ids, weights)


class _Chunk(NamedTuple):
    """Some of the targets: states (n, E), target_ids and weights (n, 1)."""

    states: Tensor
    target_ids: Tensor
    weights: Tensor

    def log_probs(self, embeddings: Tensor, bias: Tensor) -> Tensor:
        """(n, V), float32."""
        logits = (self.states @ embeddings.T).float().add_(bias)
        return logits.sub_(logits.logsumexp(dim=1, keepdim=True))

    def log_likelihood(self, log_probs: Tensor) -> Tensor:
        """Σ weights · log-probability of the target."""
        return (self.weights * log_probs.gather(1, self.target_ids)).sum()

    def logit_gradients(self, log_probs: Tensor) -> Tensor:
        """Softmax minus one-hot (n, V), written over `log_probs`."""
        probs = log_probs.exp_()
        # Not scatter_add_, which --deterministic forbids on GPUs.
        return probs.scatter_(1, self.target_ids, probs.gather(1, self.target_ids) - 1)


class _Gradients:
    """The gradients accumulated so far; only those that are needed."""

    def __init__(self, needed: tuple[bool, ...], bias: Tensor) -> None:
        self.needs_states, self.needs_embeddings, self.needs_bias = needed
        self.states: list[Tensor] = []
        self.embeddings: Tensor | None = None
        self.bias = torch.zeros_like(bias)

    def add(self, chunk: _Chunk, logit_gradients: Tensor, embeddings: Tensor) -> None:
        """Add a chunk's part, in place: the embeddings' gradient is as large as the vocabulary."""
        if self.needs_bias:
            self.bias.addmv_(logit_gradients.T, chunk.weights[:, 0])
        # Still in [−1, 1]: weights are applied later, since float16 would lose small products.
        logit_gradients = logit_gradients.to(embeddings.dtype)
        if self.needs_states:
            self.states.append(chunk.weights * (logit_gradients @ embeddings))
        if self.needs_embeddings:
            self._add_to_embeddings(chunk, logit_gradients)

    def _add_to_embeddings(self, chunk: _Chunk, logit_gradients: Tensor) -> None:
        dtype = logit_gradients.dtype
        weighted = (chunk.weights * chunk.states).to(dtype)
        if self.embeddings is None:
            self.embeddings = (logit_gradients.T @ weighted).float()
        elif dtype == torch.float32:
            self.embeddings.addmm_(logit_gradients.T, weighted)
        else:
            self.embeddings += logit_gradients.T @ weighted

    def of_inputs(self) -> list[Tensor | None]:
        """Of states, token embeddings and bias; None if not needed, or if there was no target."""
        states = torch.cat(self.states) if self.states else None
        bias = self.bias if self.needs_bias else None
        return [states, self.embeddings, bias]


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, states: Tensor, embeddings: Tensor, bias: Tensor, target_ids: Tensor, weights: Tensor
    ) -> Tensor:
        device = states.device.type
        is_cast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_cast else embeddings.dtype
        needed = ctx.needs_input_grad[:3]
        gradients = _Gradients(needed, bias)
        total = weights.new_zeros(())
        with torch.autocast(device, enabled=False):
            states = states.to(dtype)
            embeddings = embeddings.to(dtype)
            size = max(MIN_CHUNK, states.shape[1] // 2)
            columns = (states, target_ids[:, None], weights[:, None])
            for parts in zip(*(column.split(size) for column in columns), strict=True):
                chunk = _Chunk(*parts)
                log_probs = chunk.log_probs(embeddings, bias)
                total -= chunk.log_likelihood(log_probs)
                if any(needed):
                    gradients.add(chunk, chunk.logit_gradients(log_probs), embeddings)
        ctx.gradients = gradients.of_inputs()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts = ctx.gradients
        ctx.gradients = None  # they are scaled in place, once
        scaled = [None if part is None else part.mul_(gradient) for part in parts]
        return *scaled, None, None
