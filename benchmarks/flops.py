"""The least arithmetic that a step needs, counted by hand from the sizes.

A multiplication and an addition count as two operations. All functions return the operations of a
forward pass.
"""

from modules.model.bert import BertConfig
from modules.model.clip_sizes import ClipSizes


def clip_block(tokens: int, width: int) -> float:
    """One block on one sequence: four projections, an MLP of four times the width, attention."""
    return 24 * tokens * width**2 + 4 * tokens**2 * width


def pair_encoder(sizes: ClipSizes, intra_layers: int) -> float:
    """The vision tower on one pair, with 2d patches."""
    tokens = sizes.num_tokens
    width = sizes.vision_width
    patches = 2 * (tokens - 1) * 3 * sizes.vision_patch_size**2 * width
    intra = intra_layers * clip_block(tokens, width)
    joint = (sizes.vision_layers - intra_layers) * clip_block(2 * tokens, width)
    projection = 4 * tokens * width * sizes.embed_dim
    return 2 * (patches + intra) + joint + projection


def text_encoder(sizes: ClipSizes, words: int) -> float:
    """The text tower on one sentence of `words` tokens, of which only EOT is projected."""
    width = sizes.transformer_width
    projection = 2 * width * sizes.embed_dim
    return sizes.transformer_layers * clip_block(words, width) + projection


def caption_encoder(config: BertConfig, pair_tokens: int) -> float:
    """The captioner's encoder, and the keys and values that its decoder reads."""
    width = config.hidden_size
    dense = pair_tokens * (8 * width**2 + 4 * width * config.intermediate_size)
    attention = 4 * pair_tokens**2 * width
    keys_and_values = 4 * pair_tokens * width**2
    return config.num_layers * (dense + attention + keys_and_values)


def caption_decoder(config: BertConfig, pair_tokens: int, words: int) -> float:
    """The captioner's decoder on `words` tokens, without the vocabulary."""
    width = config.hidden_size
    dense = words * (12 * width**2 + 4 * width * config.intermediate_size)
    attention = 4 * words * (words + pair_tokens) * width
    transform = 2 * words * width**2
    return config.num_layers * (dense + attention) + transform


def vocabulary(sizes: ClipSizes, words: int) -> float:
    """The projection of `words` states to the whole vocabulary."""
    return 2 * words * sizes.transformer_width * sizes.vocab_size
