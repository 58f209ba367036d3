"""The report page of retrieval: queries both ways, each with what was found nearest."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dataloaders.pairs import ImagePair
from modules.report.page import Page, template_values
from modules.report.pictures import space_evenly
from modules.retrieval import retrieval_ranks

NUM_QUERIES = 5  # in each direction
NUM_NEAREST = 5  # results of each query


def write_retrieval_page(
    path: Path, page: Page, pairs: Sequence[ImagePair], similarity: Tensor
) -> None:
    """Queries both ways, evenly spaced from the one found best to the one found worst.

    `similarity` is (N_text, N_pair), its texts the sentences of the pairs, pair by pair.
    """
    ranks = retrieval_ranks(similarity, [len(pair.captions) for pair in pairs])
    texts = [(number, caption) for number, pair in enumerate(pairs) for caption in pair.captions]
    text_to_pair = ranks["text_to_pair"]
    pair_to_text = ranks["pair_to_text"]
    sentence_queries = [
        _sentence_query(texts[text], pairs, similarity[text], text_to_pair[text])
        for text in _evenly_over_ranks(text_to_pair)
    ]
    pair_queries = [
        _pair_query(number, pairs[number], texts, similarity[:, number], pair_to_text[number])
        for number in _evenly_over_ranks(pair_to_text)
    ]
    page.write(
        path,
        "retrieval.html",
        1,
        ("loss", "text_to_pair_R1", "pair_to_text_R1"),
        sentences=sentence_queries,
        pairs=pair_queries,
    )


def _sentence_query(
    text: tuple[int, str], pairs: Sequence[ImagePair], similarity: Tensor, rank: Tensor
) -> dict[str, Any]:
    """A sentence, (its pair's number, caption), and the pairs nearest to it."""
    own, caption = text
    found = []
    for value, number in _nearest(similarity):
        sources = _images_of(pairs[number])
        found.append({**sources, "similarity": value, "right": number == own})
    return {"sentence": caption, "id": pairs[own].id, "rank": f"{rank:g}", "found": found}


def _pair_query(
    own: int, pair: ImagePair, texts: Sequence[tuple[int, str]], similarity: Tensor, rank: Tensor
) -> dict[str, Any]:
    """A pair and the sentences nearest to it."""
    found = []
    for value, text in _nearest(similarity):
        number, caption = texts[text]
        found.append({"text": caption, "similarity": value, "right": number == own})
    sentence = pair.captions[0]
    return {**_images_of(pair), "sentence": sentence, "rank": f"{rank:g}", "found": found}


def _nearest(similarity: Tensor) -> list[tuple[float, int]]:
    """The highest of similarities (N,), and where they are."""
    values, places = similarity.topk(min(NUM_NEAREST, len(similarity)))
    return list(zip(values.tolist(), places.tolist(), strict=True))


def _evenly_over_ranks(ranks: Tensor) -> list[int]:
    """Places of NUM_QUERIES ranks, evenly spaced from the lowest rank to the highest."""
    order = ranks.argsort(stable=True).tolist()
    return [order[place] for place in space_evenly(len(order), NUM_QUERIES)]


def _images_of(pair: ImagePair) -> dict[str, str]:
    return template_values(pair.id, pair.before, pair.after)
