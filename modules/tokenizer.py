"""CLIP's byte-pair encoding (open_clip's) and the fixed-length arrays made of a caption (SPEC §3, Text arrays)."""

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from open_clip.tokenizer import SimpleTokenizer


SOT, EOT, PAD = 49406, 49407, 0


VOCAB_SIZE = 49408


@cache
def clip_tokenizer() -> "SimpleTokenizer":
    """open_clip's tokenizer with CLIP's vocabulary of 49,408.

    Its file is run alone, not the package, whose models take a second to import and have no use here.
    """
    package = importlib.util.find_spec("open_clip")
    file = Path(package.submodule_search_locations[0], "tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def tokenize_caption(caption: str, max_words: int) -> dict[str, np.ndarray]:
    """Five int64 arrays (max_words,) of a caption: retrieval text ids and mask, caption input ids, mask and target ids.

    Retrieval: `[SOT, w…, EOT]`, SOT and words cut to max_words−1. Captioning: input `[SOT, w…]`, target `[w…, EOT]`, words cut
    to max_words−1. Filled up with 0.
    """
    words = clip_tokenizer().encode(caption)
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


def split_words(ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Each word of generated ids with the places of its tokens; EOT is a word of its own, `(end)`, and the last."""
    pieces = clip_tokenizer().decoder
    words: list[tuple[str, list[int]]] = []
    places: list[int] = []
    for place, token in enumerate(ids):
        if token == EOT:
            break
        places.append(place)
        if pieces[token].endswith("</w>"):
            words.append((decode([ids[n] for n in places]), places))
            places = []
    if places:  # cut off within a word
        words.append((decode([ids[n] for n in places]), places))
    return words + ([("(end)", [ids.index(EOT)])] if EOT in ids else [])


def _fill(ids: list[int], length: int) -> np.ndarray:
    filled = np.full(length, PAD, dtype=np.int64)
    filled[: len(ids)] = ids
    return filled
