"""Building blocks: attention (in one place), float32 LayerNorm, CLIP's pre-norm and BERT's post-norm layers.

Shapes: B rows, S or L tokens, D width, H heads, K keys.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SIZE, MAX_LAYERS, MAX_PARAMETERS = (
    2**20,
    2**10,
    2**32,
)  # what a config may ask for: beyond, it is a mistake or an attack
FEW_KEYS = (
    200  # up to here two plain products train faster than SDPA on CPUs (benchmarks/attention.py)
)
QUICK = 1.702  # quick GELU's constant
MASKED = (
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
    if kept is not None or (q.device.type == "cpu" and k.shape[2] <= FEW_KEYS):
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

    kept: list[Tensor] | None = None


@contextmanager
def kept_weights(modules: Sequence[Attention]) -> Iterator[list[list[Tensor]]]:
    """Inside, each of the modules keeps the weights (B, H, S, K), float32, of its calls; yields one list of them a module."""
    for module in modules:
        module.kept = []
    try:
        yield [module.kept for module in modules]
    finally:
        for module in modules:
            module.kept = None


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
        return self.out_proj(attend(*heads, causal=causal, kept=self.kept))


class FeedForward(nn.Module):
    """CLIP's two-layer perceptron (fourfold width) with OpenAI's quick GELU, x·σ(1.702x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # x·σ(1.702x) is silu(1.702x)/1.702. Both factors go into the matrix products, where they cost nothing.
        fc, proj = self.c_fc, self.c_proj
        hidden = torch.addmm(fc.bias, x.flatten(0, -2), fc.weight.t(), beta=QUICK, alpha=QUICK)
        out = torch.addmm(proj.bias, F.silu(hidden), proj.weight.t(), alpha=1 / QUICK)
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


class QueryKeyValue(nn.Module):
    """BERT's three projections, each parameterised apart."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def queries(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, H, S, d)."""
        return split_heads(self.query(x), self.num_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, D) → keys and values, each (B, H, K, d)."""
        return split_heads(self.key(x), self.num_heads), split_heads(self.value(x), self.num_heads)


class AddNorm(nn.Module):
    """dense → dropout → residual → LayerNorm, the end of every BERT sublayer."""

    def __init__(self, width_in: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class PostNormAttention(Attention):
    """BERT's attention sublayer. Released files call its projections `self` in the cross encoder, `att` in the captioner."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        attention_dropout: float,
        dropout: float,
        projections: str = "att",
    ) -> None:
        super().__init__()
        self.add_module(projections, QueryKeyValue(width, num_heads))
        self.output = AddNorm(width, width, dropout)
        self.attention_dropout = attention_dropout
        self._projections = projections

    @property
    def projections(self) -> QueryKeyValue:
        return self._modules[self._projections]

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """x (B, S, D) attends to keys and values (B, H, K, d) under an additive mask → (B, S, D)."""
        dropout = self.attention_dropout if self.training else 0.0
        mixed = attend(
            self.projections.queries(x), *keys_values, mask=mask, dropout=dropout, kept=self.kept
        )
        return self.output(mixed, x)

    def over(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Self-attention: x is also what is attended to."""
        return self(x, self.projections.keys_values(x), mask)


class Intermediate(nn.Module):
    """BERT's first feed-forward half: dense → erf GELU."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


def initialize_bert(module: nn.Module, std: float) -> None:
    """BERT's initialisation of everything below `module`: N(0, std) weights of linear and embedding layers, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
