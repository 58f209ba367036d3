"""The JSON configs of the captioner and the cross encoder: where they are found, what is read of them, what is refused."""

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from modules.model.layers import Attention, LayerNorm, attend, split_heads
from system.json_files import read_json

MODULES = Path(__file__).parents[1]


@dataclass(frozen=True)
class BertConfig:
    """What a BERT-style config file says and the code reads; other keys of such files are passed over."""

    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    num_layers: int
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02
    max_position_embeddings: int = 150
    type_vocab_size: int = 2

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name.endswith("prob") or name == "initializer_range":
                ok = (
                    isinstance(value, int | float)
                    and not isinstance(value, bool)
                    and 0 <= value < 1
                )
                expected = "a number in [0, 1)"
            else:
                most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
                ok, expected = (
                    type(value) is int and 1 <= value <= most,
                    f"a whole number of at least 1 and at most {most}",
                )
            if not ok:
                raise ValueError(
                    f"config value {name} is {reprlib.repr(value)}, expected {expected}"
                )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if (
            self.num_layers
            * (12 * self.hidden_size + 4 * self.intermediate_size)
            * self.hidden_size
            > MAX_PARAMETERS
        ):
            raise ValueError(
                f"config hidden_size {self.hidden_size}, intermediate_size {self.intermediate_size} and "
                f"{self.num_layers} layers ask for more than {MAX_PARAMETERS / 1e9:.1f} billion parameters"
            )

    @classmethod
    def load(
        cls, source: "str | Path | Mapping | BertConfig", file_name: str, layers_key: str
    ) -> "BertConfig":
        """From a mapping, a name below modules/, a folder holding `file_name`, or a file. `layers_key` counts the layers."""
        if isinstance(source, cls):
            return source
        values, origin = (
            (source, "the config")
            if isinstance(source, Mapping)
            else read_config(source, file_name)
        )
        if values.get("hidden_act", "gelu") != "gelu":
            raise ValueError(
                f"{origin}: hidden_act is {reprlib.repr(values['hidden_act'])}, only 'gelu' is built"
            )
        known = {
            f.name: values[f.name]
            for f in fields(cls)
            if f.name in values and f.name != "num_layers"
        }
        needed = ("hidden_size", "num_attention_heads", "intermediate_size", layers_key)
        absent = [name for name in needed if name not in values]
        if absent:
            raise ValueError(f"{origin} lacks {absent[0]}; it needs {', '.join(needed)}")
        try:
            return cls(num_layers=values[layers_key], **known)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None

    def with_layers(self, num_layers: int | None) -> "BertConfig":
        """This config, with another number of layers where one is given."""
        return self if num_layers is None else replace(self, num_layers=num_layers)

    def fitted_to(self, embed_dim: int) -> "BertConfig":
        """This config, or one of E/64 heads and intermediate 4E where its hidden size is not E."""
        if self.hidden_size == embed_dim:
            return self
        heads = max(1, embed_dim // 64)
        return replace(
            self, hidden_size=embed_dim, num_attention_heads=heads, intermediate_size=4 * embed_dim
        )


def read_config(source: str | Path, file_name: str) -> tuple[dict, str]:
    """The JSON object behind a config's name, folder or file, and where it was found. Raises ValueError or OSError."""
    tried = [MODULES / source / file_name, Path(source) / file_name, Path(source)]
    path = next((place for place in tried if os.path.isfile(place)), None)
    if path is None:
        raise FileNotFoundError(f"no config {str(source)!r}: tried {', '.join(map(str, tried))}")
    return read_json(path, dict), str(path)


def load_decoder_config(source: str | Path | Mapping | BertConfig) -> BertConfig:
    """The captioner's config; `num_decoder_layers` counts its encoder *and* its decoder layers (SPEC §2)."""
    return BertConfig.load(source, "decoder_config.json", "num_decoder_layers")


def load_cross_config(source: str | Path | Mapping | BertConfig) -> BertConfig:
    """The cross encoder's config."""
    return BertConfig.load(source, "cross_config.json", "num_hidden_layers")


MAX_SIZE, MAX_LAYERS, MAX_PARAMETERS = (
    2**20,
    2**10,
    2**32,
)  # what a config may ask for: beyond, it is a mistake or an attack


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
            self.projections.queries(x),
            *keys_values,
            mask=mask,
            dropout=dropout,
            kept=self.recorded,
        )
        return self.output(mixed, x)

    def self_attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
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
