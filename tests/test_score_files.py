"""`gt/eval_utils.py score`: the evaluation's scores, correct intervals, comparisons, refusals."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from dataloaders.coco_files import coco_ground_truth
from gt import eval_utils, score_files
from gt.score_files import choose_subsets, label_systems
from modules.metrics.bootstrap import bootstrap, interval, p_value
from modules.metrics.coco import COCO_PROTOCOL
from modules.metrics.metric import ScoringProtocol
from modules.metrics.scorer import CaptionScorer, ScoredCaptions
from modules.registries import PROTOCOLS
from system.java import ensure_java
from tests.test_scoring import NAMES, sentences

# Needs no Java.
ROUGE = ScoringProtocol(lambda texts, _: dict(texts), ("rouge_l",))


@pytest.fixture(scope="module")
def systems() -> list[ScoredCaptions]:
    """A system that often copies a reference, and one that does so less often, of 80 pairs."""
    ensure_java()
    source = random.Random(1)
    references = {str(n): sentences(source, source.randint(1, 4)) for n in range(80)}
    captions = []
    for share in (0.6, 0.2):
        captions.append(partly_copied(references, share, source))
    scorer = CaptionScorer(references, COCO_PROTOCOL)
    return [scorer.score_tokens(tokens) for tokens in scorer.tokenize(*captions)]


def partly_copied(
    references: dict[str, list[str]], share: float, source: random.Random
) -> dict[str, str]:
    """Captions of which that share are references."""
    captions = {}
    for key, texts in references.items():
        copied = source.choice(texts) if source.random() < share else None
        captions[key] = copied or sentences(source, 1)[0]
    return captions


def test_weighted_sums_of_rows_give_the_scores_of_those_captions(systems):
    good, _ = systems
    whole = good.groups()["all"]
    assert whole.scores(np.ones(80)) == pytest.approx(whole.scores(), abs=1e-9)
    half = [str(n) for n in range(0, 80, 2)]
    weights = np.array([float(key in half) for key in whole.ids])
    weighted, alone = whole.scores(weights), good.scores({"half": half})["half"]
    for name in set(NAMES) - {"CIDEr"}:  # whose document frequencies stay those of all
        assert weighted[name] == pytest.approx(alone[name], abs=1e-9), name
    assert weighted["CIDEr"] != pytest.approx(alone["CIDEr"], abs=1e-3)


def test_copied_references_are_perfect_in_every_draw(systems):
    scorer = systems[0].scorer
    copied = {key: texts[0] for key, texts in scorer.reference_tokens.items()}
    drawn = bootstrap([scorer.score_tokens(copied).groups()["all"]], 20, seed=0)[0]
    assert drawn["Bleu_4"] == pytest.approx(np.ones(20), abs=1e-6)
    assert drawn["METEOR"] == pytest.approx(np.ones(20))
    assert drawn["ROUGE_L"] == pytest.approx(np.ones(20))


def test_draws_are_seeded_and_shared(systems):
    good, poor = (system.groups()["all"] for system in systems)
    first, second, same = bootstrap([good, poor, good], 200, seed=3)
    again, other = bootstrap([good], 200, seed=3)[0], bootstrap([good], 200, seed=4)[0]
    for name in NAMES:
        assert np.array_equal(first[name], same[name]), "the same system on the same draws"
        assert np.array_equal(first[name], again[name])
        assert not np.array_equal(first[name], other[name])
    assert p_value(first["CIDEr"] - second["CIDEr"]) < 0.05
    assert p_value(first["CIDEr"] - same["CIDEr"]) == 1
    one = systems[0].scorer.score_tokens({"1": "a cube"}).groups()["all"]
    with pytest.raises(ValueError, match="different pairs"):
        bootstrap([good, one], 1, 0)


def test_the_interval_of_a_mean_is_that_of_theory(systems):
    """ROUGE-L is a mean: its bootstrap spread is the standard error."""
    good, _ = systems
    scorer = CaptionScorer(good.scorer.reference_tokens, ROUGE)
    whole = scorer.score(good.tokens).whole
    drawn = bootstrap([whole], 2000, seed=0)[0]["ROUGE_L"]
    deviation = np.std(list(whole.scores_by_id("ROUGE_L").values()))
    assert drawn.std() == pytest.approx(deviation / 80**0.5, rel=0.1)
    low, high = interval(drawn)
    assert high - low == pytest.approx(2 * 1.96 * drawn.std(), rel=0.1)


def test_differences_of_rounding_errors_are_none():
    assert p_value(np.full(100, 1e-17)) == 1


@pytest.fixture
def files(tmp_path) -> Path:
    """Ground truth and two result files in CLEVR-Change's naming, and types of the changes."""
    source = random.Random(2)
    ids = [f"{n:06d}.png" for n in range(12)]
    references = {key: sentences(source, 3) for key in [*ids, *(f"{key}_n" for key in ids)]}
    write(tmp_path / "gt.json", coco_ground_truth(references.items()))
    for name, share in (("good", 0.7), ("poor", 0.1)):
        captions = partly_copied(references, share, source)
        rows = [{"image_id": key, "caption": text} for key, text in captions.items()]
        write(tmp_path / f"{name}.json", rows)
    write(tmp_path / "types.json", {"add": ids[:6], "drop": ids[6:], "never": ["999999.png"]})
    return tmp_path


def write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))


def read(path: Path):
    return json.loads(path.read_text())


def score(files: Path, *words: object) -> int:
    return eval_utils.main(["score", "--gt", str(files / "gt.json"), *map(str, words)])


def test_table_json_and_latex_say_the_same(files, capfd, monkeypatch):
    """All three of one report, which is computed once."""
    reports, compute = [], score_files.score_files

    def once(args):
        reports[:] = reports or [compute(args)]
        return reports[0]

    monkeypatch.setattr(score_files, "score_files", once)
    both = ["--results", files / "good.json", files / "poor.json"]
    words = [*both, "--type_mapping", files / "types.json", "--bootstrap", "100"]
    assert score(files, *words, "--format", "json", "--output", files / "out.json") == 0
    printed = capfd.readouterr()
    report = read(files / "out.json")
    assert report == json.loads(printed.out)
    assert "24 of the 24" not in printed.err
    assert report["ids"] == {"all": 24, "change": 12, "distractor": 12, "add": 6, "drop": 6}
    assert report["bootstrap"] == {"draws": 100, "seed": 0, "level": 0.95}
    good, poor = report["systems"].values()
    for system in (good, poor):
        check_intervals(system, list(report["ids"]))
    assert "against_first" not in good
    assert poor["against_first"]["all"]["CIDEr"]["interval"][1] < 0
    assert score(files, *words) == 0
    table = capfd.readouterr().out
    few = (
        "fewer than 30 captions, so their intervals say little: all, change, distractor, add, drop"
    )
    assert few in table
    assert f"{good['scores']['add']['CIDEr']:.4f}" in table
    assert score(files, *words, "--format", "latex") == 0
    assert f"{100 * good['scores']['add']['CIDEr']:.1f}" in capfd.readouterr().out


def check_intervals(system: dict, groups: list[str]) -> None:
    """There is one for each score, and those of all captions lie around it."""
    assert list(system["scores"]) == list(system["intervals"]) == groups
    for group, scores in system["scores"].items():
        assert list(scores) == list(system["intervals"][group]) == NAMES
        for low, high in system["intervals"][group].values():
            assert low - 1e-9 <= high
    for name, value in system["scores"]["all"].items():
        low, high = system["intervals"]["all"][name]
        assert low - 0.2 * value <= value <= high + 0.2 * value


@pytest.fixture
def without_java(monkeypatch) -> list[str]:
    """Options for scores that need no Java."""
    monkeypatch.setattr(PROTOCOLS, "targets", dict(PROTOCOLS.targets))
    PROTOCOLS.register("rouge", ROUGE)
    return ["--protocol", "rouge"]


def test_only_captioned_pairs_are_scored_and_their_number_is_said(files, without_java, capfd):
    write(files / "fewer.json", read(files / "good.json")[:-2])
    assert score(files, "--results", files / "fewer.json", *without_java) == 0
    said = f"22 of the 24 ids of {files / 'gt.json'} have captions and are scored"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize("draws", ["1", "-1"])
def test_too_few_draws_are_refused(draws, files):
    with pytest.raises(SystemExit, match="2"):
        score(files, "--results", files / "good.json", "--bootstrap", draws)


def test_joined_references_are_one_sentence(files, without_java):
    values = {}
    for way in ("each", "joined"):
        output = files / f"{way}.json"
        words = ["--results", files / "good.json", "--references", way, "--output", output]
        assert score(files, *words, *without_java) == 0
        report = read(output)
        (system,) = report["systems"].values()
        values[report["references"]] = system["scores"]["all"]["ROUGE_L"]
    each, joined = values.values()
    assert each > joined


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "no captions"),
        ("{}", "expected a list"),
        ('[{"image_id": "000000.png"}]', "result 0"),
        ("[1]", "result 0"),
        ('[{"image_id": "x", "caption": "a"}, {"image_id": "x", "caption": "b"}]', "two captions"),
        ('[{"image_id": "elsewhere", "caption": "a"}]', "elsewhere"),
    ],
)
def test_wrong_result_files_are_one_line(content, message, files, capsys):
    (files / "wrong.json").write_text(content)
    with pytest.raises(SystemExit, match="2"):
        score(files, "--results", files / "wrong.json")
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_files_with_other_ids_are_refused(files, capsys):
    write(files / "fewer.json", read(files / "good.json")[:-1])
    with pytest.raises(SystemExit, match="2"):
        score(files, "--results", files / "good.json", files / "fewer.json")
    assert "other ids" in capsys.readouterr().err


def test_types_of_other_ids_are_refused(files):
    with pytest.raises(ValueError, match="none of the captioned ids"):
        choose_subsets(["1.png"], ["1.png"], files / "types.json")
    assert choose_subsets(["1.png", "2.png"], ["1.png", "2.png"], None) == {}


def test_only_ids_beside_their_pairs_are_distractors():
    ids = ["1", "1_n", "photo_n"]
    subsets = {"change": ["1", "photo_n"], "distractor": ["1_n"]}
    assert choose_subsets(ids, ids, None) == subsets
    assert choose_subsets(["photo_n"], ids, None) == {}
    assert choose_subsets(["1_n"], ids, None) == {"distractor": ["1_n"]}


@pytest.mark.parametrize(
    ("paths", "labels"),
    [
        (["runs/a/hyp.json"], ["hyp"]),
        (["runs/a/good.json", "poor.json"], ["good", "poor"]),
        (["runs/a/hyp.json", "runs/b/hyp.json"], ["a/hyp", "b/hyp"]),
        (["hyp.json", "runs/b/hyp.json"], ["hyp", "b/hyp"]),
        (["hyp.json", "hyp.txt"], ["hyp.json", "hyp.txt"]),
    ],
)
def test_systems_in_latex_are_told_apart(paths, labels):
    assert label_systems(paths) == labels
