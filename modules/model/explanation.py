"""Where the model looked: attention weights of a caption, carried back to the images' patches.

Dimensions: B pairs, H heads, S tokens of a pair (2T), L words, K = S attended tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.tokenizer import PAD, decode, split_words

Calls = list[Tensor]  # the attention weights (B, H, …, S) of a module, one tensor a call


@dataclass(frozen=True)
class Caption:
    """A sentence, and the mean log-probability of its tokens and its end as its score.

    The score is at most 0, which is certainty.
    """

    text: str
    score: float


@dataclass(frozen=True)
class Explanation:
    """A caption and its attention maps: the shares of attention that patches receive.

    `words` are the caption's words and its end; `word_maps` (words, 2, grid, grid) are theirs, and
    `class_maps` (2, 2, grid, grid) are those of the class tokens of before and of after. The second
    axis is before, after. A map sums to 1 at most, over before and after together. Where the model
    has no attention maps, all three are empty.
    """

    caption: Caption
    words: tuple[str, ...]
    class_maps: np.ndarray
    word_maps: np.ndarray

    @classmethod
    def without_maps(cls, caption: Caption) -> "Explanation":
        """That of a model whose backbone has no attention over both images' tokens."""
        no_maps = np.zeros((0, 2, 0, 0), dtype=np.float32)
        return cls(caption, (), no_maps, no_maps)


def explain_caption(
    ids: Tensor, score: Tensor, class_attention: Tensor, word_attention: Tensor
) -> Explanation:
    """The explanation of one caption.

    ids (L,), 0 after EOT; score (); the attention that the pair's tokens receive from the two class
    tokens (2, S) and from each word (L, S).
    """
    used = [token for token in ids.tolist() if token != PAD]
    words = split_words(used)
    maps = [word_attention[places].mean(dim=0) for _, places in words]
    return Explanation(
        Caption(decode(used), score.item()),
        tuple(word for word, _ in words),
        patch_maps(class_attention),
        patch_maps(torch.stack(maps)),
    )


def rollout(layers: Sequence[Calls], tokens: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020) through layers, the first one first.

    Returns, for each of the tokens (B, S, E), the shares (B, S, S) of the tokens below the first
    layer that reach it: without layers, all of its own.
    """
    shares = torch.eye(tokens.shape[1], device=tokens.device).expand(len(tokens), -1, -1)
    for calls in layers:
        shares = _through_layer(calls, shares)
    return shares


def _through_layer(calls: Calls, shares: Tensor) -> Tensor:
    """Shares (B, S, S) that reach a layer's input → those that reach its output.

    Half of a token comes from the same token below, half from what it attends to.
    """
    identity = torch.eye(shares.shape[1], device=shares.device)
    return (mean_over_heads(calls) + identity) / 2 @ shares


def compute_token_attention(
    encoder: Sequence[Calls], cross: Sequence[Calls], joint_rollout: Tensor
) -> Tensor:
    """The shares (B, L, S) of the images' tokens in each word, averaged over the decoder's layers.

    A decoder layer attends (`cross`) to the output of the encoder layer of the same number. From
    there its attention is carried back through the encoder and then the joint vision layers.
    """
    found = []
    encoder_rollout = rollout([], joint_rollout)
    for encoder_calls, cross_calls in zip(encoder, cross, strict=True):
        encoder_rollout = _through_layer(encoder_calls, encoder_rollout)
        found.append(mean_over_heads(cross_calls) @ encoder_rollout @ joint_rollout)
    return torch.stack(found).mean(dim=0)


def mean_over_heads(calls: Calls) -> Tensor:
    """The weights (B, H, L, S) of a module that was called once → (B, L, S)."""
    (weights,) = calls
    return weights.mean(dim=1)


def patch_maps(attention: Tensor) -> np.ndarray:
    """Shares of a pair's tokens (R, 2T) → those of its patches (R, 2, grid, grid)."""
    patches = attention.unflatten(1, (2, -1))[:, :, 1:]  # without class tokens: (R, 2, T - 1)
    side = round(patches.shape[2] ** 0.5)
    return patches.unflatten(2, (side, side)).float().cpu().numpy()
