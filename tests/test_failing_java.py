"""A Java that dies, hangs, babbles or is not there: scores that can be had are given, the others are missing, training goes on."""

import json
import logging
import math
import os
import re
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import CLIP4IDCinference
from dataloaders.coco_files import coco_ground_truth
from gt import eval_utils
from modules.evaluation.judge import CaptionJudge
from modules.metrics.bootstrap import Statistics, bootstrap, interval, p_value
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import SCORE_NAMES, CaptionScorer
from modules.training.progress import Progress
from system import java
from system.java import JavaError
from tests.conftest import make_spot
from tests.runs import words

# Both programs in their protocols; METEOR is .5. The file `fault` says what goes wrong at the next question, `starts` who started.
FAKE = """#!{python} -S
import os, sys, time
here = os.path.dirname(os.path.abspath(__file__))
fault = lambda: open(os.path.join(here, "fault")).read()
program = "meteor" if "-stdio" in sys.argv else "tokenizer"
if "-version" in sys.argv:
    sys.exit()
with open(os.path.join(here, "starts"), "a") as file:
    file.write(program + chr(10))

def die():
    sys.stderr.write("Picked up something\\nException in thread main: boom\\n\\tat Line.one\\n")
    sys.stderr.flush()
    os._exit(3)

if program == "tokenizer":
    lines = sys.stdin.read().lower().split("\\n")[:-1]
    if fault() == "tokenizer loses a line":
        lines = lines[:1] + lines[2:]
    sys.stdout.write("".join(line + "\\n" for line in lines))
    sys.stdout.flush()
    if fault() == "tokenizer hangs":
        time.sleep(60)
    if fault() == "tokenizer dies" or fault() == "tokenizer dies once" and open(os.path.join(here, "starts")).read().count("tok") == 1:
        die()
    sys.exit()
if fault() == "meteor does not start":
    die()
for line in sys.stdin:
    now = fault()
    if now == "meteor dies" or now == "meteor dies at the second corpus" and line.startswith("EVAL") and line.count("|||") == 1:
        die()
    if now == "meteor is killed":
        os.kill(os.getpid(), 9)
    if now == "meteor hangs":
        time.sleep(60)
    if now == "meteor chatters":
        sys.stderr.write("chatter " * 20000)
    if line.startswith("SCORE"):
        print("Error: no" if now == "meteor loses count" else " ".join(["1.0"] * 23), flush=True)
    else:
        print("\\n".join([{{"meteor writes commas": "0,5", "meteor divides by zero": "NaN"}}.get(now, "0.5")] * (line.count("|||") + 1)),
              flush=True)
"""
TRUTH = {
    "1": ["a red cube has gone", "the cube is gone"],
    "2": ["a blue ball appeared"],
    "3": ["nothing has changed"],
}
CAPTIONS = {"1": "a red cube is gone", "2": "a ball appeared", "3": "a red cube"}


class FakeJava:
    """A `java` on the PATH whose faults a test chooses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "java").write_text(FAKE.format(python=sys.executable))
        (folder / "java").chmod(0o755)
        self.fault("none")

    def fault(self, fault: str) -> None:
        (self.folder / "fault").write_text(fault)
        (self.folder / "starts").write_text("")

    def starts(self, program: str) -> int:
        """How often a program has been started since the fault was chosen."""
        return (self.folder / "starts").read_text().split().count(program)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> FakeJava:
    folder = tmp_path / "java"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    return FakeJava(folder)


@pytest.fixture(autouse=True)
def _a_deadlock_is_a_failure():
    def stop(*_):
        raise AssertionError("two minutes and no end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def missing(scores: dict[str, float]) -> list[str]:
    return [name for name, value in scores.items() if math.isnan(value)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("meteor does not start", "ended with 3: Exception in thread main: boom"),
        ("meteor dies", "ended with 3: Exception in thread main: boom"),
        ("meteor is killed", "ended with -9"),
        ("meteor hangs", "no answer within 1 s"),
        ("meteor writes commas", "nonsense: .*0,5"),
        ("meteor loses count", "nonsense: Error: no"),
        ("meteor divides by zero", "nonsense: nan"),
    ],
)
def test_meteor_alone_is_missing_and_is_back_in_the_next_evaluation(
    fault, reason, fake, caplog, monkeypatch
):
    references = CaptionScorer(TRUTH)
    if fault != "meteor does not start":
        assert references.score(CAPTIONS)["all"]["METEOR"] == 0.5
    fake.fault(fault)
    monkeypatch.setattr(java, "TIMEOUT", 1 if "hangs" in fault else 60)
    scores = references.score(CAPTIONS, {"first": ["1"], "second": ["2"]})
    assert [missing(group) for group in scores.values()] == [["METEOR"]] * 3
    assert fake.starts("meteor") <= 1, "tried once in an evaluation"
    warnings = [
        record.getMessage() for record in caplog.records if record.levelno == logging.WARNING
    ]
    assert len(warnings) == 1
    assert re.search(f"METEOR is missing: .*{reason}", warnings[0])
    fake.fault("none")
    sound = references.score(CAPTIONS, {"first": ["1"], "second": ["2"]})
    for name, group in sound.items():
        assert group == {**scores[name], "METEOR": 0.5}
    assert fake.starts("meteor") == 1


def test_a_java_that_is_gone_costs_its_scores_alone(fake, caplog, monkeypatch):
    references = CaptionScorer(TRUTH)
    tokens = {key: references.tokens[key][0] for key in TRUTH}
    monkeypatch.setenv("PATH", "/nowhere")
    assert missing(references.score_tokens(tokens)["all"]) == ["METEOR"]
    assert "does not start" in caplog.text
    assert missing(references.score(CAPTIONS)["all"]) == list(SCORE_NAMES)


def test_what_meteor_gave_before_it_died_is_kept(fake):
    references = CaptionScorer(TRUTH)
    fake.fault("meteor dies at the second corpus")
    scores = references.score(CAPTIONS, {"one": ["1"], "two": ["1", "2"]})
    assert {name: missing(group) for name, group in scores.items()} == {
        "all": [],
        "one": ["METEOR"],
        "two": ["METEOR"],
    }


def test_a_process_found_dead_is_started_anew_and_nothing_is_missing(fake, caplog):
    references = CaptionScorer(TRUTH)
    before = references.score(CAPTIONS)
    references.meteor.meteor_p.kill()
    references.meteor.meteor_p.wait()
    assert references.score(CAPTIONS) == before
    assert "has ended since it was last asked" in caplog.text


def test_complaints_do_not_fill_the_pipe(fake, monkeypatch):
    monkeypatch.setattr(java, "TIMEOUT", 20)
    fake.fault("meteor chatters")
    assert CaptionScorer(TRUTH).score(CAPTIONS)["all"]["METEOR"] == 0.5


def test_meteors_process_ends_with_its_references(fake):
    references = CaptionScorer(TRUTH)
    references.score(CAPTIONS)
    process = references.meteor.meteor_p
    del references
    assert process.poll() is not None


def test_a_failure_leaves_no_lock_that_the_end_would_wait_for(fake):
    references = CaptionScorer(TRUTH)
    fake.fault("meteor dies")
    references.score(CAPTIONS)
    end = threading.Thread(target=references.meteor.__del__, daemon=True)
    end.start()
    end.join(10)
    assert not end.is_alive()


def test_a_tokeniser_that_dies_once_is_run_again(fake, capfd):
    fake.fault("tokenizer dies once")
    assert tokenize(TRUTH)["1"] == TRUTH["1"]
    assert fake.starts("tokenizer") == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("tokenizer dies", "ended with 3 after 4 of 4 captions: Exception in thread main: boom"),
        ("tokenizer hangs", "timed out after 0.3 s"),
        ("tokenizer loses a line", "ended with 0 after 3 of 4 captions"),
    ],
)
def test_without_tokens_all_scores_are_missing(fault, reason, fake, caplog, monkeypatch):
    references = CaptionScorer(TRUTH)
    fake.fault(fault)
    monkeypatch.setattr(java, "TIMEOUT", 0.3 if "hangs" in fault else 60)
    with pytest.raises(JavaError, match=reason):
        tokenize(TRUTH)
    assert fake.starts("tokenizer") == 2
    scores = references.score(CAPTIONS, {"first": ["1"], "absent": ["9"]})
    assert {name: missing(group) for name, group in scores.items()} == {
        "all": list(SCORE_NAMES),
        "first": list(SCORE_NAMES),
    }
    assert (
        f"all caption scores are missing: the PTB tokeniser {'does not run' if 'hangs' in fault else 'ended'}"
        in caplog.text
    )
    assert all(map(math.isnan, references.cider_by_id(CAPTIONS).values()))
    fake.fault("none")
    assert not missing(references.score(CAPTIONS)["all"]), (
        "the ground truth is tokenised when it can be"
    )


def test_baselines_are_scored_again_where_they_are_missing(fake, caplog):
    judge = CaptionJudge(TRUTH, ["a red cube", "nothing has changed"])
    fake.fault("tokenizer dies")
    judge.score(CAPTIONS)
    assert judge.baselines == []
    assert "the baselines are missing" in caplog.text
    fake.fault("meteor dies")
    judge.score(CAPTIONS)
    assert [missing(scores) for _, scores in judge.baselines] == [["METEOR"]] * 2
    fake.fault("none")
    judge.score(CAPTIONS)
    assert [missing(scores) for _, scores in judge.baselines] == [[]] * 2


def test_a_missing_score_is_neither_the_best_nor_an_epoch_without_a_better_one():
    progress = Progress()
    assert [progress.record_score(score) for score in (math.nan, 0.5, math.nan, 0.4)] == [
        False,
        True,
        False,
        False,
    ]
    assert progress == Progress(epoch=4, best_score=0.5, best_epoch=1, epochs_without=1)


def strict_json(path: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def train(tmp_path: Path, sizes: Path, epochs: int, at_scoring) -> tuple[Path, str]:
    """A tiny run of stage 2 that calls `at_scoring(number, folder)` where the captions of its evaluations come to be scored."""
    spot, run, calls = (
        make_spot(tmp_path / "spot", {"train": 8, "val": 1, "test": 5}),
        tmp_path / "run",
        [],
    )
    judged = CaptionJudge.score

    def score(judge, captions):
        calls.append(captions)
        at_scoring(len(calls) - 1, run)
        return judged(judge, captions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CaptionJudge, "score", score)
        assert (
            CLIP4IDCinference.main(
                words(spot, run, sizes, "caption", "--do_train", "--epochs", str(epochs))
            )
            == 0
        )
    return run, (run / "log.txt").read_text()


def test_training_goes_on_without_meteor_and_has_it_again(fake, tiny_sizes, tmp_path):
    run, log = train(
        tmp_path,
        tiny_sizes,
        2,
        lambda number, _: fake.fault("none" if number else "meteor is killed"),
    )
    history = pd.read_csv(run / "history.csv")
    assert history["METEOR"].isna().tolist() == [True, False]
    assert not history.drop(columns="METEOR").isna().any(axis=None)
    assert "METEOR is missing: its Java process ended with -9" in log
    assert re.search(r"all .* missing ", log)
    assert strict_json(run / "metrics.json")["METEOR"] == 0.5


def test_training_goes_on_without_any_score(fake, tiny_sizes, tmp_path):
    """In the first epoch and at last; the second epoch scores and so is the best."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, log = train(
        tmp_path,
        tiny_sizes,
        3,
        lambda number, _: fake.fault("none" if number in (1, 2) else "tokenizer dies"),
    )
    history = pd.read_csv(run / "history.csv")
    assert history["CIDEr"].isna().tolist() == [True, False, False]
    assert not history["loss"].isna().any()
    assert "epoch 0: not judged, because the score that chooses the epoch is missing" in log
    assert (run / "pytorch_model.bin.best").resolve().name != "pytorch_model.bin.0"
    metrics = strict_json(run / "metrics.json")
    assert [metrics[name] for name in SCORE_NAMES] == [None] * 7
    page = (run / "report.html").read_text()
    assert page.count("<td>missing</td>") == 7
    assert "CIDEr missing" in page
    assert "all: the first" in page
    assert "nan" not in page.split("data:image")[0]
    assert page.count("<polyline") == 2
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [len(board.Scalars(f"epoch/{name}")) for name in ("loss", "CIDEr")] == [3, 2]


def test_captions_are_on_the_disk_before_they_are_scored(fake, tiny_sizes, tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: (synced.append(os.fstat(handle).st_ino), sync(handle))
    )

    def look(number: int, run: Path) -> None:
        file = run / f"hyp_ep_{('0', 'eval')[number]}.json"
        assert len(json.loads(file.read_text())) == 5
        assert file.stat().st_ino in synced
        seen.append(number)

    seen: list[int] = []
    train(tmp_path, tiny_sizes, 1, look)
    assert seen == [0, 1]


def test_files_are_scored_without_meteor(fake, tmp_path, capsys):
    """Table, JSON and LaTeX say that it is missing, and give what is there with its intervals."""
    (tmp_path / "gt.json").write_text(json.dumps(coco_ground_truth(TRUTH.items())))
    for name, captions in (("one", CAPTIONS), ("two", dict.fromkeys(CAPTIONS, "a red cube"))):
        (tmp_path / f"{name}.json").write_text(
            json.dumps([{"image_id": key, "caption": text} for key, text in captions.items()])
        )
    fake.fault("meteor dies")
    printed = {}
    for form in ("table", "json", "latex"):
        assert (
            eval_utils.main(
                [
                    "score",
                    "--gt",
                    str(tmp_path / "gt.json"),
                    "--results",
                    str(tmp_path / "one.json"),
                    str(tmp_path / "two.json"),
                    "--bootstrap",
                    "100",
                    "--format",
                    form,
                    "--output",
                    str(tmp_path / "out.json"),
                ]
            )
            == 0
        )
        printed[form] = capsys.readouterr().out
    assert (
        printed["table"].count("missing") == 2 + 2 + 2
    )  # scores, intervals, the difference's interval and p
    assert printed["latex"].count("& missing &") == 2
    assert not any("nan" in text.lower() for text in printed.values())
    report = strict_json(tmp_path / "out.json")
    assert report == json.loads(printed["json"])
    two = report["systems"][str(tmp_path / "two.json")]
    assert two["scores"]["all"]["METEOR"] is None
    assert two["intervals"]["all"]["METEOR"] == [None, None]
    assert two["against_first"]["all"]["METEOR"] == {"interval": [None, None], "p": None}
    assert two["intervals"]["all"]["CIDEr"][1] > 0


def test_a_meteor_that_dies_among_the_draws_has_no_interval(fake):
    references = CaptionScorer(TRUTH)
    statistics = Statistics.of(
        references, {key: texts[0] for key, texts in references.tokens.items()}
    )
    fake.fault("meteor dies")
    drawn = bootstrap([statistics], 100, seed=0)[0]
    assert fake.starts("meteor") == 0, "it is not asked again at each draw"
    assert np.isnan(interval(drawn["METEOR"])).all()
    assert math.isnan(p_value(drawn["METEOR"]))
    assert not np.isnan(interval(drawn["CIDEr"])).any()
