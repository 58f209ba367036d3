"""The arithmetic that a step cannot do without, counted by hand from the sizes: multiply and add are two operations."""

from modules.model.bert import BertConfig
from modules.model.clip import ClipSizes


def clip_block(tokens: int, width: int) -> float:
    """One block forward on one sequence: q, k, v, output and the fourfold perceptron, and the attention itself."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def pair_encoder(sizes: ClipSizes, intra_layers: int) -> float:
    """The vision tower forward on one pair, 2d patches."""
    tokens, width = sizes.num_tokens, sizes.vision_width
    patches = 2 * (tokens - 1) * 3 * sizes.vision_patch_size**2 * width
    alone = intra_layers * clip_block(tokens, width)
    jointly = (sizes.vision_layers - intra_layers) * clip_block(2 * tokens, width)
    return 2 * (patches + alone) + jointly + 4 * tokens * width * sizes.embed_dim


def text_encoder(sizes: ClipSizes, words: int) -> float:
    """The text tower forward on one sentence of `words` tokens."""
    return (
        sizes.transformer_layers * clip_block(words, sizes.transformer_width)
        + 2 * sizes.transformer_width * sizes.embed_dim
    )


def caption_encoder(config: BertConfig, pair_tokens: int) -> float:
    """The captioner's encoder, and the keys and values that its decoder takes from it."""
    width = config.hidden_size
    layer = (
        pair_tokens * (8 * width**2 + 4 * width * config.intermediate_size)
        + 4 * pair_tokens**2 * width
    )
    return config.num_layers * (layer + 4 * pair_tokens * width**2)


def caption_decoder(config: BertConfig, pair_tokens: int, words: int) -> float:
    """The captioner's decoder on `words` tokens, without the vocabulary."""
    width = config.hidden_size
    layer = (
        words * (12 * width**2 + 4 * width * config.intermediate_size)
        + 4 * words * (words + pair_tokens) * width
    )
    return config.num_layers * layer + 2 * words * width**2


def vocabulary(sizes: ClipSizes, words: int) -> float:
    """The projection of `words` states to the whole vocabulary."""
    return 2 * words * sizes.transformer_width * sizes.vocab_size
