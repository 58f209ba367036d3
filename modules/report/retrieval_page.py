"""The report page of retrieval: queries both ways, each with its nearest results."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dataloaders.pairs import ImagePair
from modules.report.page import Page, embed_pair
from modules.report.pictures import space_evenly
from modules.retrieval import retrieval_ranks

NUM_QUERIES = 5  # in each direction
NUM_NEAREST = 5  # results of each query
CURVES = {
    "loss": "training loss",
    "text_to_pair_R1": "R1, text → pair",
    "pair_to_text_R1": "R1, pair → text",
}


def write_retrieval_page(
    path: Path, page: Page, pairs: Sequence[ImagePair], similarity: Tensor
) -> None:
    """Queries both ways, evenly spaced from the one found best to the one found worst.

    `similarity` is (N_text, N_pair), its texts the sentences of the pairs, pair by pair.
    """
    ranks = retrieval_ranks(similarity, [len(pair.captions) for pair in pairs])
    texts = [(index, caption) for index, pair in enumerate(pairs) for caption in pair.captions]
    text_to_pair = ranks["text_to_pair"]
    pair_to_text = ranks["pair_to_text"]
    sentence_queries = []
    for index in _choose_queries(text_to_pair):
        query = _describe_sentence(texts[index], pairs, similarity[index], text_to_pair[index])
        sentence_queries.append(query)
    pair_queries = []
    for index in _choose_queries(pair_to_text):
        query = _describe_pair(
            index, pairs[index], texts, similarity[:, index], pair_to_text[index]
        )
        pair_queries.append(query)
    page.write(
        path,
        template="retrieval.html",
        digits=1,
        curves=CURVES,
        selection="text_to_pair_R1",
        sentences=sentence_queries,
        pairs=pair_queries,
        num_nearest=NUM_NEAREST,
    )


def _describe_sentence(
    text: tuple[int, str], pairs: Sequence[ImagePair], similarity: Tensor, rank: Tensor
) -> dict[str, Any]:
    """A sentence, (its pair's index, caption), and the pairs nearest to it.

    similarity: (N_pair,), of the sentence to each pair.
    """
    own, caption = text
    found = []
    for value, pair_index in _find_nearest(similarity):
        nearest = pairs[pair_index]
        images = embed_pair(nearest.id, nearest.before, nearest.after)
        found.append({**images, "similarity": value, "right": pair_index == own})
    return {"sentence": caption, "id": pairs[own].id, "rank": f"{rank:g}", "found": found}


def _describe_pair(
    own: int, pair: ImagePair, texts: Sequence[tuple[int, str]], similarity: Tensor, rank: Tensor
) -> dict[str, Any]:
    """A pair and the sentences nearest to it.

    similarity: (N_text,), of each sentence to the pair.
    """
    found = []
    for value, text_index in _find_nearest(similarity):
        pair_index, caption = texts[text_index]
        found.append({"text": caption, "similarity": value, "right": pair_index == own})
    images = embed_pair(pair.id, pair.before, pair.after)
    sentence = pair.captions[0]
    return {**images, "sentence": sentence, "rank": f"{rank:g}", "found": found}


def _find_nearest(similarity: Tensor) -> list[tuple[float, int]]:
    """The highest of similarities (N,), with their indices."""
    values, indices = similarity.topk(min(NUM_NEAREST, len(similarity)))
    return list(zip(values.tolist(), indices.tolist(), strict=True))


def _choose_queries(ranks: Tensor) -> list[int]:
    """Indices of NUM_QUERIES ranks (N,), evenly spaced from the lowest rank to the highest."""
    order = ranks.argsort(stable=True).tolist()
    return [order[index] for index in space_evenly(len(order), NUM_QUERIES)]
