"""The captioner: UniVL's encoder-decoder on a pair's tokens (paper, section 3.3).

Dimensions: B pairs, S pair tokens (2T), E hidden size, L tokens of a caption, V vocabulary,
H heads, d = E/H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.losses import vocabulary_loss
from modules.model.bert import (
    BertConfig,
    DenseAddNorm,
    Intermediate,
    LayerList,
    PostNormAttention,
    initialize_bert,
)
from modules.model.layers import MASK_VALUE, LayerNorm

KeysValues = tuple[Tensor, Tensor]


class CaptionEncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward over the pair's tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.slf_attn = PostNormAttention(config)
        self.intermediate = Intermediate(width, config.intermediate_size)
        self.output = DenseAddNorm(config.intermediate_size, width, config.hidden_dropout_prob)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, E) → (B, S, E)."""
        x = self.slf_attn.self_attend(x)
        return self.output(self.intermediate(x), x)


class CaptionDecoderLayer(nn.Module):
    """Post-norm masked self-attention, cross-attention to one encoder layer, feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.slf_attn = PostNormAttention(config)
        self.enc_attn = PostNormAttention(config)
        self.intermediate = Intermediate(width, config.intermediate_size)
        self.output = DenseAddNorm(config.intermediate_size, width, config.hidden_dropout_prob)

    def forward(
        self, x: Tensor, own: KeysValues, memory: KeysValues, mask: Tensor | None
    ) -> Tensor:
        """x (R, L, E) → (R, L, E).

        `own` are keys and values of the caption so far (R, H, K, d), `memory` those of the pair
        (B, H, S, d). R is a multiple of B: the captions of one pair are next to each other and
        share its memory. `mask`, if given, is added to the caption's attention scores.
        """
        x = self.slf_attn(x, own, mask)
        by_pair = x.reshape(len(memory[0]), -1, x.shape[-1])  # (B, R/B · L, E)
        x = self.enc_attn(by_pair, memory).view_as(x)
        return self.output(self.intermediate(x), x)


class TiedWeight(nn.Module):
    """A parameter that belongs to another module, under the released key `<name>.weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class CaptionEmbeddings(nn.Module):
    """Token and position embeddings, both the backbone's own tensors; LayerNorm, dropout."""

    def __init__(
        self, token_embedding: nn.Embedding, positions: nn.Parameter, dropout: float
    ) -> None:
        super().__init__()
        self.word_embeddings = token_embedding
        self.position_embeddings = TiedWeight(positions)
        self.LayerNorm = LayerNorm(token_embedding.embedding_dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """(B, L) ids at positions start..start+L-1 → (B, L, E)."""
        positions = self.position_embeddings.weight[start : start + ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + positions))


class PredictionTransform(nn.Module):
    """Dense, exact GELU and LayerNorm, before the projection to the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) → (…, E)."""
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """Logits over the vocabulary; the projection is the token embedding."""

    def __init__(self, token_embedding: nn.Embedding) -> None:
        super().__init__()
        self.transform = PredictionTransform(token_embedding.embedding_dim)
        self.decoder = TiedWeight(token_embedding.weight)
        self.bias = nn.Parameter(torch.zeros(token_embedding.num_embeddings))

    def forward(self, x: Tensor) -> Tensor:
        """(…, E) → (…, V)."""
        return F.linear(self.transform(x), self.decoder.weight, self.bias)

    def loss(self, x: Tensor, target_ids: Tensor, weights: Tensor) -> Tensor:
        """States (N, E), target ids and weights (N,) → Σ weights · cross-entropy.

        Logits (N, V) never exist all at once.
        """
        states = self.transform(x)
        return vocabulary_loss(states, self.decoder.weight, self.bias, target_ids, weights)


@dataclass
class DecoderState:
    """Keys and values of `per_pair` unfinished captions for each of B pairs, layer by layer.

    `memory` is the encoder's, each (B, H, S, d). `self_cache` is the captions', each
    (B, per_pair, H, max_words, d), filled for the first `length` tokens.
    """

    memory: list[KeysValues]
    self_cache: list[KeysValues]
    length: int = 0

    def select(self, pairs: Tensor) -> "DecoderState":
        """The state of these pairs alone, by their indices."""
        memory = [(k[pairs], v[pairs]) for k, v in self.memory]
        self_cache = [(k[pairs], v[pairs]) for k, v in self.self_cache]
        return DecoderState(memory, self_cache, self.length)

    def reorder(self, beams: Tensor) -> "DecoderState":
        """beams (B, per_pair): which caption of the same pair each of the new ones continues."""
        rows = torch.arange(len(beams), device=beams.device)[:, None]
        self_cache = [(k[rows, beams], v[rows, beams]) for k, v in self.self_cache]
        return DecoderState(self.memory, self_cache, self.length)


class CaptionDecoder(nn.Module):
    """The whole captioner, under the released keys `decoder.*`.

    `token_embedding` and `positions` are the backbone's. Raises ValueError if their width is not
    the hidden size.
    """

    def __init__(
        self, config: BertConfig, token_embedding: nn.Embedding, positions: nn.Parameter
    ) -> None:
        super().__init__()
        if token_embedding.embedding_dim != config.hidden_size:
            raise ValueError(
                f"the captioner's hidden size {config.hidden_size} must equal the width "
                f"{token_embedding.embedding_dim} of the backbone's token embeddings"
            )
        self.config = config
        self.encoder = LayerList([CaptionEncoderLayer(config) for _ in range(config.num_layers)])
        self.decoder = LayerList([CaptionDecoderLayer(config) for _ in range(config.num_layers)])
        predictions = nn.ModuleDict({"predictions": Predictions(token_embedding)})
        self.classifier = nn.ModuleDict({"cls": predictions})
        # The tied embeddings are left as they are: they belong to the backbone.
        for part in (self.encoder, self.decoder, self.predictions.transform):
            initialize_bert(part, config.initializer_range)
        dropout = config.hidden_dropout_prob
        self.embeddings = CaptionEmbeddings(token_embedding, positions, dropout)

    def tie(self, token_embedding: nn.Embedding, positions: nn.Parameter) -> None:
        """Share the backbone's embeddings again, after loading has replaced all parameters."""
        self.embeddings.word_embeddings = token_embedding
        self.embeddings.position_embeddings.weight = positions
        self.predictions.decoder.weight = token_embedding.weight

    @property
    def predictions(self) -> Predictions:
        """From states to the vocabulary."""
        return self.classifier["cls"]["predictions"]

    def encode_memory(self, pair_tokens: Tensor) -> list[KeysValues]:
        """(B, S, E) → keys and values (B, H, S, d) of each encoder layer for its decoder layer."""
        memory = []
        x = pair_tokens
        for encoder_layer, decoder_layer in zip(
            self.encoder.layer, self.decoder.layer, strict=True
        ):
            x = encoder_layer(x)
            memory.append(decoder_layer.enc_attn.projections.keys_values(x))
        return memory

    def forward(self, pair_tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S, E), ids and mask (B, L), 1 = token → states (B, L, E).

        The states are those before the projection to the vocabulary. Raises ValueError if there
        are more tokens than positions.
        """
        length = ids.shape[1]
        self._check_length(length)
        future = torch.ones(length, length, device=ids.device).triu(1)
        padding = 1 - mask[:, None, None, :].float()
        attention_mask = torch.maximum(future, padding) * MASK_VALUE  # (B, 1, L, L)
        x = self.embeddings(ids)
        for layer, memory in zip(self.decoder.layer, self.encode_memory(pair_tokens), strict=True):
            own = layer.slf_attn.projections.keys_values(x)
            x = layer(x, own, memory, attention_mask)
        return x

    def start(self, pair_tokens: Tensor, max_words: int, per_pair: int = 1) -> DecoderState:
        """Encode the pairs (B, S, E) once; make room for `per_pair` captions of max_words each."""
        self._check_length(max_words)
        memory = [(k.contiguous(), v.contiguous()) for k, v in self.encode_memory(pair_tokens)]
        size = (len(pair_tokens), per_pair, self.config.num_attention_heads, max_words)
        self_cache = [
            (k.new_empty(*size, k.shape[-1]), v.new_empty(*size, v.shape[-1])) for k, v in memory
        ]
        return DecoderState(memory, self_cache)

    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The last token ids (B, per_pair) → float32 logits (B, per_pair, V) of the next.

        The state grows by one token, in place.
        """
        start = state.length
        end = start + 1
        x = self.embeddings(ids.flatten()[:, None], start)  # (B · per_pair, 1, E)
        for layer, memory, cache in zip(
            self.decoder.layer, state.memory, state.self_cache, strict=True
        ):
            keys, values = (part.flatten(0, 1) for part in cache)  # views: (B · per_pair, H, …)
            new_keys, new_values = layer.slf_attn.projections.keys_values(x)
            keys[:, :, start:end] = new_keys
            values[:, :, start:end] = new_values
            own = (keys[:, :, :end], values[:, :, :end])
            x = layer(x, own, memory, mask=None)
        state.length = end
        return self.predictions(x[:, 0]).float().unflatten(0, ids.shape)

    def _check_length(self, length: int) -> None:
        positions = len(self.embeddings.position_embeddings.weight)
        if length > positions:
            raise ValueError(f"{length} tokens exceed the {positions} positions of the text tower")
