"""Numbers from the command line at both ends of their ranges, and scores that mean nothing."""

import argparse
import contextlib
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import app
from dataloaders.pairs import ImagePair
from gt import score_files
from modules.evaluation import retrieval
from modules.evaluation.retrieval import RetrievalEvaluator
from modules.generation import generate
from modules.metrics.bootstrap import bootstrap, interval, p_value
from modules.metrics.coco import Cider
from modules.metrics.metric import ScoringContext, ScoringProtocol
from modules.metrics.scorer import CaptionScorer
from modules.options.decoding import MAX_LENGTH_PENALTY, Decoding
from modules.options.parsing import add_all_flags, parse_options
from modules.training.loop import _verdict
from modules.training.progress import Progress
from preprocess import check_dataset, synthesize
from system.flags import MAX_SEED, Bounds, bounded
from system.parser import OneLineParser
from system.runtime import Runtime
from tests.runs import arguments, run_refused

EXTREMES = ("nan", "inf", "-inf", "1e400", "-1e400", "1e308", "1e-320", "0", "-0", "-1")
EXTREMES += (str(2**31), str(2**63), str(-(2**64)), "9" * 400, "１２", "1_000", " 7 ", "", "x")
WORDS = ["--do_train", "--output_dir", "o", "--datatype", "clevr", "--data_path", "d"]


def number_flags(parser: argparse.ArgumentParser) -> list[str]:
    """Flags whose type turns "1" into a number."""
    found = []
    for action in parser._actions:
        if action.option_strings and callable(action.type) and action.type is not str:
            try:
                value = action.type("1")
            except argparse.ArgumentTypeError:
                continue
            if isinstance(value, int | float):
                found.append(action.option_strings[0])
    return found


def parsed_or_one_line(parse, words, flag, capsys) -> object:
    """What is parsed, or None where it is refused as it should be."""
    with contextlib.suppress(SystemExit):
        return parse(words)
    (line,) = capsys.readouterr().err.splitlines()
    assert flag.lstrip("-") in line
    assert "Traceback" not in line
    assert len(line) < 1000
    return None


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_extreme_numbers_of_runs_are_accepted_or_refused_in_a_line(task, capsys):
    parser = OneLineParser()
    add_all_flags(parser, task, needed_first=())
    flags = number_flags(parser)
    assert len(flags) >= 18
    for flag in flags:
        for value in EXTREMES:
            options = parsed_or_one_line(
                lambda words: parse_options(words, task, None, 1),
                [*WORDS, f"{flag}={value}"],
                flag,
                capsys,
            )
            if options is not None:
                assert math.isfinite(float(value.replace("１２", "12")))


@pytest.mark.parametrize(
    ("parser", "words"),
    [
        (synthesize._parser(), ["--output", "o"]),
        (check_dataset._parser(), ["--datatype", "pairs", "--data_path", "d"]),
        (score_files._build_parser(), ["--gt", "g", "--results", "r"]),
        (app.build_parser(), []),
    ],
)
def test_extreme_numbers_of_tools_are_accepted_or_refused_in_a_line(parser, words, capsys):
    flags = number_flags(parser)
    assert len(flags) >= 2
    for flag in flags:
        for value in EXTREMES:
            found = parsed_or_one_line(parser.parse_args, [*words, f"{flag}={value}"], flag, capsys)
            if found is not None:
                assert abs(getattr(found, flag.lstrip("-"))) <= 2**63


@given(st.integers() | st.floats())
def test_bounds(value):
    bounds = Bounds(at_least=-3, at_most=5)
    assert bounds.hold(value) == (-3 <= value <= 5)
    assert Bounds(above=0).hold(value) == (
        value > 0 and (value <= 10**9 if isinstance(value, int) else value < math.inf)
    )


def test_bounds_say_what_was_expected():
    assert Bounds(1).describe(0) == "at least 1"
    assert Bounds(1).describe(10**10) == "1 to 1000000000"
    assert Bounds().describe(math.inf) == "a finite number"
    assert Bounds(above=0).describe(-1.0) == "a number above 0"
    with pytest.raises(argparse.ArgumentTypeError, match=r"^9{37}\.\.\. is out of range, expected"):
        bounded(int, 0, 9)("9" * 500)


# ---- decoding with the extreme values that are accepted ----


@pytest.mark.parametrize(
    ("settings", "is_greedy"),
    [
        ({"temperature": 1e-30}, True),
        ({"temperature": 1e30}, False),
        ({"temperature": 1e-30, "top_p": 1e-30}, True),
        ({"top_p": 1e-30}, True),
        ({"beam_size": 3, "length_penalty": float(MAX_LENGTH_PENALTY)}, False),
        ({"beam_size": 3, "length_penalty": MAX_LENGTH_PENALTY}, False),
    ],
)
def test_accepted_extremes_decode(settings, is_greedy, tiny_captioner):
    tokens = torch.randn(
        2, 10, tiny_captioner.backbone.embed_dim, generator=torch.Generator().manual_seed(0)
    )
    ids = generate(tiny_captioner, tokens, 8, Decoding(**settings))
    assert ((ids >= 0) & (ids < 50)).all()
    if (
        settings.get("temperature") == 1e-30
        or "temperature" not in settings
        and "top_p" in settings
    ):
        assert torch.equal(ids, generate(tiny_captioner, tokens, 8, Decoding()))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_tokens_that_are_not_finite_are_refused(bad, tiny_captioner):
    tokens = torch.zeros(2, 10, tiny_captioner.backbone.embed_dim)
    tokens[1, 3, 0] = bad
    with pytest.raises(ValueError, match="not finite .*--precision fp32"):
        generate(tiny_captioner, tokens, 8, Decoding())


# ---- scores of a single caption ----

CIDER_ONLY = ScoringProtocol(
    tokenize=lambda texts, _: {key: list(value) for key, value in texts.items()},
    metrics=("rouge_l", "cider"),
    selection="CIDEr",
)
REFERENCES = {
    "a": ["the red car has left"],
    "b": ["a dog appeared there"],
    "c": ["nothing at all changed"],
}
CAPTIONS = {key: texts[0] for key, texts in REFERENCES.items()}


def scored(ids: str):
    references = {key: REFERENCES[key] for key in ids}
    scorer = CaptionScorer(references, CIDER_ONLY, ScoringContext())
    return scorer.score({key: CAPTIONS[key] for key in ids})


def test_cider_of_one_caption_is_missing_and_that_is_said(caplog):
    scores = scored("a").scores()["all"]
    assert scores["ROUGE_L"] == pytest.approx(1)
    assert math.isnan(scores["CIDEr"])
    assert caplog.messages == ["CIDEr is missing: of fewer than 2 captions it means nothing"]


def test_cider_of_a_group_of_one_is_missing_and_others_stay(caplog):
    scores = scored("abc").scores({"one": ["a"], "two": ["a", "b"]})
    assert math.isnan(scores["one"]["CIDEr"])
    assert scores["two"]["CIDEr"] > 0
    assert scores["all"]["CIDEr"] == pytest.approx(10)
    assert caplog.messages == []


def test_cider_of_captions_one_by_one_is_that_within_their_group():
    values = scored("abc").whole.scores_by_id("CIDEr")
    assert all(value == pytest.approx(10) for value in values.values())


def test_a_bootstrap_of_one_caption_says_nothing():
    (drawn,) = bootstrap([scored("a").whole], 200, 0)
    assert np.isnan(drawn["ROUGE_L"]).all()
    assert all(map(math.isnan, interval(drawn["ROUGE_L"])))
    assert math.isnan(p_value(drawn["ROUGE_L"]))


def test_equal_scores_are_called_equal():
    progress = Progress()
    found = []
    for score in (0.5, 0.5, 0.7, 0.6, math.nan):
        before = progress.best_score if progress.best_epoch >= 0 else None
        found.append(_verdict(score, progress.record_score(score), before, progress))
    assert found == [
        "the best so far, 0.5000",
        "as good as the best so far, 0.5000: the later epoch is chosen",
        "the best so far, 0.7000",
        "no improvement on 0.7000 for 1 epoch(s)",
        "not compared: the score that selects the best epoch is missing",
    ]


# ---- batches from which nothing can be learned ----


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch_size", "1"], "--batch_size 1: nothing can be learned from batches of fewer"),
        (
            ["--batch_size", "4", "--gradient_accumulation_steps", "4"],
            "--batch_size 4 in 4 parts: nothing can be learned",
        ),
    ],
)
def test_adaptation_refuses_batches_of_one(more, message, spot, tiny_sizes, tmp_path, capsys):
    words = arguments(spot, tmp_path / "run", tiny_sizes, "retrieval", "--do_train", *more)
    line = run_refused("retrieval", words, capsys)
    assert message in line
    assert line.endswith("use at least --batch_size " + ("8" if len(more) > 2 else "2"))
    assert not (tmp_path / "run").exists()


def test_retrieval_among_a_single_pair_is_said_to_mean_nothing(caplog):
    pair = ImagePair("a", "a.png", "b.png", ("a dog left",))
    RetrievalEvaluator([pair], None, 8, None, Runtime())
    (message,) = caplog.messages
    assert message == "retrieval among a single pair is always right: its scores mean nothing"
    RetrievalEvaluator([pair, pair], None, 8, None, Runtime())
    assert caplog.messages == [message]


def test_similarities_that_are_not_finite_are_refused(spot, tiny_sizes, tmp_path, capsys):
    words = arguments(spot, tmp_path / "run", tiny_sizes, "retrieval", "--do_eval")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "_compare_vectors", lambda *_: torch.full((10, 5), math.nan))
        line = run_refused("retrieval", words, capsys)
    assert "the model computes numbers that are not finite" in line


def test_references_without_words_score_nothing():
    found = Cider(ScoringContext()).rows({"a": [""], "b": [""]}, {"a": "a dog", "b": ""})
    assert found.tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beam_size": "3"}, "--beam_size is 3, expected a whole number"),
        ({"beam_size": 2.5}, "--beam_size is 2.5, expected a whole number"),
        ({"num_captions": None}, "--num_captions is None, expected a whole number"),
        ({"beam_size": True}, "--beam_size is True, expected a whole number"),
        ({"top_p": "x"}, "--top_p is x, expected a number"),
        ({"seed": None}, "--seed is None, expected a whole number"),
    ],
)
def test_settings_that_are_no_numbers_are_told(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings).method_name()
    assert Decoding(beam_size=np.int64(3), length_penalty=np.float32(1)).method_name() == "beam"


@pytest.mark.parametrize(
    ("seed", "is_accepted"), [(0, True), (MAX_SEED, True), (MAX_SEED + 1, False)]
)
def test_seeds_up_to_torchs_largest(seed, is_accepted, capsys):
    words = [*WORDS, "--seed", str(seed)]
    options = parsed_or_one_line(
        lambda words: parse_options(words, "caption", None, 1), words, "--seed", capsys
    )
    assert (options is not None) == is_accepted
