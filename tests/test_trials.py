"""Short trainings: --limit, --max_steps and --patience, batches that fit, and what the log says."""

import json
from itertools import chain, repeat

import pandas as pd
import pytest
import torch

import CLIP4IDCinference
import main_task_retrieval
from dataloaders import picture_files
from modules.pipeline import train_or_evaluate
from modules.training.pace import Pace, format_duration
from modules.training.states import list_complete_states
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import arguments, log_of, run_refused


@pytest.fixture
def quick(monkeypatch):
    """Quick scores; call it with the CIDEr of each evaluation."""
    skip_reports(monkeypatch.setattr)

    def use(*ciders: float) -> None:
        use_quick_scores(monkeypatch.setattr, ciders=chain(ciders, repeat(ciders[-1])))

    return use


def finetune(data, run, sizes, *more: str) -> list[int]:
    """Train the captioner; returns the epochs in the history."""
    words = arguments(data, run, sizes, "caption", "--do_train", *more)
    assert CLIP4IDCinference.main(words) == 0
    return pd.read_csv(run / "history.csv")["epoch"].tolist()


@pytest.mark.parametrize(
    ("patience", "ciders", "epochs"),
    [
        ("1", (0.5, 0.4), 2),
        ("2", (0.5, 0.4), 3),
        ("0", (0.5, 0.4), 4),
        ("1", (0.0,), 4),  # nothing has scored yet
        ("1", (0.0, 0.0, 0.5, 0.4), 4),
    ],
)
def test_patience(patience, ciders, epochs, quick, spot, tiny_sizes, tmp_path):
    quick(*ciders)
    more = ("--epochs", "4", "--patience", patience)
    assert finetune(spot, tmp_path / "run", tiny_sizes, *more) == list(range(epochs))


def test_an_ended_run_goes_on_with_more_patience(quick, spot, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    more = ("--epochs", "4", "--resume", "auto", "--patience")
    quick(0.5, 0.4)
    assert finetune(spot, run, tiny_sizes, *more, "1") == [0, 1]
    quick(0.3)
    assert finetune(spot, run, tiny_sizes, *more, "0") == [0, 1, 2, 3]


def test_max_steps_end_a_training_within_an_epoch(quick, spot, tiny_sizes, tmp_path):
    """8 pairs in batches of 4: two steps an epoch."""
    quick(0.5)
    run = tmp_path / "run"
    assert finetune(spot, run, tiny_sizes, "--epochs", "9", "--max_steps", "3") == [0, 1]
    log = log_of(run)
    assert "3 steps in 2 epochs" in log
    assert "epoch 1/2 step 2/2  loss" in log
    assert "epoch 2/2 step 1/1  loss" in log
    assert "step 2/1" not in log
    (state,) = [path for path in list_complete_states(run) if path.name.endswith(".1")]
    optimizer = torch.load(state)["optimizer"]["state"]
    assert {int(values["step"]) for values in optimizer.values()} == {3}


def test_max_steps_of_several_micro_batches(quick, spot, tiny_sizes, tmp_path):
    quick(0.5)
    run = tmp_path / "run"
    more = ("--gradient_accumulation_steps", "2", "--max_steps", "1", "--epochs", "5")
    assert finetune(spot, run, tiny_sizes, *more) == [0]
    assert "1 steps in 1 epochs" in log_of(run)


def test_limit_takes_the_first_pairs_of_each_split(spot, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    words = arguments(spot, run, tiny_sizes, "retrieval", "--do_train", "--epochs", "1")
    assert main_task_retrieval.main([*words, "--limit", "3", "--batch_size", "2"]) == 0
    assert "retrieval among 3 pairs" in log_of(run)


@pytest.mark.parametrize(
    ("task", "more", "message"),
    [
        ("caption", (), "has 8 samples, fewer than one batch of 64: use --batch_size 8 or less"),
        (
            "caption",
            ("--gradient_accumulation_steps", "16", "--limit", "5"),
            "has 5 samples, fewer than one batch of 64: that is too few to train on",
        ),
        (
            "caption",
            ("--gradient_accumulation_steps", "2", "--limit", "5"),
            "has 5 samples, fewer than one batch of 64: use --batch_size 4 or less",
        ),
        (
            "retrieval",
            ("--limit", "1", "--batch_size", "200"),
            "fewer than one batch of 200: ",
        ),
    ],
)
def test_batches_that_cannot_be_filled_are_refused_before_any_image_is_read(
    task, more, message, spot, tiny_sizes, tmp_path, capsys, monkeypatch
):
    def refuse(*_, **__):
        raise AssertionError("an image was read")

    monkeypatch.setattr(picture_files, "read_image", refuse)
    monkeypatch.setattr(train_or_evaluate, "leave_out_unreadable", refuse)
    run = tmp_path / "run"
    words = arguments(spot, run, tiny_sizes, task, "--do_train", "--batch_size", "64", *more)
    assert message in run_refused(task, words, capsys)
    assert not run.exists()


def test_options_are_in_a_file_and_the_log_has_those_that_were_given(spot, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    words = arguments(spot, run, tiny_sizes, "retrieval", "--do_train", "--epochs", "1")
    assert main_task_retrieval.main(words) == 0
    options = json.loads((run / "options.json").read_text())
    assert options["epochs"] == 1
    assert options["seed"] == 42
    log = log_of(run)
    assert "  --epochs = 1\n" in log
    assert "--seed" not in log
    assert "step 1/4  loss" in log
    assert " left in this epoch, " in log
    assert "epoch 1/1 (pytorch_model.bin.0): the best so far, " in log


def test_the_time_left_is_that_of_the_mean_step_and_evaluation(monkeypatch):
    times = iter([0.0, 10.0, 11.0, 14.0, 20.0, 25.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    pace = Pace()
    assert pace.estimate(5, 5) == 0
    pace.begin_epoch()
    pace.add_step()
    pace.add_step()
    assert pace.estimate(3, 7) == 3 * 2.0
    with pace.evaluating():
        pass
    assert pace.estimate(3, 2) == 3 * 2.0 + 2 * 5.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min"),
        (3569, "59 min"),
        (3571, "1 h 0 min"),
        (11100, "3 h 5 min"),
        (86400 * 2, "2 d 0 h"),
        (86400 * 2.5, "2 d 12 h"),
    ],
)
def test_durations(seconds, text):
    assert format_duration(seconds) == text
