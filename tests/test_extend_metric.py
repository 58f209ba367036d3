"""A custom metric is one class and one line in the registry, and so is a scoring protocol.

The two metrics below take part in everything: scores of captions and subsets, intervals, evaluation
with its baselines, a whole run, files scored by gt/eval_utils.py. There is no Java in it.
"""

import json
import math

import numpy as np
import pandas as pd
import pytest

import CLIP4IDCinference
from dataloaders.coco_files import coco_ground_truth
from dataloaders.datasets import DATASETS, open_dataset
from dataloaders.datasets.spot_the_diff import SpotTheDiff
from dataloaders.pairs import ImagePair, PairDataset
from gt import eval_utils
from modules.evaluation.split_scorer import SplitScorer
from modules.metrics.bootstrap import bootstrap
from modules.metrics.metric import MeanMetric, ScoringContext, ScoringProtocol
from modules.metrics.scorer import CaptionScorer
from modules.registries import METRICS, PROTOCOLS
from tests.conftest import lower_case, make_spot
from tests.runs import arguments


class LengthRatio:
    """Words of all captions, divided by the words of their first references."""

    names = ("length_ratio",)
    depends_on_group = False  # a row needs no other captions

    def __init__(self, context):
        pass

    def rows(self, references, captions):
        rows = []
        for key, text in captions.items():
            rows.append([len(text.split()), len(references[key][0].split())])
        return np.array(rows, float)

    def scores(self, total, count):
        caption_words, reference_words = total
        return (caption_words / reference_words,)


class NoChangeAccuracy(MeanMetric):
    """How many captions are right about whether anything changed."""

    names = ("no_change_accuracy",)

    def rows(self, references, captions):
        phrases = set(self.context.no_change_phrases)
        if not phrases:
            return np.full((len(captions), 1), np.nan)
        rows = []
        for key, text in captions.items():
            is_right = (text in phrases) == (references[key][0] in phrases)
            rows.append([is_right])
        return np.array(rows, float)


TOY = ScoringProtocol(
    tokenize=lower_case,
    metrics=("length_ratio", "no_change_accuracy"),
    derived={"both": lambda scores: scores["length_ratio"] + scores["no_change_accuracy"]},
    selection="no_change_accuracy",
)
NAMES = ["length_ratio", "no_change_accuracy", "both"]


class ToyData(PairDataset):
    """Four pairs, two of which do not change."""

    name = "toy"
    title = "Toy"
    protocols = ("toy",)
    no_change_phrases = ("nothing changed", "same")

    def pairs(self, split, need_images=True):
        captions = {"1": "a car left", "2": "nothing changed", "3": "a man came", "4": "same"}
        pairs = []
        for key, text in captions.items():
            kind = "none" if text in self.no_change_phrases else "some"
            pairs.append(ImagePair(key, "a.png", "b.png", (text,), change_type=kind))
        return pairs


class ToySpot(SpotTheDiff):
    """Spot-the-Diff, scored by the toy protocol and by ROUGE-L."""

    name = "toyspot"
    protocols = ("toy", "rouge")
    ground_truth_splits = ()
    no_change_phrases = ("nothing changed",)


CAPTIONS = {"1": "A CAR", "2": "nothing changed", "3": "same", "4": "same"}
SUBSETS = {"some": ["1", "3"], "none": ["2", "4"], "absent": ["9"]}


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lines in the registries, undone after each test; nothing that runs Java can be used."""
    for registry in (METRICS, PROTOCOLS, DATASETS):
        monkeypatch.setattr(registry, "targets", dict(registry.targets))
    METRICS.register("length_ratio", LengthRatio)
    METRICS.register("no_change_accuracy", NoChangeAccuracy)
    PROTOCOLS.register("toy", TOY)
    PROTOCOLS.register("rouge", ScoringProtocol(lower_case, ("rouge_l",)))
    DATASETS.register("toy", ToyData)
    DATASETS.register("toyspot", ToySpot)
    for name in ("metrics.ptb.tokenize_lines", "metrics.meteor.MeteorProcess"):
        monkeypatch.setattr(f"modules.{name}", None)


@pytest.fixture
def dataset() -> PairDataset:
    return open_dataset("toy", ".")


@pytest.fixture
def scorer(dataset) -> CaptionScorer:
    context = ScoringContext(no_change_phrases=dataset.no_change_phrases)
    return CaptionScorer(dataset.references("test", dataset.pairs("test")), TOY, context)


def test_captions_and_subsets_are_scored(scorer):
    assert scorer.score(CAPTIONS).scores(SUBSETS) == {
        "all": {"length_ratio": 6 / 9, "no_change_accuracy": 0.75, "both": 6 / 9 + 0.75},
        "some": {"length_ratio": 0.5, "no_change_accuracy": 0.5, "both": 1.0},
        "none": {"length_ratio": 1.0, "no_change_accuracy": 1.0, "both": 2.0},
    }
    assert scorer.names == NAMES
    scored = scorer.score(CAPTIONS)
    ratios = scored.whole.scores_by_id("length_ratio")
    assert ratios == {"1": 2 / 3, "2": 1.0, "3": 1 / 3, "4": 1.0}
    assert scored.whole.scores_by_id("both")["3"] == 1 / 3


def test_draws_are_weighted_sums(scorer):
    drawn = bootstrap([scorer.score(CAPTIONS).whole], 50, seed=5)[0]
    source = np.random.default_rng(5)
    caption_words, reference_words = np.array([2, 2, 1, 1]), np.array([3, 2, 3, 1])
    is_right = np.array([1, 1, 0, 1])
    for number in range(50):
        places = source.integers(4, size=4)
        ratio = caption_words[places].sum() / reference_words[places].sum()
        assert drawn["length_ratio"][number] == pytest.approx(ratio)
        assert drawn["no_change_accuracy"][number] == is_right[places].mean()
        assert drawn["both"][number] == pytest.approx(ratio + is_right[places].mean())


def test_the_split_scorer_scores_by_the_datasets_protocol(dataset, caplog):
    caplog.set_level("INFO")
    pairs = dataset.pairs("test")
    scorer = SplitScorer.build(pairs, pairs, dataset, "test")
    scores = scorer.score(CAPTIONS)
    assert list(scores) == ["all", "none", "some"]
    assert scores["all"]["no_change_accuracy"] == 0.75
    assert scorer.selection == "no_change_accuracy"
    assert scorer.scores_by_id() == {"1": 1.0, "2": 1.0, "3": 0.0, "4": 1.0}
    (constant, constant_scores), (random, random_scores) = scorer.baselines
    assert constant.startswith("best constant (all: “")
    assert random == "random training caption (all)"
    assert list(constant_scores) == list(random_scores) == NAMES
    assert constant_scores["no_change_accuracy"] == 0.5
    assert "length_ratio no_change_accuracy" in caplog.text


def test_several_protocols_give_their_scores_one_after_another(dataset):
    pairs = dataset.pairs("test")
    references = dataset.references("test", pairs)
    scorer = SplitScorer(references, protocols=("rouge", "toy"))
    scores = scorer.score(CAPTIONS)["all"]
    assert list(scores) == ["ROUGE_L", *NAMES]
    assert scorer.selection == "ROUGE_L"
    assert math.isnan(scores["no_change_accuracy"]), "there are no phrases in this context"
    with pytest.raises(ValueError, match="scores of the same name"):
        SplitScorer(references, protocols=("toy", "toy"))


def test_a_run_trains_chooses_and_reports_by_it(tiny_sizes, tmp_path):
    spot = make_spot(tmp_path / "spot", {"train": 4, "val": 1, "test": 3})
    run = tmp_path / "run"
    options = ["--do_train", "--epochs", "1", "--datatype", "toyspot"]
    assert CLIP4IDCinference.main(arguments(spot, run, tiny_sizes, "caption", *options)) == 0
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics)[-4:] == [*NAMES, "ROUGE_L"]
    assert metrics["length_ratio"] > 0
    history = pd.read_csv(run / "history.csv")
    assert history["no_change_accuracy"].tolist() == [metrics["no_change_accuracy"]]
    log = (run / "log.txt").read_text()
    assert f"best epoch: 1 with {metrics['no_change_accuracy']:.4f}" in log
    page = (run / "report.html").read_text()
    assert "Best and worst are ranked by no_change_accuracy." in page
    assert ", no_change_accuracy 1.00)" in page
    assert "CIDEr" not in page.replace("the highest CIDEr", "")


@pytest.fixture
def files(tmp_path, dataset) -> list[str]:
    """The command line that scores two files of captions."""
    references = dataset.references("test", dataset.pairs("test"))
    (tmp_path / "gt.json").write_text(json.dumps(coco_ground_truth(references.items())))
    for name, captions in (("one", CAPTIONS), ("two", dict.fromkeys(CAPTIONS, "same"))):
        rows = [{"image_id": key, "caption": text} for key, text in captions.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    results = [str(tmp_path / "one.json"), str(tmp_path / "two.json")]
    return ["score", "--gt", str(tmp_path / "gt.json"), "--results", *results]


def test_files_are_scored_by_a_protocol_and_with_a_datasets_words(files, tmp_path, capsys):
    options = [*files, "--protocol", "toy", "--datatype", "toy", "--bootstrap", "100"]
    assert eval_utils.main([*options, "--format", "json"]) == 0
    report = json.loads(capsys.readouterr().out)
    one, two = report["systems"].values()
    assert one["scores"]["all"] == {
        "length_ratio": 6 / 9,
        "no_change_accuracy": 0.75,
        "both": 6 / 9 + 0.75,
    }
    assert two["against_first"]["all"]["no_change_accuracy"]["interval"] == [-0.75, 0.0]
    assert list(two["intervals"]["all"]) == NAMES
    assert eval_utils.main(options) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[3].split() == NAMES
    assert table[4].split() == ["all", "0.6667", "0.7500", "1.4167"]
    assert table[3].index("both") + len("both") == len(table[4]), "columns are aligned"
    assert eval_utils.main([*options, "--format", "latex"]) == 0
    latex = capsys.readouterr().out
    assert r"system & group & length\_ratio & no\_change\_accuracy & both \\" in latex
    assert r"one & all & 66.7 {\scriptsize" in latex


def test_what_a_metric_cannot_compute_is_missing(files, capsys):
    """Without the dataset's words."""
    assert eval_utils.main([*files, "--protocol", "toy", "--format", "json"]) == 0
    one, _ = json.loads(capsys.readouterr().out)["systems"].values()
    assert one["scores"]["all"] == {
        "length_ratio": 6 / 9,
        "no_change_accuracy": None,
        "both": None,
    }


def test_an_unknown_protocol_is_refused_and_the_known_ones_are_named(files, dataset, capsys):
    with pytest.raises(SystemExit, match="2"):
        eval_utils.main([*files, "--protocol", "nope"])
    message = capsys.readouterr().err
    for name in ("nope", "coco", "toy"):
        assert name in message
    with pytest.raises(SystemExit, match="0"):
        eval_utils.main(["score", "--help"])
    assert "coco, toy, rouge" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="protocol 'nope': expected one of coco, toy"):
        SplitScorer({"1": ["a"]}, protocols=("nope",))


def test_an_unknown_metric_is_refused_and_the_known_ones_are_named():
    protocol = ScoringProtocol(lower_case, ("spice",))
    with pytest.raises(ValueError, match="unknown metric 'spice': expected one of bleu, meteor"):
        CaptionScorer({"1": ["a"]}, protocol)


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="metric 'cider' is registered already"):
        METRICS.register("cider", LengthRatio)
    with pytest.raises(ValueError, match="scoring protocol 'toy' is registered already"):
        PROTOCOLS.register("toy", TOY)


class WithoutRows:
    names = ("nothing",)

    def scores(self, total, count):
        return (0.0,)


class OneRowForAll(MeanMetric):
    names = ("one",)

    def rows(self, references, captions):
        return [1.0]


class TooFewScores(LengthRatio):
    names = ("short", "long")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (WithoutRows, "metric 'new' lacks rows"),
        (OneRowForAll, r"metric one: rows has shape \(1,\), expected \(4, numbers per caption\)"),
        (TooFewScores, "metric short, long: 1 scores, expected 2"),
        ("my_package.metrics:Spice", "metric 'new' cannot be loaded from my_package.metrics:Spice"),
    ],
)
def test_a_metric_that_does_not_keep_to_the_interface_is_refused(target, message, scorer):
    METRICS.register("new", target)
    protocol = ScoringProtocol(lower_case, ("new",))
    with pytest.raises(ValueError, match=message):
        CaptionScorer(scorer.references, protocol).score(CAPTIONS).scores()


@pytest.mark.parametrize(
    ("protocol", "message"),
    [
        (TOY._replace(metrics=("length_ratio",) * 2), "different names: length_ratio, length_rat"),
        (TOY._replace(metrics=(), derived={}), "different names: none"),
        (TOY._replace(selection="CIDEr"), "CIDEr is not one of the protocol's scores"),
    ],
)
def test_a_protocol_that_does_not_fit_together_is_refused(protocol, message):
    with pytest.raises(ValueError, match=message):
        CaptionScorer({"1": ["a"]}, protocol)


def test_a_protocol_without_a_tokenizer_is_refused():
    PROTOCOLS.register("incomplete", object())
    with pytest.raises(ValueError, match="scoring protocol 'incomplete' lacks tokenize, metrics"):
        SplitScorer({"1": ["a"]}, protocols=("incomplete",))
