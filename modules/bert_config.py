"""The JSON configs of the captioner and the cross encoder: where they are found, what is read of them, what is refused."""

import os
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

from modules.files import read_json
from modules.layers import MAX_LAYERS, MAX_PARAMETERS, MAX_SIZE

MODULES = Path(__file__).parent


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
