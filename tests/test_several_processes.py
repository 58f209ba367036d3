"""docs/reliability.md: training by several processes, of which one fails, hangs or is slow."""

import json
import signal

import pandas as pd
import pytest

from modules.options import parse_options
from modules.pipeline.train_or_evaluate import prepare_scoring
from system import runtime
from tests.conftest import make_clevr
from tests.runs import FAULTY, NO_FAULT, arguments, finish, log_of, start, succeed


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("raise:step:3:1", "this process fails on purpose"),
        ("kill:step:3:1", "Signal 9"),
        pytest.param("hang:step:3:1", "another process has ended or hangs", marks=pytest.mark.slow),
    ],
)
def test_one_process_that_fails_or_hangs_ends_the_job(fault, shown, clevr, tiny_sizes, tmp_path):
    options = arguments(clevr, tmp_path / "run", tiny_sizes, "retrieval", "--do_train")
    program = [FAULTY, fault, "retrieval", *options]
    code, errors = finish(start(program, processes=2, STEP_TIMEOUT="15"), seconds=150)
    assert code not in (0, -signal.SIGKILL), "it had to be killed"
    assert shown in errors


def test_scoring_may_take_longer_than_processes_wait_for_a_step(clevr, tiny_sizes, tmp_path):
    more = ("--do_train", "--epochs", "1")
    options = arguments(clevr, tmp_path / "run", tiny_sizes, "caption", *more)
    program = [FAULTY, "slow:score:1:0", "caption", *options]
    code, errors = finish(start(program, processes=2, STEP_TIMEOUT="10", SLOW="12"))
    assert code == 0, errors[-3000:]
    assert "fault: slow" in errors


def test_all_processes_hear_that_scoring_lacks_a_program(monkeypatch):
    def broadcast(box, src, group):
        box[0] = OSError("no Java")

    monkeypatch.setattr(runtime.dist, "broadcast_object_list", broadcast)
    words = ["--do_eval", "--output_dir", "o", "--datatype", "clevr", "--data_path", "d"]
    options = parse_options(words, "caption", "")
    with pytest.raises(OSError, match="no Java"):
        prepare_scoring(options, runtime.Runtime(rank=1, world_size=2))


def test_early_stop_reaches_all_processes(clevr, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    options = arguments(clevr, run, tiny_sizes, "caption", "--do_train", "--epochs", "9")
    succeed([FAULTY, "worse", "caption", *options, "--patience", "1"], processes=2)
    assert "early stopping: no improvement for 1 epochs (--patience 1)" in log_of(run)
    assert pd.read_csv(run / "history.csv")["epoch"].tolist() == [0, 1]


def test_more_pairs_than_fill_the_batches_of_two_processes(tiny_sizes, tmp_path):
    """7 pairs in batches of 2·2: training drops the last incomplete batch, evaluation nothing."""
    data = make_clevr(tmp_path / "data", {"train": 7, "val": 3, "test": 5})
    run = tmp_path / "run"
    options = arguments(data, run, tiny_sizes, "caption", "--do_train", "--epochs", "1")
    succeed([FAULTY, NO_FAULT, "caption", *options], processes=2)
    rows = json.loads((run / "hyp_ep_eval.json").read_text())
    numbers = range(10, 15)
    changes = [f"{number:06d}.png" for number in numbers]
    distractors = [f"{number:06d}.png_n" for number in numbers]
    assert [row["image_id"] for row in rows] == changes + distractors


def test_several_agents_that_would_send_restarted_processes_astray_are_refused(monkeypatch):
    for name, value in (("USE_AGENT_STORE", "True"), ("MAX_RESTARTS", "3"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        runtime._open_restart_store()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert runtime._open_restart_store() is None
