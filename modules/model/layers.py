"""Building blocks: attention (in one place), float32 LayerNorm, CLIP's pre-norm and BERT's post-norm layers.

Shapes: B rows, S or L tokens, D width, H heads, K keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SDPA_MIN_KEYS = (
    200  # up to here two plain products train faster than SDPA on CPUs (benchmarks/attention.py)
)


QUICK_GELU_SCALE = 1.702  # quick GELU's constant


MASK_VALUE = (
    -10000.0
)  # additive mask of BERT's family; finite, so that a row with nothing to attend to stays a number


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, S, D) → (B, H, S, D/H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout: float = 0.0,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention over split heads.

    q (B, H, S, d); k and v (B, H, K, d); mask is additive and broadcasts to (B, H, S, K). Returns (B, S, H·d), heads joined.
    The weights (B, H, S, K) are put into `kept`, where it is given.
    """
    mask = None if mask is None else mask.to(q.dtype)
    if kept is not None or (q.device.type == "cpu" and k.shape[2] <= SDPA_MIN_KEYS):
        mixed = _attend_by_products(q, k, v, mask, causal, dropout, kept)
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
    kept: list[Tensor] | None,
) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)  # (B, H, S, K)
    if causal:
        mask = scores.new_full(scores.shape[2:], -torch.inf).triu(1)
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(dim=-1, dtype=torch.float32)
    if kept is not None:
        kept.append(weights)
    weights = weights.to(v.dtype)
    return F.dropout(weights, dropout) @ v if dropout else weights @ v


class Attention(nn.Module):
    """What all attention modules share: they can be asked to keep their weights."""

    recorded: list[Tensor] | None = None


@contextmanager
def record_attention(modules: Sequence[Attention]) -> Iterator[list[list[Tensor]]]:
    """Inside, each of the modules keeps the weights (B, H, S, K), float32, of its calls; yields one list of them a module."""
    for module in modules:
        module.recorded = []
    try:
        yield [module.recorded for module in modules]
    finally:
        for module in modules:
            module.recorded = None


class LayerNorm(nn.LayerNorm):
    """LayerNorm computed in float32 whatever the input; the result comes back in the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.normalized_shape, self.weight, self.bias, self.eps).to(
            x.dtype
        )


class FusedAttention(Attention):
    """CLIP's self-attention: q, k and v in one matrix, parameter names as in `nn.MultiheadAttention`."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(
            3, dim=-1
        )  # each (B, S, D)
        heads = (split_heads(part, self.num_heads) for part in (q, k, v))
        return self.out_proj(attend(*heads, causal=causal, kept=self.recorded))


class FeedForward(nn.Module):
    """CLIP's two-layer perceptron (fourfold width) with OpenAI's quick GELU, x·σ(1.702x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # x·σ(1.702x) is silu(1.702x)/1.702. Both factors go into the matrix products, where they cost nothing.
        fc, proj = self.c_fc, self.c_proj
        hidden = torch.addmm(
            fc.bias, x.flatten(0, -2), fc.weight.t(), beta=QUICK_GELU_SCALE, alpha=QUICK_GELU_SCALE
        )
        out = torch.addmm(proj.bias, F.silu(hidden), proj.weight.t(), alpha=1 / QUICK_GELU_SCALE)
        return out.unflatten(0, x.shape[:-1])


class ResidualAttentionBlock(nn.Module):
    """CLIP's pre-norm transformer block."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.attn = FusedAttention(width, num_heads)
        self.ln_1 = LayerNorm(width)
        self.mlp = FeedForward(width)
        self.ln_2 = LayerNorm(width)

    def forward(self, x: Tensor, causal: bool = False) -> Tensor:
        x = x + self.attn(self.ln_1(x), causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of CLIP blocks; `start` and `stop` run a part of it."""

    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, num_heads) for _ in range(num_layers)
        )

    def forward(
        self, x: Tensor, causal: bool = False, start: int = 0, stop: int | None = None
    ) -> Tensor:
        for block in self.resblocks[start:stop]:
            x = block(x, causal)
        return x
