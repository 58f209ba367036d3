"""Java that crashes, hangs, answers nonsense or is absent: what can be scored is, training goes on.

Only the handling of Java is tested, with a stand-in `java`. METEOR is .5 there.
"""

import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import CLIP4IDCinference
from dataloaders.coco_files import coco_ground_truth
from gt import eval_utils
from modules.evaluation.split_scorer import SplitScorer
from modules.metrics import meteor
from modules.metrics.bootstrap import bootstrap, interval, p_value
from modules.metrics.coco import COCO_PROTOCOL
from modules.metrics.metric import ScoringContext
from modules.metrics.ptb import tokenize
from modules.metrics.scorer import CaptionScorer
from modules.training.progress import Progress
from system import java
from system.java import JavaError
from tests.conftest import make_spot
from tests.runs import arguments
from tests.test_scoring import NAMES

# Both programs with their protocols. The file `fault` says what goes wrong at the next question,
# `starts` which programs were started.
STAND_IN = """#!{python} -S
import os, sys, time

here = os.path.dirname(os.path.abspath(__file__))
program = "meteor" if "-stdio" in sys.argv else "tokenizer"


def fault():
    return open(os.path.join(here, "fault")).read()


def starts():
    return open(os.path.join(here, "starts")).read().split().count(program)


def crash():
    sys.stderr.write("Picked up something\\nException in thread main: boom\\n\\tat Line.one\\n")
    sys.stderr.flush()
    os._exit(3)


def tokenize():
    lines = sys.stdin.read().lower().split("\\n")[:-1]
    if fault() == "tokenizer loses a line":
        lines = lines[:1] + lines[2:]
    sys.stdout.write("".join(line + "\\n" for line in lines))
    sys.stdout.flush()
    if fault() == "tokenizer hangs":
        time.sleep(60)
    if fault() == "tokenizer crashes" or fault() == "tokenizer crashes once" and starts() == 1:
        crash()


def answer(line):
    now = fault()
    if now == "meteor crashes" or now == "meteor crashes at a score" and line.startswith("EVAL"):
        crash()
    if now == "meteor is killed":
        os.kill(os.getpid(), 9)
    if now == "meteor hangs":
        time.sleep(60)
    if now == "meteor chatters":
        sys.stderr.write("chatter " * 20000)
    if line.startswith("SCORE"):
        return "Error: no" if now == "meteor loses count" else " ".join(["1.0"] * 23)
    score = {{"meteor writes commas": "0,5", "meteor divides by zero": "NaN"}}.get(now, "0.5")
    return score + "\\n" + score


if "-version" in sys.argv:
    sys.exit()
with open(os.path.join(here, "starts"), "a") as file:
    file.write(program + "\\n")
if program == "tokenizer":
    tokenize()
    sys.exit()
if fault() == "meteor does not start":
    crash()
for line in sys.stdin:
    print(answer(line), flush=True)
"""
REFERENCES = {
    "1": ["a red cube has gone", "the cube is gone"],
    "2": ["a blue ball appeared"],
    "3": ["nothing has changed"],
}
CAPTIONS = {"1": "a red cube is gone", "2": "a ball appeared", "3": "a red cube"}
SUBSETS = {"first": ["1", "2"], "second": ["2", "3"]}


class StandInJava:
    """A `java` on the PATH whose faults a test chooses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "java").write_text(STAND_IN.format(python=sys.executable))
        (folder / "java").chmod(0o755)
        self.set_fault("none")

    def set_fault(self, fault: str) -> None:
        (self.folder / "fault").write_text(fault)
        (self.folder / "starts").write_text("")

    def starts(self, program: str) -> int:
        """How often a program was started since the fault was chosen."""
        return (self.folder / "starts").read_text().split().count(program)


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> StandInJava:
    folder = tmp_path / "java"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder) + os.pathsep + os.environ["PATH"])
    monkeypatch.setattr(meteor, "open_table", lambda path: None)  # nobody reads it
    return StandInJava(folder)


@pytest.fixture(autouse=True)
def _a_deadlock_is_a_failure():
    def stop(*_):
        raise AssertionError("no end after two minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def new_scorer() -> CaptionScorer:
    return CaptionScorer(REFERENCES, COCO_PROTOCOL)


def process_of(scorer: CaptionScorer) -> subprocess.Popen:
    """METEOR's process."""
    return scorer.metrics[1].process.process


def missing(scores: dict[str, float]) -> list[str]:
    return [name for name, value in scores.items() if math.isnan(value)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("meteor does not start", "ended with 3: Exception in thread main: boom"),
        ("meteor crashes", "ended with 3: Exception in thread main: boom"),
        ("meteor is killed", "ended with -9"),
        ("meteor hangs", "no answer within 1 s"),
        ("meteor writes commas", "malformed: .*0,5"),
        ("meteor loses count", "malformed: Error: no"),
        ("meteor divides by zero", "malformed: nan"),
    ],
)
def test_meteor_alone_is_missing_and_is_back_in_the_next_evaluation(
    fault, reason, stand_in, caplog, monkeypatch
):
    scorer = new_scorer()
    if fault != "meteor does not start":
        assert scorer.score(CAPTIONS).scores()["all"]["METEOR"] == 0.5
    stand_in.set_fault(fault)
    monkeypatch.setattr(java, "TIMEOUT", 1 if "hangs" in fault else 60)
    scores = scorer.score(CAPTIONS).scores(SUBSETS)
    assert [missing(group) for group in scores.values()] == [["METEOR"]] * 3
    assert stand_in.starts("meteor") <= 1, "tried once in an evaluation"
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    (message,) = [record.getMessage() for record in warnings]
    assert re.search(f"METEOR is missing: .*{reason}", message)
    stand_in.set_fault("none")
    intact = scorer.score(CAPTIONS).scores(SUBSETS)
    for name, group in intact.items():
        assert group == {**scores[name], "METEOR": 0.5}
    assert stand_in.starts("meteor") == 1


def test_without_java_the_other_scores_of_tokenized_captions_are_there(
    stand_in, caplog, monkeypatch
):
    scorer = new_scorer()
    (tokens,) = scorer.tokenize(CAPTIONS)
    monkeypatch.setenv("PATH", "/nowhere")
    assert missing(scorer.score_tokens(tokens).scores()["all"]) == ["METEOR"]
    assert "does not start" in caplog.text
    assert missing(scorer.score(CAPTIONS).scores()["all"]) == NAMES


def test_scores_before_a_crash_are_kept(stand_in):
    groups = new_scorer().score(CAPTIONS).groups(SUBSETS)
    assert groups["all"].scores()["METEOR"] == 0.5
    stand_in.set_fault("meteor crashes at a score")
    assert missing(groups["first"].scores()) == ["METEOR"]
    stand_in.set_fault("none")
    assert missing(groups["second"].scores()) == ["METEOR"], "not asked again in this evaluation"
    assert stand_in.starts("meteor") == 0


def test_a_process_found_dead_is_started_again_and_nothing_is_missing(stand_in, caplog):
    scorer = new_scorer()
    before = scorer.score(CAPTIONS).scores()
    process_of(scorer).kill()
    process_of(scorer).wait()
    assert scorer.score(CAPTIONS).scores() == before
    assert "has ended and is started again" in caplog.text


def test_messages_do_not_fill_the_pipe(stand_in, monkeypatch):
    monkeypatch.setattr(java, "TIMEOUT", 20)
    stand_in.set_fault("meteor chatters")
    assert new_scorer().score(CAPTIONS).scores()["all"]["METEOR"] == 0.5


def test_meteors_process_ends_with_its_scorer(stand_in):
    scorer = new_scorer()
    scorer.score(CAPTIONS).scores()
    process = process_of(scorer)
    assert process.poll() is None
    del scorer
    assert process.poll() is not None


def test_after_a_failure_the_end_waits_for_nothing(stand_in):
    scorer = new_scorer()
    stand_in.set_fault("meteor crashes")
    scorer.score(CAPTIONS).scores()
    end = threading.Thread(target=scorer.metrics[1].process.__del__, daemon=True)
    end.start()
    end.join(10)
    assert not end.is_alive()


def test_another_collector_is_not_asked_for_where_the_user_chose_one(stand_in, monkeypatch):
    """Java refuses to start with two of them."""
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-XX:+UseG1GC")
    chosen = new_scorer()
    chosen.score(CAPTIONS).scores()
    assert meteor.COLLECTOR not in process_of(chosen).args
    monkeypatch.delenv("JAVA_TOOL_OPTIONS")
    free = new_scorer()
    free.score(CAPTIONS).scores()
    assert meteor.COLLECTOR in process_of(free).args


def test_a_tokenizer_that_crashes_once_is_run_again(stand_in, capfd):
    stand_in.set_fault("tokenizer crashes once")
    assert tokenize(REFERENCES)["1"] == REFERENCES["1"]
    assert stand_in.starts("tokenizer") == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("tokenizer crashes", "ended with 3 after 4 of 4 captions: Exception in thread main: boom"),
        ("tokenizer hangs", "does not run: .* timed out after 0.3 s"),
        ("tokenizer loses a line", "ended with 0 after 3 of 4 captions"),
    ],
)
def test_without_tokens_all_scores_are_missing(fault, reason, stand_in, caplog, monkeypatch):
    stand_in.set_fault(fault)
    monkeypatch.setattr(java, "TIMEOUT", 0.3 if "hangs" in fault else 60)
    with pytest.raises(JavaError, match=reason):
        tokenize(REFERENCES)
    assert stand_in.starts("tokenizer") == 2
    scorer = new_scorer()
    scored = scorer.score(CAPTIONS)
    scores = scored.scores({"first": ["1"], "absent": ["9"]})
    assert {name: missing(group) for name, group in scores.items()} == dict.fromkeys(
        ("all", "first"), NAMES
    )
    assert "all caption scores are missing: the PTB tokenizer" in caplog.text
    assert all(map(math.isnan, scored.whole.scores_by_id("CIDEr").values()))
    stand_in.set_fault("none")
    assert not missing(scorer.score(CAPTIONS).scores()["all"]), (
        "references are tokenized when possible"
    )


def test_missing_baselines_are_scored_again(stand_in, caplog):
    context = ScoringContext(train_captions=["a red cube", "nothing has changed"])
    scorer = SplitScorer(REFERENCES, context)
    stand_in.set_fault("tokenizer crashes")
    scorer.score(CAPTIONS)
    assert scorer.baselines == []
    assert "the baselines are missing" in caplog.text
    stand_in.set_fault("meteor crashes")
    scorer.score(CAPTIONS)
    assert [missing(scores) for _, scores in scorer.baselines] == [["METEOR"]] * 2
    assert stand_in.starts("meteor") == 1, "for captions and baselines together"
    stand_in.set_fault("none")
    scorer.score(CAPTIONS)
    assert [missing(scores) for _, scores in scorer.baselines] == [[]] * 2
    assert stand_in.starts("meteor") == stand_in.starts("tokenizer") == 1


def test_a_missing_score_is_neither_the_best_nor_an_epoch_without_a_better_one():
    progress = Progress()
    is_best = [progress.record_score(score) for score in (math.nan, 0.5, math.nan, 0.4)]
    assert is_best == [False, True, False, False]
    assert progress == Progress(epoch=4, best_score=0.5, best_epoch=1, epochs_without=1)


def strict_json(path: Path) -> dict:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def train(
    folder: Path, sizes: Path, epochs: int, before_scoring: Callable[[int, Path], None]
) -> tuple[Path, str]:
    """A tiny finetuning; `before_scoring(number, run's folder)` is called in each evaluation.

    Returns the run's folder and its log.
    """
    spot = make_spot(folder / "spot", {"train": 8, "val": 1, "test": 5})
    run, original_score, calls = folder / "run", SplitScorer.score, []

    def score(scorer, captions):
        calls.append(captions)
        before_scoring(len(calls) - 1, run)
        return original_score(scorer, captions)

    options = arguments(spot, run, sizes, "caption", "--do_train", "--epochs", str(epochs))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SplitScorer, "score", score)
        assert CLIP4IDCinference.main(options) == 0
    return run, (run / "log.txt").read_text()


def test_training_goes_on_without_meteor_and_has_it_again(
    stand_in, tiny_sizes, tmp_path, monkeypatch
):
    """All captions are on the disk before they are scored."""
    synced, fsync = [], os.fsync

    def record(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        fsync(handle)

    seen: list[int] = []

    def before_scoring(number: int, run: Path) -> None:
        file = run / f"hyp_ep_{('0', '1', 'eval')[number]}.json"
        assert len(json.loads(file.read_text())) == 5
        assert file.stat().st_ino in synced
        seen.append(number)
        stand_in.set_fault("none" if number else "meteor is killed")

    monkeypatch.setattr(os, "fsync", record)
    run, log = train(tmp_path, tiny_sizes, 2, before_scoring)
    assert seen == [0, 1, 2]
    history = pd.read_csv(run / "history.csv")
    assert history["METEOR"].isna().tolist() == [True, False]
    assert not history.drop(columns="METEOR").isna().any(axis=None)
    assert "METEOR is missing: its Java process ended with -9" in log
    assert re.search(r"all .* missing ", log)
    assert strict_json(run / "metrics.json")["METEOR"] == 0.5


def test_training_goes_on_without_any_score(stand_in, tiny_sizes, tmp_path):
    """In the first epoch and at the end; the second epoch has scores and so is the best."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def before_scoring(number: int, _: Path) -> None:
        stand_in.set_fault("none" if number in (1, 2) else "tokenizer crashes")

    run, log = train(tmp_path, tiny_sizes, 3, before_scoring)
    history = pd.read_csv(run / "history.csv")
    assert history["CIDEr"].isna().tolist() == [True, False, False]
    assert not history["loss"].isna().any()
    assert "epoch 1/3 (pytorch_model.bin.0): not compared: the score that selects" in log
    assert (run / "pytorch_model.bin.best").resolve().name != "pytorch_model.bin.0"
    metrics = strict_json(run / "metrics.json")
    assert [metrics[name] for name in NAMES] == [None] * 7
    page = (run / "report.html").read_text()
    assert page.count("<td>missing</td>") == 7
    assert "CIDEr missing" in page
    assert "all: first pairs" in page
    assert "nan" not in page.split("data:image")[0]
    assert page.count("<polyline") == 2
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [len(board.Scalars(f"epoch/{name}")) for name in ("loss", "CIDEr")] == [3, 2]


def test_files_are_scored_without_meteor(stand_in, tmp_path, capsys):
    """Table, JSON and LaTeX say that it is missing, and show the rest with its intervals."""
    paths = {name: tmp_path / f"{name}.json" for name in ("gt", "one", "two", "out")}
    paths["gt"].write_text(json.dumps(coco_ground_truth(REFERENCES.items())))
    for name, captions in (("one", CAPTIONS), ("two", dict.fromkeys(CAPTIONS, "a red cube"))):
        rows = [{"image_id": key, "caption": text} for key, text in captions.items()]
        paths[name].write_text(json.dumps(rows))
    results = ["--results", str(paths["one"]), str(paths["two"]), "--bootstrap", "100"]
    options = ["score", "--gt", str(paths["gt"]), *results, "--output", str(paths["out"])]
    stand_in.set_fault("meteor crashes")
    printed = {}
    for form in ("table", "json", "latex"):
        assert eval_utils.main([*options, "--format", form]) == 0
        printed[form] = capsys.readouterr().out
    # Two systems' scores and intervals, the difference's interval and its p.
    assert printed["table"].count("missing") == 2 + 2 + 2
    assert printed["latex"].count("& missing &") == 2
    assert not any("nan" in text.lower() for text in printed.values())
    report = strict_json(paths["out"])
    assert report == json.loads(printed["json"])
    two = report["systems"][str(paths["two"])]
    assert two["scores"]["all"]["METEOR"] is None
    assert two["intervals"]["all"]["METEOR"] == [None, None]
    assert two["against_first"]["all"]["METEOR"] == {"interval": [None, None], "p": None}
    assert two["intervals"]["all"]["CIDEr"][1] > 0


def test_a_meteor_that_crashes_during_the_draws_has_no_interval(stand_in):
    whole = new_scorer().score({key: texts[0] for key, texts in REFERENCES.items()}).whole
    stand_in.set_fault("meteor crashes")
    drawn = bootstrap([whole], 100, seed=0)[0]
    assert stand_in.starts("meteor") == 0, "it is not asked again at each draw"
    assert np.isnan(interval(drawn["METEOR"])).all()
    assert math.isnan(p_value(drawn["METEOR"]))
    assert not np.isnan(interval(drawn["CIDEr"])).any()


def test_java_is_put_on_the_path_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.setenv(java.LOCALE_VARIABLE, "")
    monkeypatch.setattr(java, "_list_candidates", lambda: [str(tmp_path / "java")])
    monkeypatch.setattr(java, "_can_run", lambda java: True)
    java.ensure_java()
    java.ensure_java()
    assert os.environ["PATH"] == f"{tmp_path}{os.pathsep}/usr/bin"
