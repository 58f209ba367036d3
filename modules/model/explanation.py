"""Where the model looked: attention weights of a caption, carried back to the images' patches.

Dimensions: B pairs, H heads, S tokens of a pair (2T), E their size, L tokens of a caption, R rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from modules.tokenizer import decode, split_words

# What people must know about a caption's sureness, wherever it is shown.
SURENESS_MEANING = "how sure the model is of the wording, not of being right"

RecordedWeights = list[Tensor]  # the attention weights (B, H, …, S) of a module, one per call


@dataclass(frozen=True, repr=False)
class Caption:
    """A sentence and its score: the mean log-probability of its tokens, EOT included.

    A score of 0 means certainty.
    """

    text: str
    score: float

    def __repr__(self) -> str:
        return f"Caption({self.text!r}, score={self.score:.3f}, sureness={self.sureness:.0f} %)"

    @property
    def sureness(self) -> float:
        """The score in a form that people can read: from 0 to 100 percent.

        It is the (geometric) mean of the probabilities that the model gave to the caption's tokens.
        So it says how sure the model is of the wording, not of being right.
        """
        return 100 * math.exp(min(self.score, 0.0))


@dataclass(frozen=True, repr=False)
class Explanation:
    """A caption and its attention maps: the shares of attention that patches receive.

    `words` lists the words and the end mark. `word_maps[i]` is the map of `words[i]`; `class_maps`
    are the maps of the class tokens of before and of after. `word_maps` is (words, 2, grid, grid),
    `class_maps` (2, 2, grid, grid); the second axis is before, after. A map sums to 1 at most, over
    before and after together. If the model has no attention maps, all three are empty.
    """

    caption: Caption
    words: tuple[str, ...]
    class_maps: np.ndarray
    word_maps: np.ndarray

    def __repr__(self) -> str:
        maps = "no maps"
        if len(self.class_maps):
            maps = "maps of {} × {} patches".format(*self.class_maps.shape[2:])
        return f"<{type(self).__name__}: {self.caption!r}, {maps}>"

    @classmethod
    def without_maps(cls, caption: Caption) -> "Explanation":
        """The explanation by a model whose tokens are not a grid of patches."""
        no_maps = np.zeros((0, 2, 0, 0), dtype=np.float32)
        return cls(caption, (), no_maps, no_maps)


def explain_caption(
    ids: Tensor, length: Tensor, score: Tensor, class_attention: Tensor, token_attention: Tensor
) -> Explanation:
    """The explanation of one caption.

    ids (L,), of which the first `length` () are the caption's; score (); the attention that the
    pair's tokens receive from the two class tokens (2, S) and from each token of the caption
    (L, S).
    """
    caption_ids = ids[:length].tolist()
    words = split_words(caption_ids)
    maps = [token_attention[positions].mean(dim=0) for _, positions in words]
    return Explanation(
        Caption(decode(caption_ids), score.item()),
        tuple(word for word, _ in words),
        patch_maps(class_attention),
        patch_maps(torch.stack(maps)),
    )


def rollout(layers: Sequence[RecordedWeights], tokens: Tensor) -> Tensor:
    """Attention rollout (Abnar and Zuidema 2020) through layers, the first one first.

    Returns, for each of the tokens (B, S, E), the shares (B, S, S) of the tokens below the first
    layer that reach it. With no layers, each token keeps all of its own share.
    """
    shares = _identity_shares(tokens)
    for recorded in layers:
        shares = _carry_through_layer(recorded, shares)
    return shares


def _identity_shares(tokens: Tensor) -> Tensor:
    """(B, S, …) → (B, S, S): each token has all of its own share."""
    return torch.eye(tokens.shape[1], device=tokens.device).expand(len(tokens), -1, -1)


def _carry_through_layer(recorded: RecordedWeights, shares: Tensor) -> Tensor:
    """Shares (B, S, S) that reach a layer's input → those that reach its output.

    Half of a token comes from the same token below, half from what it attends to.
    """
    identity = torch.eye(shares.shape[1], device=shares.device)
    return (mean_over_heads(recorded) + identity) / 2 @ shares


def compute_token_attention(
    encoder: Sequence[RecordedWeights],
    decoder_cross: Sequence[RecordedWeights],
    joint_rollout: Tensor,
) -> Tensor:
    """The shares (B, L, S) of the images' tokens in each token of a caption.

    A decoder layer attends (`decoder_cross`) to the output of the encoder layer of the same number.
    From there its attention is carried back through the encoder and then the joint vision layers.
    The result is the mean over the decoder's layers.
    """
    by_layer = []
    encoder_rollout = _identity_shares(joint_rollout)
    for encoder_weights, cross_weights in zip(encoder, decoder_cross, strict=True):
        encoder_rollout = _carry_through_layer(encoder_weights, encoder_rollout)
        by_layer.append(mean_over_heads(cross_weights) @ encoder_rollout @ joint_rollout)
    return torch.stack(by_layer).mean(dim=0)


def mean_over_heads(recorded: RecordedWeights) -> Tensor:
    """The weights (B, H, L, S) of a module that was called once → (B, L, S)."""
    (weights,) = recorded
    return weights.mean(dim=1)


def patch_maps(attention: Tensor) -> np.ndarray:
    """Shares of a pair's tokens (R, 2T) → shares of its patches (R, 2, grid, grid)."""
    patches = attention.unflatten(1, (2, -1))[:, :, 1:]  # without class tokens: (R, 2, T - 1)
    side = round(patches.shape[2] ** 0.5)
    return patches.unflatten(2, (side, side)).float().cpu().numpy()
