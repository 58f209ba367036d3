"""docs/reliability.md: states that are corrupt, of another run or in the way, and full disks."""

import json
import re
import resource
import shutil
from pathlib import Path

import pytest
import torch

import main_task_retrieval
from modules.pipeline.train import warn_of_earlier_run
from modules.training import output
from modules.training.checkpoints import Checkpoints
from modules.training.progress import Progress
from modules.training.states import list_states, newest_state, sidecar_path
from modules.training.trainer import Trainer
from tests.runs import SAVED_OFTEN, Killed, arguments, die_at, run_refused


@pytest.fixture(scope="module")
def finished(spot, tiny_sizes, tmp_path_factory) -> Path:
    """An adaptation of two epochs that ran to its end; tests copy it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    assert main_task_retrieval.main(options_of(spot, run, tiny_sizes)) == 0
    return run


@pytest.fixture(scope="module")
def broken_off(spot, tiny_sizes, tmp_path_factory) -> Path:
    """An adaptation that ended when its first epoch had been evaluated, but not recorded."""
    run = tmp_path_factory.mktemp("broken_off") / "run"
    break_off(options_of(spot, run, tiny_sizes, *SAVED_OFTEN))
    return run


def options_of(data: Path, run: Path, sizes: Path, *more: str) -> list[str]:
    return arguments(data, run, sizes, "retrieval", "--do_train", *more)


def break_off(options: list[str]) -> None:
    """Adapt until the first epoch has been evaluated."""
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, output, "append_history")
        with pytest.raises(Killed):
            main_task_retrieval.main(options)


def test_a_corrupt_state_is_logged_and_an_older_one_used(broken_off, tmp_path, caplog):
    run = shutil.copytree(broken_off, tmp_path / "run")
    newest, older = list_states(run)
    assert newest.name == "training_state.bin.0"
    assert older.name == "training_state.bin.0.3"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert newest_state(run).path == older
    assert f"{newest} is corrupt: its SHA-256" in caplog.text
    older.with_name(f"{older.name}.json").write_text("{}")
    with pytest.raises(ValueError, match=f"no state in {run} can be used"):
        newest_state(run)


def test_a_run_killed_before_its_first_sidecar_begins_anew(tmp_path):
    first = Checkpoints(tmp_path, 2, {}, "data", {})
    state = first.save_state({"model": {}}, Progress(epoch=0), steps=1)
    sidecar_path(state).unlink()
    assert newest_state(tmp_path) is None
    second = Checkpoints(tmp_path, 2, {}, "data", {}, is_new_run=True)
    second.save_state({"model": {}}, Progress(epoch=0), steps=2)
    assert names_in(tmp_path) == ["training_state.bin.0.2"]
    assert newest_state(tmp_path).path.name == "training_state.bin.0.2"


def test_a_state_killed_before_its_sidecar_is_left_for_the_one_before(tmp_path):
    saved = Checkpoints(tmp_path, 2, {}, "data", {})
    saved.save_state({"model": {}}, Progress(epoch=0), steps=1)
    state = saved.save_state({"model": {}}, Progress(epoch=0), steps=2)
    sidecar_path(state).unlink()
    assert newest_state(tmp_path).path.name == "training_state.bin.0.1"


@pytest.mark.parametrize(("epoch", "best_epoch", "is_state"), [(0, -1, True), (0, 0, False)])
def test_the_best_epoch_of_a_state_has_been_trained(tmp_path, epoch, best_epoch, is_state):
    progress = Progress(epoch=epoch, best_epoch=best_epoch)
    Checkpoints(tmp_path, 2, {}, "data", {}).save_state({"model": {}}, progress, steps=1)
    if is_state:
        assert newest_state(tmp_path).progress == progress
    else:
        with pytest.raises(ValueError, match="no state in"):
            newest_state(tmp_path)


def test_what_cannot_be_continued_is_refused_before_anything_is_written(
    finished, spot, tiny_sizes, tmp_path, capsys
):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    (run / "training_state.bin.0").unlink()
    options = options_of(spot, run, tiny_sizes)
    before = contents(run)
    resumed = ["--resume_model", str(run / "pytorch_model.bin.1")]
    other = tmp_path / "other"
    for more, message in (
        (
            ["--resume_model", str(run / "pytorch_model.bin.0")],
            f"the newest state of this run is {run / 'training_state.bin.1'}",
        ),
        (
            ["--resume_model", str(run / "pytorch_model.bin.best")],
            "expected a file pytorch_model.bin.<epoch>",
        ),
        (
            [*resumed, "--lr", "2e-3"],
            "was saved with other options: --lr is 0.002, was 0.001. Restore them",
        ),
        ([*resumed, "--freeze_layer_num", "2", "--resume_force"], "with these options"),
        ([*resumed, "--output_dir", str(other)], "set --output_dir to"),
        ([*resumed, "--resume", "auto"], "give either"),
        (["--resume_force"], "works only with --resume auto"),
    ):
        assert message in run_refused("retrieval", [*options, *more], capsys)
    assert contents(run) == before
    assert not other.exists()


def contents(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_other_data_are_refused_and_harmless_changes_are_logged(
    finished, spot, tiny_sizes, tmp_path, capsys, caplog
):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    moved = shutil.copytree(spot, tmp_path / "moved")
    more = ("--data_path", str(moved), "--resume", "auto", "--n_display", "7")
    options = options_of(spot, run, tiny_sizes, *more)
    assert main_task_retrieval.main(options) == 0
    assert f"changed since the state was saved: --data_path is {moved}, was {spot}" in caplog.text
    assert "changed since the state was saved: --n_display is 7, was 1" in caplog.text
    entries = json.loads((moved / "reformat_train.json").read_text())
    entries[3]["sentences"][0] += " now"
    (moved / "reformat_train.json").write_text(json.dumps(entries))
    line = run_refused("retrieval", options, capsys)
    assert "the pairs to train on, or those that choose the epoch, have changed" in line


def test_resuming_begins_a_run_where_there_is_none_and_only_evaluates_a_finished_one(
    spot, tiny_sizes, tmp_path, caplog
):
    run = tmp_path / "run"
    options = options_of(spot, run, tiny_sizes, "--epochs", "1", "--resume", "auto")
    assert main_task_retrieval.main(options) == 0
    assert f"no state in {run}, a new run begins" in caplog.text
    saved = (run / "pytorch_model.bin.0").read_bytes()
    scores = (run / "metrics.json").read_bytes()
    (run / "metrics.json").unlink()
    caplog.clear()
    assert main_task_retrieval.main(options) == 0
    assert f"continuing from {run / 'training_state.bin.0'}" in caplog.text
    assert "step 1/" not in caplog.text
    assert (run / "pytorch_model.bin.0").read_bytes() == saved
    assert (run / "metrics.json").read_bytes() == scores


def test_the_best_and_the_newest_weights_are_kept_and_each_removal_is_logged(tmp_path, caplog):
    caplog.set_level("INFO")
    for keep in (2, -1):
        save_epochs(tmp_path / str(keep), keep, scores=[0.1, 0.5, 0.2, 0.3, 0.4])
    assert names_in(tmp_path / "2") == [
        *(f"pytorch_model.bin.{epoch}" for epoch in (1, 3, 4, "best")),
        *(f"training_state.bin.{epoch}" for epoch in (3, 4)),
    ]
    assert names_in(tmp_path / "-1") == [
        *(f"pytorch_model.bin.{epoch}" for epoch in (0, 1, 2, 3, 4, "best")),
        *(f"training_state.bin.{epoch}" for epoch in (0, 1, 2, 3, 4)),
    ]
    for kind in ("pytorch_model", "training_state"):
        for epoch in (0, 2):
            path = tmp_path / "2" / f"{kind}.bin.{epoch}"
            assert f"removed {path} (--keep_checkpoints 2)" in caplog.text


def save_epochs(folder: Path, keep: int, scores: list[float]) -> None:
    """What a training with these scores would save, with a single number for weights."""
    folder.mkdir()
    saved = Checkpoints(folder, keep, {}, "data", {})
    progress = Progress()
    weights = {"weight": torch.zeros(1)}
    for epoch, score in enumerate(scores):
        progress.finish_epoch(1.0)
        saved.save_weights(weights, epoch)
        saved.save_state({"model": weights}, progress)
        progress.record_score(score)
        saved.record_evaluation(progress)
    assert (folder / "pytorch_model.bin.best").resolve().name == "pytorch_model.bin.1"


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


def test_a_forgotten_resume_is_noticed_before_an_epoch_was_evaluated(tmp_path, caplog):
    Checkpoints(tmp_path, 2, {}, "data", {}).save_state({"model": {}}, Progress(), steps=1)
    warn_of_earlier_run(tmp_path)
    assert f"{tmp_path} holds an earlier run" in caplog.text


def test_a_forgotten_resume_loses_nothing_until_the_new_run_saves(
    finished, spot, tiny_sizes, tmp_path, caplog, monkeypatch
):
    run = shutil.copytree(finished, tmp_path / "run", symlinks=True)
    options = options_of(spot, run, tiny_sizes)
    before = newest_state(run)
    with monkeypatch.context() as patch:
        die_at(patch, Trainer, "step")
        with pytest.raises(Killed):
            main_task_retrieval.main(options)
    assert "stop before that if you meant --resume auto" in caplog.text
    assert newest_state(run) == before
    break_off(options)
    assert [path.name for path in list_states(run)] == ["training_state.bin.0"]


def test_a_run_killed_before_it_links_its_best_epoch_links_it_when_resumed(
    spot, tiny_sizes, tmp_path
):
    run = tmp_path / "run"
    options = options_of(spot, run, tiny_sizes, "--epochs", "1", "--resume", "auto")
    with pytest.MonkeyPatch.context() as patch:
        die_at(patch, Checkpoints, "link_best")
        with pytest.raises(Killed):
            main_task_retrieval.main(options)
    assert not (run / "pytorch_model.bin.best").exists()
    assert main_task_retrieval.main(options) == 0
    assert (run / "pytorch_model.bin.best").resolve() == run / "pytorch_model.bin.0"


def test_a_full_disk_leaves_the_last_state_and_says_what_is_missing(
    spot, tiny_sizes, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    usage = shutil.disk_usage(tmp_path)
    calls = []

    def nearly_full(folder: Path):
        calls.append(folder)
        return usage._replace(free=1_000_000 if len(calls) == 4 else usage.free)

    monkeypatch.setattr(shutil, "disk_usage", nearly_full)
    line = run_refused("retrieval", options_of(spot, run, tiny_sizes, *SAVED_OFTEN), capsys)
    # Three states within the epoch were saved; the fourth save is that of its weights.
    sizes = r"it takes 0\.\d+ GB, 0\.001 GB are free, 0\.\d+ GB are missing; make room, and"
    assert re.search(rf"cannot write {run}/pytorch_model\.bin\.0: {sizes}", line)
    kept = newest_state(run)
    assert kept.path.name == "training_state.bin.0.3"
    assert kept.tensors()["model"].keys()
    assert not list(run.glob(".pytorch_model*"))


def test_a_disk_that_fills_up_while_writing_leaves_the_last_state(broken_off, tmp_path):
    """A limit on a file's size stands for the full disk: the system stops writes in the middle."""
    run = shutil.copytree(broken_off, tmp_path / "run")
    before = newest_state(run)
    limit = 20_000_000  # bytes; the state takes more
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    saved = Checkpoints(run, 2, {}, "data", {})
    message = "cannot write .*--resume auto continues from the last state"
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        with pytest.raises(OSError, match=message):
            saved.save_state({"model": torch.zeros(limit)}, Progress(epoch=1))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_state(run) == before
    assert names_in(run) == names_in(broken_off)
