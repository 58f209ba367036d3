"""The two stages' losses (SPEC §5)."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED_ID = 0  # CLIP's pad id, which is what targets are filled up with


MIN_CHUNK = (
    64  # targets whose logits over the whole vocabulary are held at once; more where rows are wide
)


def contrastive_loss(similarity: Tensor) -> Tensor:
    """Symmetric InfoNCE over a similarity (N, N), the diagonal being right: mean over rows and over columns, halved."""
    target = torch.arange(len(similarity), device=similarity.device)
    return (F.cross_entropy(similarity, target) + F.cross_entropy(similarity.T, target)) / 2


def caption_loss(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Mean token cross-entropy of logits (..., V) against ids (...), ignoring id 0."""
    total = F.cross_entropy(
        logits.flatten(0, -2).float(),
        target_ids.flatten(),
        ignore_index=IGNORED_ID,
        reduction="sum",
    )
    return total / (target_ids != IGNORED_ID).sum().clamp(min=1)


def vocabulary_loss(
    hidden: Tensor, words: Tensor, bias: Tensor, target_ids: Tensor, weights: Tensor
) -> Tensor:
    """Σ weights · cross-entropy of the logits `hidden @ words.T + bias`, whose (N, V) never exist all at once.

    hidden (N, E), words (V, E), bias (V,), target_ids and weights (N,). The gradients are made along with the
    loss, chunk by chunk. Matrix products follow autocast.
    """
    return _VocabularyLoss.apply(hidden, words, bias, target_ids, weights)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, words: Tensor, bias: Tensor, target_ids: Tensor, weights: Tensor
    ) -> Tensor:
        device = hidden.device.type
        dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else words.dtype
        )
        needs_hidden, needs_words, needs_bias, *_ = ctx.needs_input_grad
        total, hidden_grads, words_grad, bias_grad = (
            weights.new_zeros(()),
            [],
            None,
            torch.zeros_like(bias),
        )
        with torch.autocast(device, enabled=False):
            hidden, words = hidden.to(dtype), words.to(dtype)
            size = max(MIN_CHUNK, hidden.shape[1] // 2)
            columns = (hidden, target_ids[:, None], weights[:, None])
            for states, target, weight in zip(
                *(column.split(size) for column in columns), strict=True
            ):
                log_probs = (states @ words.T).float().add_(bias)  # logits as yet
                log_probs -= log_probs.logsumexp(dim=1, keepdim=True)
                total -= (weight * log_probs.gather(1, target)).sum()
                if not any(ctx.needs_input_grad):
                    continue
                errors = log_probs.exp_().scatter_add_(
                    1, target, torch.full_like(weight, -1.0)
                )  # softmax − one-hot
                if needs_bias:
                    bias_grad.addmv_(errors.T, weight[:, 0])
                errors = errors.to(
                    dtype
                )  # in [−1, 1]: the weights come in afterwards, since float16 would lose small ones
                if needs_hidden:
                    hidden_grads.append(weight * (errors @ words))
                if needs_words:
                    weighted = (weight * states).to(dtype)
                    if words_grad is None:
                        words_grad = (errors.T @ weighted).float()
                    elif dtype == torch.float32:
                        words_grad.addmm_(errors.T, weighted)
                    else:
                        words_grad += errors.T @ weighted
        ctx.gradients = (
            torch.cat(hidden_grads) if hidden_grads else None,
            words_grad,
            bias_grad if needs_bias else None,
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, ctx.gradients = ctx.gradients, None
        return *(None if part is None else part.mul_(gradient) for part in parts), None, None
