"""The attention of all modules, LayerNorm in float32, and CLIP's pre-norm blocks.

Dimensions: B rows, S tokens, D width, H heads, d = D/H, K attended tokens.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# On CPUs, two plain matrix products train faster than SDPA up to here (benchmarks/attention.py).
MAX_PRODUCT_KEYS = 200
QUICK_GELU_SCALE = 1.702
# BERT's mask, which is added to scores. It is finite, so that a row in which everything is masked
# still has finite weights.
MASK_VALUE = -10000.0


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, D) → (B, H, S, d)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    recorded: list[Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention over split heads.

    q (B, H, S, d); k and v (B, H, K, d); `mask` is added to the scores and broadcasts to
    (B, H, S, K). `causal` masks the keys after each query. Returns (B, S, D), heads joined. The
    attention weights (B, H, S, K), float32, are appended to `recorded` if it is given. Raises
    ValueError for a mask together with `causal`.
    """
    if causal and mask is not None:
        raise ValueError("attention is either causal or has a mask, not both")
    if mask is not None:
        mask = mask.to(q.dtype)
    is_small = q.device.type == "cpu" and k.shape[2] <= MAX_PRODUCT_KEYS
    if recorded is not None or is_small:
        mixed = _attend_by_products(q, k, v, mask, causal, dropout, recorded)
    else:
        mixed = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal
        )
    return mixed.transpose(1, 2).flatten(2)  # (B, S, D)


def _attend_by_products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    dropout: float,
    recorded: list[Tensor] | None,
) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, S, K)
    if causal:
        mask = scores.new_full(scores.shape[2:], -torch.inf).triu(1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    if recorded is not None:
        recorded.append(weights)
    weights = weights.to(v.dtype)
    if dropout:
        weights = F.dropout(weights, dropout)
    return weights @ v


_RECORDING = threading.Lock()  # held while recordings begin or end


class Attention(nn.Module):
    """The base of all attention modules: what they attend to can be recorded."""

    # By thread: others may compute with the same module at the same time.
    _recordings: dict[int, list[Tensor]] | None = None

    @property
    def recorded(self) -> list[Tensor] | None:
        """Where this thread records its attention weights; None: nowhere."""
        return None if self._recordings is None else self._recordings.get(threading.get_ident())


@contextmanager
def record_attention(modules: Sequence[Attention]) -> Iterator[list[list[Tensor]]]:
    """Record the attention weights (B, H, S, K), float32, of this thread's calls in the block.

    Yields a list for each module, with one tensor per call.
    """
    thread = threading.get_ident()
    lists: list[list[Tensor]] = [[] for _ in modules]
    with _RECORDING:
        for module, recorded in zip(modules, lists, strict=True):
            module._recordings = {**(module._recordings or {}), thread: recorded}
    try:
        yield lists
    finally:
        with _RECORDING:
            for module in modules:
                others = {key: value for key, value in module._recordings.items() if key != thread}
                module._recordings = others or None


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32; the result has the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps)
        return normed.to(x.dtype)


class FusedAttention(Attention):
    """CLIP's self-attention: q, k and v in one matrix, named as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, S, 3D)
        q, k, v = (split_heads(part, self.num_heads) for part in qkv.chunk(3, dim=-1))
        return self.out_proj(attend(q, k, v, causal=causal, recorded=self.recorded))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI's GELU, x·σ(1.702x), of any shape."""
    # Written with silu, training keeps one tensor of this size fewer for the gradients.
    return F.silu(QUICK_GELU_SCALE * x) / QUICK_GELU_SCALE


class FeedForward(nn.Module):
    """CLIP's two-layer perceptron (fourfold width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        return self.c_proj(quick_gelu(self.c_fc(x)))


class ResidualAttentionBlock(nn.Module):
    """CLIP's pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = FusedAttention(width, num_heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = FeedForward(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        """(B, S, D) → (B, S, D)."""
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of CLIP blocks."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        blocks = (ResidualAttentionBlock(width, num_heads) for _ in range(num_layers))
        self.resblocks = nn.ModuleList(blocks)

    def forward(
        self, x: Tensor, causal: bool = False, start: int = 0, stop: int | None = None
    ) -> Tensor:
        """(B, S, D) → (B, S, D) by the blocks from `start` up to but not including `stop`."""
        for block in self.resblocks[start:stop]:
            x = block(x, causal)
        return x
