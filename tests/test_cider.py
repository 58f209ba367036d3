"""CIDEr-D without Java against pycocoevalcap's, and as a reward in this process and in others."""

import random

import pytest
from pycocoevalcap.cider.cider import Cider

from modules.metrics.cider_d import END_MARK, CiderD, CiderReward, reward_tokens

WORDS = [
    "the",
    "small",
    "red",
    "metal",
    "cube",
    "has",
    "turned",
    "blue",
    "and",
    "moved",
    "there",
    "is",
    "no",
    "change",
]


@pytest.fixture(scope="module")
def corpus():
    draw = random.Random(0)
    sentence = lambda: " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))  # noqa: E731
    references = {str(n): [sentence() for _ in range(draw.randint(1, 6))] for n in range(40)}
    return references, {
        key: draw.choice([sentence(), texts[0]]) for key, texts in references.items()
    }


def test_scores_equal_pycocoevalcap(corpus):
    references, sentences = corpus
    _, expected = Cider().compute_score(
        references, {key: [text] for key, text in sentences.items()}
    )
    scorer = CiderD(references)
    assert [scorer.score(key, text) for key, text in sentences.items()] == pytest.approx(
        list(expected), abs=1e-9
    )
    assert max(expected) > 3
    assert min(expected) < 1


def test_workers_score_alike_and_in_order(corpus):
    references, sentences = corpus
    here, there = CiderReward(references, workers=0), CiderReward(references, workers=2)
    keys = [key for key in sentences for _ in range(3)]
    texts = [reward_tokens(sentences[key]) for key in keys]
    assert there(keys, texts) == here(keys, texts)


def test_tokens_are_words_and_an_end():
    assert (
        reward_tokens("The man's  T-shirt, (now) RED!") == f"the man 's t-shirt now red {END_MARK}"
    )
    assert reward_tokens("the man", ended=False) == "the man"
    scorer = CiderReward(
        {"a": ["the cube has moved", "the cube moved"], "b": ["nothing has changed"]}, 0
    )
    whole, broken = (reward_tokens("the cube has moved", ended) for ended in (True, False))
    assert scorer(["a"], [whole])[0] > scorer(["a"], [broken])[0]
