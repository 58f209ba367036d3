"""scripts/reproduce.py: its steps, what counts as finished, its table, and whole rehearsals."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from scripts import reproduce, reproduce_plan
from scripts.reproduce_plan import DATASETS, Reproduction, Step, Training
from scripts.reproduce_table import collect_scores, format_table
from tests.conftest import ROOT, SIZES
from tests.runs import kill_all_of, wait_for

METRICS = {"stage": "retrieval", "datatype": "spot", "split": "test", "text_to_pair_R1": 20.0}
FIRST = Training(1, "test", "adapt")


@pytest.fixture
def plan(tmp_path: Path) -> Reproduction:
    """Two trainings on Spot-the-Diff; nothing is there yet."""
    return Reproduction(DATASETS["spot"], tmp_path / "data", tmp_path / "out", (1,), ("test",))


def finish(plan: Reproduction, training: Training, **scores) -> Path:
    """What a finished training leaves, as far as the plan looks at it."""
    folder = plan.training_folder(training)
    folder.mkdir(parents=True)
    for name in (reproduce_plan.BEST_WEIGHTS, reproduce_plan.LAST_FILE):
        (folder / name).touch()
    stage = reproduce_plan.STAGES[training.stage]
    metrics = {**METRICS, "datatype": plan.dataset.name, "stage": stage, **scores}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    return folder


@pytest.mark.parametrize("name", DATASETS)
def test_a_training_is_the_published_command_and_what_differs(name: str, tmp_path: Path) -> None:
    plan = Reproduction(
        DATASETS[name], tmp_path, tmp_path, (7,), ("test", "val"), options=("--precision", "fp32")
    )
    adapt, finetune = [step.command for step in plan.list_steps()[-2:]]
    folder = tmp_path / "seed-7" / "by-val"
    common = ["--seed", "7", "--select_on", "val", "--resume", "auto"]
    assert adapt == (
        *("bash", f"scripts/adapt_{name}.sh", "--output_dir", str(folder / "adapt")),
        *(*common, "--precision", "fp32"),
    )
    weights = ["--init_model", str(folder / "adapt" / "pytorch_model.bin.best")]
    assert finetune == (
        *("bash", f"scripts/finetune_{name}.sh", "--output_dir", str(folder / "finetune")),
        *(*common, *weights, "--gt_dir", str(tmp_path / "gt"), "--precision", "fp32"),
    )
    assert (ROOT / adapt[1]).is_file()
    assert (ROOT / finetune[1]).is_file()


def test_a_training_is_finished_when_its_results_are_there(plan: Reproduction) -> None:
    assert plan.read_scores(FIRST) is None
    folder = finish(plan, FIRST)
    assert plan.read_scores(FIRST) == METRICS
    for name in ("pytorch_model.bin.best", "report.html", "metrics.json"):
        (folder / name).rename(folder / "away")
        assert plan.read_scores(FIRST) is None, name
        (folder / "away").rename(folder / name)
    for content in ('{"stage": "retr', "[]", json.dumps({**METRICS, "split": "val"})):
        (folder / "metrics.json").write_text(content)
        assert plan.read_scores(FIRST) is None, content


@pytest.mark.parametrize("name", DATASETS)
def test_the_data_is_there_when_all_of_it_is(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = shutil.copytree(request.getfixturevalue(name), tmp_path / "data")
    full = DATASETS[name]._replace(pairs=SIZES)
    plan = Reproduction(full, data, tmp_path, (1,), ("test",))
    assert plan.has_data()
    real = Reproduction(DATASETS[name], data, tmp_path, (1,), ("test",))
    assert not real.has_data(), "a smaller dataset is not the paper's"
    image = next(path for path in sorted(data.rglob("*.png")))
    image.unlink()
    assert not plan.has_data()


def test_a_result_that_is_older_than_its_source_is_made_again(tmp_path: Path) -> None:
    source, result = tmp_path / "source", tmp_path / "result"
    source.touch()
    assert not reproduce_plan.are_newer([result], [source])
    result.touch()
    assert reproduce_plan.are_newer([result], [source])
    os.utime(result, (0, 0))
    assert not reproduce_plan.are_newer([result], [source])


def test_the_table_shows_ours_beside_the_printed(plan: Reproduction) -> None:
    trainings = [
        Training(seed, "test", stage) for seed in (1, 2) for stage in ("adapt", "finetune")
    ]
    for training in trainings:
        finish(plan, training, text_to_pair_R1=10.0 * training.seed, CIDEr=0.5, METEOR=None)
    scores = collect_scores(trainings, plan.read_scores)
    table = format_table(plan.dataset, ("test", "val"), scores, is_small=False)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[:12]]
    assert rows[0] == ["Spot-the-Diff", "printed", "ours, epoch by test", "ours, epoch by val"]
    assert rows[2] == ["text → pair, R@1", "–", "15.0 ± 7.1 (2 seeds)", "–"]
    assert rows[9] == ["METEOR", "0.1419", "–", "–"]
    assert rows[11] == ["CIDEr", "0.4735", "0.5000 ± 0.0000 (2 seeds)", "–"]
    assert "rehearsal" not in table


def test_the_other_printed_seeds_are_summarized() -> None:
    clevr = DATASETS["clevr"]
    table = format_table(clevr, ("val",), collect_scores([], lambda _: None), is_small=True)
    assert table.startswith("**A rehearsal on drawn scenes")
    assert re.search(r"^\| CIDEr +\| 1.5075 +\| 1.4194 ± 0.0673 +\| –", table, re.MULTILINE)


def with_steps(
    monkeypatch: pytest.MonkeyPatch, downloads: dict[str, str], steps: dict[str, str]
) -> None:
    """Let the plan have these commands, title → shell; each is finished when its file is there."""

    def make(self: Reproduction, commands: dict[str, str]) -> list[Step]:
        made = []
        for title, command in commands.items():
            report = self.output / title if title.startswith("report") else None
            shell = ("bash", "-c", f"cd {self.output}; echo {title} >> begun; {command}")
            made.append(Step(title, shell, (self.output / title).is_file, report))
        return made

    monkeypatch.setattr(Reproduction, "list_downloads", lambda self: make(self, downloads))
    monkeypatch.setattr(Reproduction, "list_steps", lambda self: make(self, steps))
    monkeypatch.setattr(reproduce, "ensure_java", lambda users: None)


def run(*words: str) -> int:
    """The exit code of the command line."""
    try:
        return reproduce.main(list(words))
    except SystemExit as stop:
        return stop.code


def test_a_step_that_fails_stops_the_rest_and_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    steps = {"a": "touch a", "report": "echo fine; [ -f a2 ] || exit 1", "c": "exit 75"}
    with_steps(monkeypatch, {}, steps)
    words = ("spot", "--small", "--output", str(tmp_path))
    assert run(*words) == 2, "a check that found something"
    assert not (tmp_path / "report").exists()
    (tmp_path / "a2").touch()
    assert run(*words) == 75
    assert (tmp_path / "report").read_text() == "fine\n"
    assert capfd.readouterr().err == (
        "report: stopped. Its last line says why; give the same command again to go on.\n"
        "c: stopped. Its last line says why; give the same command again to go on.\n"
    )
    assert (tmp_path / "begun").read_text().split() == ["a", "report", "report", "c"]
    (tmp_path / "c").touch()
    assert run(*words) == 0
    output = capfd.readouterr().out
    assert output.count("ours, epoch by test") == 1
    assert (tmp_path / "results.md").read_text() in output


def test_all_downloads_are_tried_before_anything_long_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    downloads = {"fetch one": "exit 2", "fetch two": "exit 2", "fetch three": "true"}
    with_steps(monkeypatch, downloads, {"long": "true"})
    monkeypatch.setattr(reproduce, "TRAINING_SIZE", 0.0)
    data, output = tmp_path / "data", tmp_path / "out"
    assert run("spot", "--data", str(data), "--output", str(output)) == 2
    said = capfd.readouterr()
    assert f"{data}/images_test/ID.png and ID_2.png\n" in said.out
    assert said.err.endswith(
        "could not fetch one and fetch two: do what the lines above say, "
        "then give the same command again to go on\n"
    )
    assert "long" not in (output / "begun").read_text()


def test_other_options_need_another_folder(
    plan: Reproduction, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_steps(monkeypatch, {}, {"a": "touch a"})
    words = ("spot", "--small", "--seeds", "1", "--output", str(plan.output))
    assert run(*words, "--", "--precision", "fp32") == 0
    assert run(*words) == 0, "no training has begun with the first options"
    finish(plan, FIRST)
    assert run(*words) == 0
    assert run(*words, "--", "--precision", "bf16") == 2
    assert capfd.readouterr().err.endswith(
        "were finished with other settings (options was [], now ['--precision', 'bf16']): "
        "give the same, or another --output\n"
    )


def test_a_signal_reaches_the_step_once(tmp_path: Path) -> None:
    count = f"trap 'echo >> {tmp_path}/stops; exit 75' TERM INT; touch {tmp_path}/ready; "
    step = Step("wait", ("bash", "-c", f"{count} sleep 60 & wait"), lambda: False)

    def ask() -> None:
        wait_for((tmp_path / "ready").exists)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=ask).start()
    assert reproduce.run_step(step, dict(os.environ)) == 75
    assert (tmp_path / "stops").read_text() == "\n"


def test_the_published_scripts_run_with_this_python(
    plan: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHON", "python3.9")
    environment = reproduce.make_environment(plan, 1)
    assert "PYTHON" not in environment
    assert environment["PATH"].startswith(str(Path(sys.executable).parent))
    assert environment["DATA_PATH"] == str(plan.data)
    torchrun = "torchrun --standalone --nproc_per_node=2"
    assert reproduce.make_environment(plan, 2)["PYTHON"] == torchrun


def test_too_little_space_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with_steps(monkeypatch, {"download": "true"}, {})
    monkeypatch.setattr(reproduce, "TRAINING_SIZE", 10.0**9)
    words = ("clevr", "--seeds", "1", "1", "--select_on", "val", "--output", str(tmp_path))
    assert run(*words) == 2
    assert "too little space (fewer --seeds or --select_on need less)" in capfd.readouterr().err
    assert not (tmp_path / "begun").exists()


def test_the_plan_runs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("clevr", "--plan", "--seeds", "3", "--output", str(tmp_path / "out")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "CLEVR-Change: 4 trainings, 0 of them finished"
    assert lines[-1] == "to do     seed 3, epochs chosen on val: stage 2"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["levir"], "invalid choice: 'levir'"),
        (["spot", "--seeds", "-1"], "-1"),
        (["spot", "--select_on", "train"], "invalid choice: 'train'"),
        (["spot", "--small", "--data", "images"], "--data is for the real dataset"),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "seeds", "choices"),
    [("spot", ["1", "2"], ["val"]), ("clevr", ["1"], ["val", "test"])],
)
def test_a_rehearsal_goes_on_after_a_kill(
    name: str, seeds: list[str], choices: list[str], tmp_path: Path
) -> None:
    """Killed in the middle of a training, with all its processes; the rest is done once."""
    command = [sys.executable, "scripts/reproduce.py", name, "--small", "--output", str(tmp_path)]
    command += ["--seeds", *seeds, "--select_on", *choices]
    second = tmp_path / "seed-1" / "by-val" / "finetune"
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    wait_for((second / "training_state.bin.0.json").exists, 1200)
    process.kill()
    process.wait()
    kill_all_of(tmp_path)
    first = tmp_path / "seed-1" / "by-val" / "adapt" / "metrics.json"
    written = first.stat().st_mtime_ns
    time.sleep(0.1)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert first.stat().st_mtime_ns == written, "finished before the kill, and not done again"
    assert "continuing from" in (second / "log.txt").read_text()
    table = done.stdout[done.stdout.index("**A rehearsal") :]
    scores = [line for line in table.splitlines() if line.startswith("| CIDEr")]
    assert len(scores) == 1
    assert scores[0].count(" seed") == len(choices)
    again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "==" not in again.stdout, "nothing is left to do"
    assert table in again.stdout


@pytest.mark.parametrize("words", [[], ["nope"], ["--small"]])
def test_a_dataset_is_asked_for_before_set_up(words):
    command = ["bash", "scripts/reproduce.sh", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "reproduce.sh: name the dataset: scripts/reproduce.sh spot, or clevr\n"
