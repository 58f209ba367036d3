"""The page of an evaluation of retrieval: queries both ways, with what was found nearest."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from dataloaders.pairs import ImagePair
from modules.report.page import Page, image_sources
from modules.report.pictures import evenly_spaced
from modules.retrieval import retrieval_ranks

QUERIES, NEAREST = 5, 5  # of retrieval, each way; what is shown for each


def write_retrieval_page(
    path: Path, page: Page, scenes: Sequence[ImagePair], similarity: Tensor
) -> None:
    """Stage 1's page, from the similarity (N_text, N_pair) of the scenes' sentences, scene by scene: queries both ways, spread
    evenly from the best found to the worst, with the NEAREST that were found."""
    ranks = retrieval_ranks(similarity, [len(scene.captions) for scene in scenes])
    texts = [(number, caption) for number, scene in enumerate(scenes) for caption in scene.captions]
    sentences, pairs = [], []
    for query in _evenly_over_ranks(ranks["text_to_pair"]):
        number, caption = texts[query]
        near = similarity[query].topk(min(NEAREST, len(scenes)))
        found = [
            {
                **image_sources(*_ids_and_images(scenes[n])),
                "similarity": value,
                "right": n == number,
            }
            for value, n in zip(*(column.tolist() for column in near), strict=True)
        ]
        sentences.append(
            {
                "sentence": caption,
                "id": scenes[number].id,
                "rank": f"{ranks['text_to_pair'][query]:g}",
                "found": found,
            }
        )
    for query in _evenly_over_ranks(ranks["pair_to_text"]):
        near = similarity[:, query].topk(min(NEAREST, len(texts)))
        found = [
            {"text": texts[n][1], "similarity": value, "right": texts[n][0] == query}
            for value, n in zip(*(column.tolist() for column in near), strict=True)
        ]
        pairs.append(
            {
                **image_sources(*_ids_and_images(scenes[query])),
                "sentence": scenes[query].captions[0],
                "rank": f"{ranks['pair_to_text'][query]:g}",
                "found": found,
            }
        )
    page.write(
        path,
        "retrieval.html",
        1,
        ("loss", "text_to_pair_R1", "pair_to_text_R1"),
        sentences=sentences,
        pairs=pairs,
    )


def _evenly_over_ranks(ranks: Tensor) -> list[int]:
    """Places of QUERIES ranks, evenly over the quantiles from the lowest to the highest."""
    order = ranks.argsort(stable=True).tolist()
    return [order[n] for n in evenly_spaced(len(order), QUERIES)]


def _ids_and_images(pair: ImagePair) -> tuple[str, str, str]:
    return pair.id, pair.before, pair.after
