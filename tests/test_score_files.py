"""`gt/eval_utils.py score`: the same scores as the evaluation's, intervals that hold what they promise, comparisons, refusals."""

import json
import random

import numpy as np
import pytest

from dataloaders.coco_files import coco_ground_truth
from gt import eval_utils
from gt.score_files import read_subsets
from modules.metrics.bootstrap import Statistics, bootstrap, interval, p_value
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import SCORE_NAMES, CaptionScorer
from system.java import ensure_java
from tests.test_scoring import sentences


@pytest.fixture(scope="module")
def scored() -> tuple[CaptionScorer, dict[str, str], dict[str, str]]:
    """References of 80 pairs, a system that often copies one, and one that does so less often."""
    ensure_java()
    draw = random.Random(1)
    truth = {str(n): sentences(draw, draw.randint(1, 4)) for n in range(80)}
    good, poor = (
        {
            key: draw.choice(texts) if draw.random() < share else sentences(draw, 1)[0]
            for key, texts in truth.items()
        }
        for share in (0.6, 0.2)
    )
    references = CaptionScorer(truth)
    tokens = [
        {
            key: texts[0]
            for key, texts in tokenize({key: [text] for key, text in system.items()}).items()
        }
        for system in (good, poor)
    ]
    return references, *tokens


def test_sums_over_pairs_give_the_metrics_own_scores(scored):
    references, good, _ = scored
    statistics = Statistics.of(references, good)
    assert statistics.scores(np.ones(80)) == pytest.approx(
        references.score_tokens(good)["all"], abs=1e-9
    )
    half = [str(n) for n in range(0, 80, 2)]
    ours = statistics.scores(np.array([float(key in half) for key in good]))
    theirs = references.score_tokens({key: good[key] for key in half})["all"]
    for name in set(SCORE_NAMES) - {"CIDEr"}:  # whose document frequencies stay those of all
        assert ours[name] == pytest.approx(theirs[name], abs=1e-9), name
    copied = {key: texts[0] for key, texts in references.tokens.items()}
    perfect = Statistics.of(references, copied)
    assert perfect.scores(np.ones(80)) == pytest.approx(
        references.score_tokens(copied)["all"], abs=1e-9
    )


def test_draws_are_seeded_and_shared(scored):
    references, good, poor = scored
    systems = [Statistics.of(references, tokens) for tokens in (good, poor, good)]
    first, second, same = bootstrap(systems, 200, seed=3)
    assert all(np.array_equal(first[name], same[name]) for name in SCORE_NAMES), (
        "the same system on the same draws"
    )
    again = bootstrap(systems[:1], 200, seed=3)[0]
    assert all(np.array_equal(first[name], again[name]) for name in SCORE_NAMES)
    assert not np.array_equal(first["CIDEr"], bootstrap(systems[:1], 200, seed=4)[0]["CIDEr"])
    assert p_value(first["CIDEr"] - second["CIDEr"]) < 0.05
    assert p_value(first["CIDEr"] - same["CIDEr"]) == 1
    with pytest.raises(ValueError, match="different pairs"):
        bootstrap([systems[0], Statistics.of(references, {"1": "a cube"})], 1, 0)


def test_the_interval_of_a_mean_is_that_of_theory(scored):
    """ROUGE-L is a mean: its bootstrap spread is the standard error."""
    references, good, _ = scored
    statistics = Statistics.of(references, good)
    drawn = bootstrap([statistics], 2000, seed=0)[0]["ROUGE_L"]
    assert drawn.std() == pytest.approx(statistics.means[:, 0].std() / 80**0.5, rel=0.1)
    low, high = interval(drawn)
    assert high - low == pytest.approx(2 * 1.96 * drawn.std(), rel=0.1)


@pytest.fixture
def files(tmp_path):
    """Ground truth and two result files in CLEVR-Change's naming, and types of the changes."""
    draw = random.Random(2)
    truth = {f"{n:06d}.png{kind}": sentences(draw, 3) for kind in ("", "_n") for n in range(12)}
    (tmp_path / "gt.json").write_text(json.dumps(coco_ground_truth(truth.items())))
    for name, share in (("good", 0.7), ("poor", 0.1)):
        rows = [
            {
                "image_id": key,
                "caption": draw.choice(texts) if draw.random() < share else sentences(draw, 1)[0],
            }
            for key, texts in truth.items()
        ]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "types.json").write_text(
        json.dumps(
            {
                "add": [f"{n:06d}.png" for n in range(6)],
                "drop": [f"{n:06d}.png" for n in range(6, 12)],
                "never": ["999999.png"],
            }
        )
    )
    return tmp_path


def score(files, *words: str) -> int:
    return eval_utils.main(["score", "--gt", str(files / "gt.json"), *map(str, words)])


def test_table_json_and_latex_say_the_same(files, capfd):
    words = [
        "--results",
        files / "good.json",
        files / "poor.json",
        "--type_mapping",
        files / "types.json",
        "--bootstrap",
        "100",
    ]
    assert score(files, *words, "--format", "json", "--output", files / "out.json") == 0
    report = json.loads((files / "out.json").read_text())
    assert "24 of the 24" not in capfd.readouterr().err
    assert report["ids"] == {"all": 24, "change": 12, "distractor": 12, "add": 6, "drop": 6}
    good, poor = report["systems"].values()
    assert list(good["scores"]) == list(report["ids"])
    for system in (good, poor):
        for group, scores in system["scores"].items():
            for name, value in scores.items():
                low, high = system["intervals"][group][name]
                assert low - 1e-9 <= high
                if group == "all":
                    assert low - 0.2 * value <= value <= high + 0.2 * value
    assert "against_first" not in good
    assert poor["against_first"]["all"]["CIDEr"]["interval"][1] < 0
    capfd.readouterr()
    assert score(files, *words) == 0
    table = capfd.readouterr().out
    assert (
        "fewer than 30 pairs, whose intervals say little: all, change, distractor, add, drop"
        in table
    )
    assert f"{good['scores']['add']['CIDEr']:.4f}" in table
    assert score(files, *words, "--format", "latex") == 0
    assert f"{100 * good['scores']['add']['CIDEr']:.1f}" in capfd.readouterr().out


def test_pairs_without_a_caption_are_told(files, capfd):
    rows = json.loads((files / "good.json").read_text())
    (files / "fewer.json").write_text(json.dumps(rows[:-2]))
    assert score(files, "--results", files / "fewer.json") == 0
    assert (
        f"22 of the 24 ids of {files / 'gt.json'} are captioned and scored"
        in capfd.readouterr().err
    )
    for draws in ("1", "-1"):
        with pytest.raises(SystemExit, match="2"):
            score(files, "--results", files / "good.json", "--bootstrap", draws)


def test_differences_in_the_last_digits_are_none():
    assert p_value(np.full(100, 1e-17)) == 1


def test_joined_references_are_one_sentence(files, capfd):
    scores = {}
    for way in ("each", "joined"):
        assert (
            score(
                files,
                "--results",
                files / "good.json",
                "--references",
                way,
                "--output",
                files / f"{way}.json",
            )
            == 0
        )
        scores[way] = json.loads((files / f"{way}.json").read_text())
    assert scores["each"]["references"] != scores["joined"]["references"]
    values = [
        next(iter(scores[way]["systems"].values()))["scores"]["all"]["ROUGE_L"]
        for way in ("each", "joined")
    ]
    assert values[0] > values[1]


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
    with pytest.raises(SystemExit) as exit_:
        score(files, "--results", files / "wrong.json")
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_other_ids_and_other_types_are_refused(files, capsys):
    rows = json.loads((files / "good.json").read_text())
    (files / "fewer.json").write_text(json.dumps(rows[:-1]))
    with pytest.raises(SystemExit):
        score(files, "--results", files / "good.json", files / "fewer.json")
    assert "other ids" in capsys.readouterr().err
    with pytest.raises(ValueError, match="none of the captioned ids"):
        read_subsets(files / "types.json", ["1.png"])
    assert read_subsets(None, ["1.png", "2.png"]) == {}
