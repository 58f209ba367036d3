"""BERT-style layers, and the configs of the captioner and the cross encoder.

Dimensions: B rows, S tokens, D width, H heads, d = D/H, K attended tokens.
"""

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from modules.model.layers import Attention, LayerNorm, attend, split_heads
from modules.model.limits import HEAD_WIDTH, MAX_LAYERS, MAX_PARAMETERS, MAX_SIZE, check_size
from system.json_files import read_json

MODULES = Path(__file__).parents[1]


@dataclass(frozen=True)
class BertConfig:
    """The values of a BERT-style config file that are read here; its other keys are ignored.

    Raises ValueError for values out of range.
    """

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
                _check_fraction(name, value)
            else:
                most = MAX_LAYERS if name == "num_layers" else MAX_SIZE
                check_size(f"config value {name}", value, most)
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"config hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        rows_per_layer = 12 * self.hidden_size + 4 * self.intermediate_size
        if self.num_layers * rows_per_layer * self.hidden_size > MAX_PARAMETERS:
            raise ValueError(
                f"config hidden_size {self.hidden_size}, intermediate_size "
                f"{self.intermediate_size} and {self.num_layers} layers ask for more than "
                f"{MAX_PARAMETERS / 1e9:.1f} billion parameters"
            )

    @classmethod
    def load(
        cls, source: "str | Path | Mapping | BertConfig", file_name: str, layers_key: str
    ) -> "BertConfig":
        """From a mapping, a name below modules/, a folder that holds `file_name`, or a file.

        `layers_key` is the key of the number of layers. Raises ValueError or OSError.
        """
        if isinstance(source, cls):
            return source
        if isinstance(source, Mapping):
            values = source
            origin = "the config"
        else:
            values, origin = read_config(source, file_name)
        if values.get("hidden_act", "gelu") != "gelu":
            activation = reprlib.repr(values["hidden_act"])
            raise ValueError(f"{origin}: hidden_act is {activation}, only 'gelu' is built")
        needed = ("hidden_size", "num_attention_heads", "intermediate_size", layers_key)
        absent = [name for name in needed if name not in values]
        if absent:
            raise ValueError(f"{origin} lacks {absent[0]}; it needs {', '.join(needed)}")
        names = {field.name for field in fields(cls)} - {"num_layers"}
        known = {name: values[name] for name in names if name in values}
        try:
            return cls(num_layers=values[layers_key], **known)
        except ValueError as error:
            raise ValueError(f"{origin}: {error}") from None

    def with_layers(self, num_layers: int | None) -> "BertConfig":
        """This config, with another number of layers if one is given."""
        return self if num_layers is None else replace(self, num_layers=num_layers)

    def fitted_to(self, embed_dim: int) -> "BertConfig":
        """This config if its hidden size is `embed_dim`; otherwise a copy with that hidden size.

        The copy has embed_dim / 64 heads and a feed-forward width of 4 · embed_dim.
        """
        if self.hidden_size == embed_dim:
            return self
        return replace(
            self,
            hidden_size=embed_dim,
            num_attention_heads=max(1, embed_dim // HEAD_WIDTH),
            intermediate_size=4 * embed_dim,
        )


def read_config(source: str | Path, file_name: str) -> tuple[dict, str]:
    """The JSON object of a config's name, folder or file, and the path it was read from.

    Raises ValueError or OSError.
    """
    tried = [MODULES / source / file_name, Path(source) / file_name, Path(source)]
    path = next((candidate for candidate in tried if os.path.isfile(candidate)), None)
    if path is None:
        raise FileNotFoundError(f"no config {str(source)!r}: tried {', '.join(map(str, tried))}")
    return read_json(path, dict), str(path)


def load_decoder_config(source: str | Path | Mapping | BertConfig) -> BertConfig:
    """The captioner's config; its encoder has num_decoder_layers layers too."""
    return BertConfig.load(source, "decoder_config.json", "num_decoder_layers")


def load_cross_config(source: str | Path | Mapping | BertConfig) -> BertConfig:
    """The cross encoder's config, which needs two token types: text and pair."""
    config = BertConfig.load(source, "cross_config.json", "num_hidden_layers")
    if config.type_vocab_size < 2:
        raise ValueError(
            f"the cross encoder's config has type_vocab_size {config.type_vocab_size}, "
            "expected at least 2: one for text, one for pairs"
        )
    return config


def _check_fraction(name: str, value: Any) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 <= value < 1):
        raise ValueError(
            f"config value {name} is {reprlib.repr(value)}, expected a number in [0, 1)"
        )


class QueryKeyValue(nn.Module):
    """BERT's three projections, each with a matrix of its own."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def queries(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, H, S, d)."""
        return split_heads(self.query(x), self.num_heads)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, D) → keys and values, each (B, H, K, d)."""
        keys = split_heads(self.key(x), self.num_heads)
        values = split_heads(self.value(x), self.num_heads)
        return keys, values


class DenseAddNorm(nn.Module):
    """Dense, dropout, residual, LayerNorm: the end of every BERT sublayer."""

    def __init__(self, width_in: int, width: int, dropout: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width_in, width)
        self.LayerNorm = LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        """x (B, S, width_in) and residual (B, S, D) → (B, S, D)."""
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)


class PostNormAttention(Attention):
    """BERT's attention sublayer.

    Released files call its projections `self` in the cross encoder, `att` in the captioner.
    """

    def __init__(self, config: BertConfig, projections: str = "att") -> None:
        super().__init__()
        width = config.hidden_size
        self.add_module(projections, QueryKeyValue(width, config.num_attention_heads))
        self.output = DenseAddNorm(width, width, config.hidden_dropout_prob)
        self.attention_dropout = config.attention_probs_dropout_prob
        self._projections = projections

    @property
    def projections(self) -> QueryKeyValue:
        """The projections to q, k and v, under whichever name."""
        return self._modules[self._projections]

    def forward(
        self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None = None
    ) -> Tensor:
        """x (B, S, D), keys and values (B, H, K, d) → (B, S, D). A mask is added to the scores."""
        keys, values = keys_values
        mixed = attend(
            self.projections.queries(x),
            keys,
            values,
            mask=mask,
            dropout=self.attention_dropout if self.training else 0.0,
            recorded=self.recorded,
        )
        return self.output(mixed, x)

    def self_attend(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, S, D) attends to itself → (B, S, D)."""
        return self(x, self.projections.keys_values(x), mask)


class LayerList(nn.Module):
    """A list of layers under the released key `layer`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


class Intermediate(nn.Module):
    """The first half of BERT's feed-forward: dense, exact GELU."""

    def __init__(self, width: int, intermediate: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, intermediate)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, D) → (B, S, intermediate)."""
        return F.gelu(self.dense(x))


def initialize_bert(module: nn.Module, std: float) -> None:
    """BERT's initialization: N(0, std) for linear and embedding layers, biases 0."""
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Embedding):
            nn.init.normal_(part.weight, std=std)
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)
