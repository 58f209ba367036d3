"""CLIP's byte-pair encoding (open_clip's) and the fixed-length arrays made of a caption (SPEC §3, Text arrays)."""

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer

SOT, EOT, PAD = 49406, 49407, 0
VOCAB_SIZE = 49408


@cache
def clip_tokenizer() -> "SimpleTokenizer":
    """open_clip's tokenizer with CLIP's vocabulary of 49,408; imported late, since it brings the whole of open_clip."""
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


@cache
def encode(caption: str) -> tuple[int, ...]:
    """The BPE ids of a caption, without SOT and EOT."""
    return tuple(clip_tokenizer().encode(caption))


def tokenize_caption(caption: str, max_words: int) -> dict[str, np.ndarray]:
    """Five int64 arrays (max_words,) of a caption: retrieval text ids and mask, caption input ids, mask and target ids.

    Retrieval: `[SOT, w…, EOT]`, SOT and words cut to max_words−1. Captioning: input `[SOT, w…]`, target `[w…, EOT]`, words cut
    to max_words−1. Filled up with 0.
    """
    words = list(encode(caption))
    text = [SOT, *words][: max_words - 1] + [EOT]
    words = words[: max_words - 1]
    source, target = [SOT, *words], [*words, EOT]
    return {
        "retrieval_text_ids": _fill(text, max_words),
        "retrieval_text_mask": _fill([1] * len(text), max_words),
        "caption_input_ids": _fill(source, max_words),
        "caption_mask": _fill([1] * len(source), max_words),
        "caption_target_ids": _fill(target, max_words),
    }


def decode(ids: Sequence[int]) -> str:
    """The sentence of generated ids: up to EOT, cut at the first `!` (what pad decodes to), stripped (SPEC §6)."""
    ids = list(ids)
    if EOT in ids:
        ids = ids[: ids.index(EOT)]
    return clip_tokenizer().decode([i for i in ids if i != SOT]).split("!")[0].strip()


def _fill(ids: list[int], length: int) -> np.ndarray:
    return np.pad(np.asarray(ids, dtype=np.int64), (0, length - len(ids)), constant_values=PAD)
