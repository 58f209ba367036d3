"""The cross encoder: BERT over [text tokens; pair tokens] (UniVL/CLIP4Clip, SPEC §4), used by `--sim_header tight`.

Letters: B text-pair combinations, L words, S pair tokens, E hidden size.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.model.bert import (
    AddNorm,
    BertConfig,
    Intermediate,
    PostNormAttention,
    initialize_bert,
    load_cross_config,
)
from modules.model.clip import Features
from modules.model.layers import MASK_VALUE, LayerNorm


class CrossEmbeddings(nn.Module):
    """Adds learned positions and token types (0 text, 1 pair), then LayerNorm and dropout."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = LayerNorm(config.hidden_size, eps=1e-12)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, text_tokens: Tensor, pair_tokens: Tensor) -> Tensor:
        text_type, pair_type = self.token_type_embeddings.weight[:2]
        x = torch.cat([text_tokens + text_type, pair_tokens + pair_type], dim=1)  # (B, L+S, E)
        if x.shape[1] > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"{text_tokens.shape[1]} words and {pair_tokens.shape[1]} pair tokens exceed the cross encoder's "
                f"{self.position_embeddings.num_embeddings} positions: lower --max_words or give a --cross_model "
                "with more max_position_embeddings"
            )
        return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[: x.shape[1]]))


class CrossLayer(nn.Module):
    """One BERT layer under BERT's own key names."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, heads, dropout = (
            config.hidden_size,
            config.num_attention_heads,
            config.hidden_dropout_prob,
        )
        self.attention = PostNormAttention(
            width, heads, config.attention_probs_dropout_prob, dropout, projections="self"
        )
        self.intermediate = Intermediate(width, config.intermediate_size)
        self.output = AddNorm(config.intermediate_size, width, dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.attention.self_attend(x, mask)
        return self.output(self.intermediate(x), x)


class CrossLayers(nn.Module):
    """The list of layers under BERT's key `layer`."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(CrossLayer(config) for _ in range(config.num_layers))


class CrossPooler(nn.Module):
    """tanh(dense) of token 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class CrossEncoder(nn.Module):
    """BERT encoder over a text's and a pair's tokens together."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CrossEmbeddings(config)
        self.encoder = CrossLayers(config)
        self.pooler = CrossPooler(config.hidden_size)
        initialize_bert(self, config.initializer_range)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], config: str | Path | Mapping
    ) -> "CrossEncoder":
        """Build from released key names, with or without the prefix `cross.`; any key that does not fit raises ValueError."""
        encoder = cls(load_cross_config(config))
        try:
            encoder.load_state_dict(
                {key.removeprefix("cross."): value.float() for key, value in weights.items()}
            )
        except RuntimeError as error:
            raise ValueError(f"cross encoder: {' '.join(str(error).split())}") from None
        return encoder

    def forward(self, text_tokens: Tensor, pair_tokens: Tensor, text_mask: Tensor) -> Features:
        """(B, L, E), (B, S, E) and mask (B, L), 1 = word → tokens (B, L+S, E), pooled (B, E)."""
        seen = torch.cat([text_mask, text_mask.new_ones(pair_tokens.shape[:2])], dim=1).float()
        mask = (1 - seen)[:, None, None, :] * MASK_VALUE  # (B, 1, 1, L+S)
        x = self.embeddings(text_tokens, pair_tokens)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return Features(x, self.pooler(x))
