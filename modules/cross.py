"""The cross encoder of --sim_header tight: BERT over a text's and a pair's tokens together.

After UniVL and CLIP4Clip. Dimensions: B combinations of a text and a pair, L text tokens,
S pair tokens, E hidden size.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from modules.model.backbone import Features
from modules.model.bert import (
    BertConfig,
    DenseAddNorm,
    Intermediate,
    LayerList,
    PostNormAttention,
    initialize_bert,
    load_cross_config,
)
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
        """(B, L, E) and (B, S, E) → (B, L+S, E). ValueError if there are too few positions."""
        text_type, pair_type = self.token_type_embeddings.weight[:2]
        x = torch.cat([text_tokens + text_type, pair_tokens + pair_type], dim=1)
        length = x.shape[1]
        if length > self.position_embeddings.num_embeddings:
            raise ValueError(
                f"{text_tokens.shape[1]} text tokens and {pair_tokens.shape[1]} pair tokens exceed "
                f"the cross encoder's {self.position_embeddings.num_embeddings} positions: lower "
                "--max_words or give a --cross_model with more max_position_embeddings"
            )
        return self.dropout(self.LayerNorm(x + self.position_embeddings.weight[:length]))


class CrossLayer(nn.Module):
    """One BERT layer under BERT's own key names."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.attention = PostNormAttention(config, projections="self")
        self.intermediate = Intermediate(width, config.intermediate_size)
        self.output = DenseAddNorm(config.intermediate_size, width, config.hidden_dropout_prob)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(B, L+S, E) → (B, L+S, E)."""
        x = self.attention.self_attend(x, mask)
        return self.output(self.intermediate(x), x)


class CrossPooler(nn.Module):
    """Dense and tanh of token 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L+S, E) → (B, E)."""
        return torch.tanh(self.dense(x[:, 0]))


class CrossEncoder(nn.Module):
    """BERT over a text's and a pair's tokens together."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = CrossEmbeddings(config)
        self.encoder = LayerList([CrossLayer(config) for _ in range(config.num_layers)])
        self.pooler = CrossPooler(config.hidden_size)
        initialize_bert(self, config.initializer_range)

    @classmethod
    def from_weights(
        cls, weights: Mapping[str, Tensor], config: str | Path | Mapping
    ) -> "CrossEncoder":
        """A cross encoder alone, for other programs: `CLIP4IDC.from_weights` builds its own.

        Key names are the released ones, with or without the prefix `cross.`. Raises ValueError for
        any key that does not fit.
        """
        encoder = cls(load_cross_config(config))
        state = {key.removeprefix("cross."): value.float() for key, value in weights.items()}
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"cross encoder: {' '.join(str(error).split())}") from None
        return encoder

    def forward(self, text_tokens: Tensor, pair_tokens: Tensor, text_mask: Tensor) -> Features:
        """(B, L, E), (B, S, E) and mask (B, L), 1 = token → tokens (B, L+S, E), pooled (B, E)."""
        pair_mask = text_mask.new_ones(pair_tokens.shape[:2])
        visible = torch.cat([text_mask, pair_mask], dim=1).float()
        mask = (1 - visible)[:, None, None, :] * MASK_VALUE  # (B, 1, 1, L+S)
        x = self.embeddings(text_tokens, pair_tokens)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return Features(x, self.pooler(x))
