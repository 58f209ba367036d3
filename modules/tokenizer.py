"""CLIP's byte-pair encoding, as open_clip has it, and the arrays that a caption becomes.

Source: docs/reference.md, Text arrays.
"""

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
END_OF_WORD = "</w>"  # how a token that ends a word is written in the vocabulary


@cache
def load_clip_tokenizer() -> "SimpleTokenizer":
    """open_clip's tokenizer with CLIP's vocabulary of 49,408.

    Runs only that file: importing the whole package loads models, takes a second and is not needed.
    Raises OSError if the package is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None:
        raise OSError("CLIP's vocabulary comes with a package: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0], "tokenizer.py")
    spec = importlib.util.spec_from_file_location("open_clip_tokenizer", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SimpleTokenizer()


def tokenize_caption(caption: str, max_words: int) -> dict[str, np.ndarray]:
    """A caption → five int64 arrays (max_words,), padded with 0; masks are 1 for tokens.

    Retrieval text ids and mask: `[SOT, w…, EOT]`, where SOT and words are cut to max_words − 1.
    Caption input ids and mask: `[SOT, w…]`; target ids: `[w…, EOT]`; words cut to max_words − 1.
    Here w… are the token ids of the caption's words.
    """
    token_ids = load_clip_tokenizer().encode(caption)
    text = [SOT, *token_ids][: max_words - 1] + [EOT]
    token_ids = token_ids[: max_words - 1]
    source = [SOT, *token_ids]
    target = [*token_ids, EOT]
    return {
        "retrieval_text_ids": _pad(text, max_words),
        "retrieval_text_mask": _pad([1] * len(text), max_words),
        "caption_input_ids": _pad(source, max_words),
        "caption_mask": _pad([1] * len(source), max_words),
        "caption_target_ids": _pad(target, max_words),
    }


def decode(ids: Sequence[int]) -> str:
    """Generated ids → the sentence before EOT, stripped.

    It is cut at the first `!`, which is what the padding id decodes to.
    """
    ids = list(ids)
    if EOT in ids:
        ids = ids[: ids.index(EOT)]
    sentence = load_clip_tokenizer().decode([token for token in ids if token != SOT])
    return sentence.split("!")[0].strip()


def split_words(ids: Sequence[int]) -> list[tuple[str, list[int]]]:
    """Each word of generated ids with the positions of its tokens.

    EOT counts as a word, `(end)`, and is the last one.
    """
    pieces = load_clip_tokenizer().decoder
    words: list[tuple[str, list[int]]] = []
    positions: list[int] = []
    for position, token in enumerate(ids):
        if token == EOT:
            break
        positions.append(position)
        if pieces[token].endswith(END_OF_WORD):
            words.append((decode([ids[n] for n in positions]), positions))
            positions = []
    if positions:  # a word that max_words has cut off
        words.append((decode([ids[n] for n in positions]), positions))
    if EOT in ids:
        words.append(("(end)", [ids.index(EOT)]))
    return words


def _pad(ids: list[int], length: int) -> np.ndarray:
    padded = np.full(length, PAD, dtype=np.int64)
    padded[: len(ids)] = ids
    return padded
