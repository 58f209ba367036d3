"""The captioner: UniVL's encoder-decoder on a pair's tokens, with a key/value cache (paper §3.3, SPEC §4).

Letters: B pairs, S pair tokens (2T), E hidden size, L words, V vocabulary, H heads, d = E/H.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.losses import vocabulary_loss
from modules.model.bert import AddNorm, BertConfig, Intermediate, PostNormAttention, initialize_bert
from modules.model.layers import MASK_VALUE, LayerNorm


class CaptionEncoderLayer(nn.Module):
    """Post-norm self-attention and feed-forward over the pair's tokens."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, dropout = config.hidden_size, config.hidden_dropout_prob
        self.slf_attn = PostNormAttention(
            width, config.num_attention_heads, config.attention_probs_dropout_prob, dropout
        )
        self.intermediate = Intermediate(width, config.intermediate_size)
        self.output = AddNorm(config.intermediate_size, width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = self.slf_attn.self_attend(x)
        return self.output(self.intermediate(x), x)


class CaptionDecoderLayer(nn.Module):
    """Post-norm masked self-attention, cross-attention to one encoder layer, feed-forward."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        width, dropout = config.hidden_size, config.hidden_dropout_prob
        attention = (
            width,
            config.num_attention_heads,
            config.attention_probs_dropout_prob,
            dropout,
        )
        self.slf_attn = PostNormAttention(*attention)
        self.enc_attn = PostNormAttention(*attention)
        self.intermediate = Intermediate(width, config.intermediate_size)
        self.output = AddNorm(config.intermediate_size, width, dropout)

    def forward(
        self,
        x: Tensor,
        words: tuple[Tensor, Tensor],
        memory: tuple[Tensor, Tensor],
        mask: Tensor | None,
    ) -> Tensor:
        """x (R, L, E), keys and values (R, H, K, d) of the words so far, (B, H, S, d) of the encoder's layer.

        R is a multiple of B: the captions of one pair stand in a row, and read its memory together.
        """
        x = self.slf_attn(x, words, mask)
        x = self.enc_attn(x.reshape(len(memory[0]), -1, x.shape[-1]), memory).view_as(x)
        return self.output(self.intermediate(x), x)


class CaptionEmbeddings(nn.Module):
    """Word and position embeddings (both CLIP's own tensors), LayerNorm, dropout."""

    def __init__(self, words: nn.Embedding, positions: nn.Parameter, dropout: float) -> None:
        super().__init__()
        self.word_embeddings = words
        self.position_embeddings = TiedWeight(positions)
        self.LayerNorm = LayerNorm(words.embedding_dim, eps=1e-12)
        self.dropout = nn.Dropout(dropout)

    def forward(self, ids: Tensor, start: int = 0) -> Tensor:
        """(B, L) ids standing at positions start..start+L-1 → (B, L, E)."""
        positions = self.position_embeddings.weight[start : start + ids.shape[1]]
        return self.dropout(self.LayerNorm(self.word_embeddings(ids) + positions))


class TiedWeight(nn.Module):
    """A parameter that belongs to another module, under the released key `<name>.weight`."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight


class PredictionTransform(nn.Module):
    """dense → erf GELU → LayerNorm before the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.LayerNorm = LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return self.LayerNorm(F.gelu(self.dense(x)))


class Predictions(nn.Module):
    """Logits over the vocabulary, the projection tied to CLIP's token embedding."""

    def __init__(self, words: nn.Embedding) -> None:
        super().__init__()
        self.transform = PredictionTransform(words.embedding_dim)
        self.decoder = TiedWeight(words.weight)
        self.bias = nn.Parameter(torch.zeros(words.num_embeddings))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.transform(x), self.decoder.weight, self.bias)

    def loss(self, x: Tensor, target_ids: Tensor, weights: Tensor) -> Tensor:
        """Hidden states (N, E), right ids and weights (N,) → Σ weights · cross-entropy, without holding (N, V) logits."""
        return vocabulary_loss(
            self.transform(x), self.decoder.weight, self.bias, target_ids, weights
        )


class Layers(nn.Module):
    """A list of layers under the released key `layer`."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)


@dataclass
class DecoderState:
    """What has been computed of the captions in the making of B pairs, `per_pair` of each: keys and values of every layer."""

    memory: list[tuple[Tensor, Tensor]]  # the encoder's, per layer, each (B, H, S, d)
    words: list[
        tuple[Tensor, Tensor]
    ]  # per layer, each (B, per_pair, H, max_words, d), the first `length` words filled
    length: int = 0

    def select(self, pairs: Tensor) -> "DecoderState":
        """The state of the given pairs alone: finished ones are dropped."""
        memory, words = (
            [(k[pairs], v[pairs]) for k, v in cache] for cache in (self.memory, self.words)
        )
        return DecoderState(memory, words, self.length)

    def reorder(self, beams: Tensor) -> "DecoderState":
        """beams (B, per_pair): the caption of the same pair that each of them goes on from."""
        rows = torch.arange(len(beams), device=beams.device)[:, None]
        return DecoderState(
            self.memory, [(k[rows, beams], v[rows, beams]) for k, v in self.words], self.length
        )


class CaptionDecoder(nn.Module):
    """The whole captioner, under the released keys `decoder.*`. `words` and `positions` are CLIP's."""

    def __init__(self, config: BertConfig, words: nn.Embedding, positions: nn.Parameter) -> None:
        super().__init__()
        if words.embedding_dim != config.hidden_size:
            raise ValueError(
                f"the captioner's hidden size {config.hidden_size} must equal CLIP's text width "
                f"{words.embedding_dim}"
            )
        self.config = config
        self.encoder = Layers([CaptionEncoderLayer(config) for _ in range(config.num_layers)])
        self.decoder = Layers([CaptionDecoderLayer(config) for _ in range(config.num_layers)])
        self.classifier = nn.ModuleDict({"cls": nn.ModuleDict({"predictions": Predictions(words)})})
        for part in (self.encoder, self.decoder, self.predictions.transform):
            initialize_bert(
                part, config.initializer_range
            )  # not the tied embeddings: they are CLIP's
        self.embeddings = CaptionEmbeddings(words, positions, config.hidden_dropout_prob)

    def tie(self, words: nn.Embedding, positions: nn.Parameter) -> None:
        """Make the tied weights one again with CLIP's, after a load has put new tensors in the place of all."""
        self.embeddings.word_embeddings, self.embeddings.position_embeddings.weight = (
            words,
            positions,
        )
        self.predictions.decoder.weight = words.weight

    @property
    def predictions(self) -> Predictions:
        return self.classifier["cls"]["predictions"]

    def encode_memory(self, pair_tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, S, E) → for each decoder layer the keys and values (B, H, S, d) of the encoder layer of the same number."""
        memory, x = [], pair_tokens
        for encoder_layer, decoder_layer in zip(
            self.encoder.layer, self.decoder.layer, strict=True
        ):
            x = encoder_layer(x)
            memory.append(decoder_layer.enc_attn.projections.keys_values(x))
        return memory

    def forward(self, pair_tokens: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S, E), ids and mask (B, L), 1 = word → hidden states (B, L, E) before the vocabulary projection."""
        num_words = self._check_length(ids.shape[1])
        future = torch.ones(num_words, num_words, device=ids.device).triu(1)
        padding = 1 - mask[:, None, None, :].float()
        attention_mask = torch.maximum(future, padding) * MASK_VALUE  # (B, 1, L, L)
        x = self.embeddings(ids)
        for layer, memory in zip(self.decoder.layer, self.encode_memory(pair_tokens), strict=True):
            x = layer(x, layer.slf_attn.projections.keys_values(x), memory, attention_mask)
        return x

    def start(self, pair_tokens: Tensor, max_words: int, per_pair: int = 1) -> DecoderState:
        """Encode the pairs (B, S, E) once, with room for `per_pair` captions of max_words words of each."""
        self._check_length(max_words)
        memory = [(k.contiguous(), v.contiguous()) for k, v in self.encode_memory(pair_tokens)]
        room = (len(pair_tokens), per_pair, self.config.num_attention_heads, max_words)
        words = [
            (k.new_empty(*room, k.shape[-1]), v.new_empty(*room, v.shape[-1])) for k, v in memory
        ]
        return DecoderState(memory, words)

    def step(self, ids: Tensor, state: DecoderState) -> Tensor:
        """The last words (B, per_pair) → float32 logits of the next (B, per_pair, V); the state grows by one word in place."""
        x, end = self.embeddings(ids.flatten()[:, None], start=state.length), state.length + 1
        for layer, memory, cache in zip(self.decoder.layer, state.memory, state.words, strict=True):
            cache = tuple(
                room.flatten(0, 1) for room in cache
            )  # views: (B · per_pair, H, max_words, d)
            for room, new in zip(cache, layer.slf_attn.projections.keys_values(x), strict=True):
                room[:, :, state.length : end] = new
            x = layer(x, tuple(room[:, :, :end] for room in cache), memory, mask=None)
        state.length = end
        return self.predictions(x[:, 0]).float().unflatten(0, ids.shape)

    def _check_length(self, num_words: int) -> int:
        positions = len(self.embeddings.position_embeddings.weight)
        if num_words > positions:
            raise ValueError(
                f"{num_words} words exceed the {positions} positions of CLIP's text tower"
            )
        return num_words
