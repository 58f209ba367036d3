"""docs/reliability.md: nothing is lost when a run is killed, breaks off or is asked to stop."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from modules.training import output
from modules.training.states import list_states
from modules.training.trainer import Trainer
from system.signals import EXIT_TRY_AGAIN, StopRequested, StopSignals
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import (
    FAULTY,
    NO_FAULT,
    SAVED_OFTEN,
    SCORE,
    SCRIPTS,
    STEPS,
    TORCHRUN,
    Killed,
    arguments,
    check_tensorboard,
    die_at,
    finish,
    free_port,
    is_listening,
    kill_all_of,
    log_of,
    run_refused,
    same_weights,
    start,
    succeed,
    wait_for,
)

EPOCHS = 3
RENAMES = 6  # that a run does before its first epoch is judged, and no fewer in each later one


@pytest.fixture(scope="module")
def whole(clevr, tiny_sizes, tmp_path_factory):
    """Uninterrupted runs by task and number of processes, made when first asked for."""
    made: dict[tuple[str, int], Path] = {}

    def run(task: str, processes: int = 1) -> Path:
        if (task, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{task}{processes}") / "run"
            succeed(
                [FAULTY, NO_FAULT, task, *options_of(clevr, folder, tiny_sizes, task)], processes
            )
            made[task, processes] = folder
        return made[task, processes]

    return run


def options_of(data: Path, run: Path, sizes: Path, task: str, *more: str) -> list[str]:
    return arguments(data, run, sizes, task, "--do_train", "--epochs", str(EPOCHS), *more)


def resumable(data: Path, run: Path, sizes: Path, task: str) -> list[str]:
    """The options of a run that is saved at every step and continues what is there."""
    return options_of(data, run, sizes, task, *SAVED_OFTEN, "--resume", "auto")


def assert_same(one: Path, other: Path, task: str) -> None:
    """The same results, and TensorBoard shows them."""
    assert_same_results(one, other)
    for run in (one, other):
        check_tensorboard(run, epochs=EPOCHS, score=SCORE[task])


def assert_same_results(one: Path, other: Path) -> None:
    """Weights bit for bit, and scores of every epoch and of the best one."""
    last = f"pytorch_model.bin.{EPOCHS - 1}"
    assert same_weights(one / last, other / last)
    histories = [pd.read_csv(run / "history.csv") for run in (one, other)]
    pd.testing.assert_frame_equal(*histories, rtol=1e-6)
    metrics = [json.loads((run / "metrics.json").read_text()) for run in (one, other)]
    assert metrics[0] == metrics[1]
    best = [(run / "pytorch_model.bin.best").resolve().name for run in (one, other)]
    assert best[0] == best[1]


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("retrieval", []),
        ("caption", []),
        pytest.param("retrieval", ["--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
        pytest.param("caption", ["--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
        pytest.param("caption", ["--scst"], marks=pytest.mark.slow),
    ],
)
def test_broken_off_at_any_step_or_evaluation_and_resumed_equals_uninterrupted(
    task, more, clevr, tiny_sizes, tmp_path, monkeypatch
):
    use_quick_scores(monkeypatch.setattr)
    skip_reports(monkeypatch.setattr)
    main = SCRIPTS[task].main
    if "--scst" in more:  # which needs a captioner to begin with
        first = options_of(clevr, tmp_path / "first", tiny_sizes, task, "--epochs", "1")
        assert main(first) == 0
        more = [*more, "--init_model", str(tmp_path / "first" / "pytorch_model.bin.0")]
    assert main(options_of(clevr, tmp_path / "whole", tiny_sizes, task, *more)) == 0
    cut = [*resumable(clevr, tmp_path / "cut", tiny_sizes, task), *more]
    faults = (
        (Trainer, "step", random.Random(task).randint(2, 3)),
        (output, "append_history", 1),  # an epoch has been evaluated, but not judged
    )
    for owner, name, call in faults:
        with monkeypatch.context() as patch:
            die_at(patch, owner, name, call)
            with pytest.raises(Killed):
                main(cut)
        time.sleep(1)  # TensorBoard orders the files of one process by the second
    assert main(cut) == 0
    assert_same(tmp_path / "whole", tmp_path / "cut", task)


def check_killed_and_resumed(task, processes, point, clevr, sizes, run, whole) -> None:
    """SIGKILL at a point before which something may not have been saved yet, then run again."""
    options = resumable(clevr, run, sizes, task)
    code, errors = finish(start([FAULTY, f"kill:{point}", task, *options], processes))
    assert code != 0, errors[-3000:]
    assert "fault: kill" in errors
    succeed([FAULTY, NO_FAULT, task, *options], processes)
    assert_same(whole(task, processes), run, task)


@pytest.mark.parametrize(
    ("task", "processes", "point"),
    [
        ("retrieval", 1, "step:7"),
        ("caption", 1, "write:4"),
        ("retrieval", 2, "rename:7:0"),
        pytest.param("caption", 2, "step:3:1", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    task, processes, point, clevr, tiny_sizes, tmp_path, whole
):
    check_killed_and_resumed(task, processes, point, clevr, tiny_sizes, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_killed_at_random_points_and_resumed_equals_uninterrupted(
    number, clevr, tiny_sizes, tmp_path, whole
):
    draw = random.Random(number)
    task = draw.choice(["retrieval", "caption"])
    processes = draw.choice([1, 1, 2])
    where = draw.choice(["step", "write", "rename"])
    per_epoch = RENAMES if where == "rename" else STEPS[task]
    rank = draw.randrange(processes) if where == "step" else 0
    point = f"{where}:{draw.randint(1, EPOCHS * per_epoch)}"
    if processes > 1:
        point += f":{rank}"
    check_killed_and_resumed(task, processes, point, clevr, tiny_sizes, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_killed_after_a_random_time_again_and_again(number, clevr, tiny_sizes, tmp_path, whole):
    """TensorBoard is not compared: it lacks an epoch whose run was killed once it was judged."""
    draw = random.Random(number)
    task = draw.choice(["retrieval", "caption"])
    processes = 1 + number % 2
    run = tmp_path / "run"
    program = [FAULTY, NO_FAULT, task, *resumable(clevr, run, tiny_sizes, task)]
    kills = 0
    process = start(program, processes)
    while not ends_before_it_saves(process, run):
        time.sleep(draw.uniform(0, 1.5))
        kill_all_of(run)
        process.communicate()
        kills += 1
        process = start(program, processes)
    code, errors = finish(process)
    assert code == 0, errors[-3000:]
    assert kills >= 1
    assert_same_results(whole(task, processes), run)


def ends_before_it_saves(process: subprocess.Popen, run: Path) -> bool:
    """Wait until a run has saved once more than before, or has ended; whether it has ended."""
    saved = log_of(run).count("saved ")
    wait_for(lambda: process.poll() is not None or log_of(run).count("saved ") > saved)
    return process.poll() is not None


@pytest.mark.parametrize(
    ("what", "number"), [("term", signal.SIGTERM), ("interrupt", signal.SIGINT)]
)
def test_a_signal_finishes_the_step_saves_and_exits_75(
    what, number, clevr, tiny_sizes, tmp_path, whole
):
    run = tmp_path / "run"
    options = options_of(clevr, run, tiny_sizes, "retrieval", "--resume", "auto")
    code, errors = finish(start([FAULTY, f"{what}:step:6", "retrieval", *options]))
    assert code == EXIT_TRY_AGAIN
    assert signal.Signals(number).name in errors
    assert "Traceback" not in errors
    last_line = errors.strip().splitlines()[-1]
    assert last_line.endswith("the same command with --resume auto continues")
    # Step 6 is the second of the second epoch.
    assert list_states(run)[0].name == "training_state.bin.1.2"
    succeed([FAULTY, NO_FAULT, "retrieval", *options])
    assert_same(whole("retrieval"), run, "retrieval")


def test_a_signal_to_the_launcher_stops_all_processes_after_the_same_step(
    clevr, tiny_sizes, tmp_path, whole
):
    run = tmp_path / "run"
    options = options_of(clevr, run, tiny_sizes, "retrieval", "--resume", "auto")
    process = start([FAULTY, "slow:step:6:0", "retrieval", *options], processes=2)
    wait_for(lambda: "step 1/" in log_of(run).partition("epoch 2/")[2])
    process.send_signal(signal.SIGTERM)
    code, errors = finish(process)
    assert code != 0
    assert "stopped as asked" in errors
    assert re.fullmatch(r"training_state\.bin\.1\.\d", list_states(run)[0].name)
    succeed([FAULTY, NO_FAULT, "retrieval", *options], processes=2)
    assert_same(whole("retrieval", 2), run, "retrieval")


@pytest.mark.parametrize("deferred", [False, True])
def test_outside_of_a_step_a_signal_stops_at_once(deferred):
    reached = []

    def be_signalled(stop: StopSignals) -> None:
        with stop.deferred() if deferred else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            reached.append(stop.requested)

    with StopSignals() as stop, pytest.raises(StopRequested):
        be_signalled(stop)
    assert reached == [True] * deferred


def test_inside_of_a_step_only_the_second_signal_ends_the_process():
    code = (
        "import os, signal, time\n"
        "from system.signals import StopSignals\n"
        "with StopSignals() as stop, stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still there', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(9)\n"
    )
    process = start(["-c", code])
    stdout, _ = process.communicate(timeout=60)
    assert stdout == "still there\n"
    assert process.returncode == -signal.SIGTERM


def test_two_runs_in_one_folder_are_refused(spot, tiny_sizes, tmp_path, capsys):
    run = tmp_path / "run"
    options = arguments(spot, run, tiny_sizes, "retrieval", "--do_train", "--epochs", "1")
    process = start([FAULTY, "hang:step:1", "retrieval", *options])
    wait_for(lambda: (run / "log.txt").is_file())
    assert f"{run} is in use by another run" in run_refused("retrieval", options, capsys)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert SCRIPTS["retrieval"].main(options) == 0


@pytest.mark.parametrize(
    "launcher",
    [
        ["--standalone"],
        pytest.param(["--nnodes=1", "--master_port={port}"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_is_restarted_and_continues_from_the_last_state(
    launcher, clevr, tiny_sizes, tmp_path, whole
):
    run = tmp_path / "run"
    port = free_port()
    launcher = [word.format(port=port) for word in launcher]
    program = [FAULTY, "kill:step:7:1", "retrieval"]
    options = resumable(clevr, run, tiny_sizes, "retrieval")
    succeed([*TORCHRUN, *launcher, "--nproc_per_node=2", "--max-restarts=1", *program, *options])
    assert "continuing from" in log_of(run)
    assert_same(whole("retrieval", 2), run, "retrieval")


@pytest.mark.parametrize("killed", ["worker", pytest.param("agent", marks=pytest.mark.slow)])
def test_two_agents_continue_from_the_last_state_when_one_is_killed(
    killed, clevr, tiny_sizes, tmp_path, whole
):
    run = tmp_path / "run"
    port = free_port()
    launcher = [
        *("--nnodes=2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_id=job"),
        *("--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"),
    ]
    environment = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "STEP_TIMEOUT": "60"}
    options = resumable(clevr, run, tiny_sizes, "retrieval")

    def start_agent(fault: str):
        program = [*TORCHRUN, *launcher, FAULTY, fault, "retrieval", *options]
        return start(program, **environment)

    fault = "kill:step:7:1" if killed == "worker" else "hang:step:7:1"
    agents = [start_agent(fault)]
    wait_for(lambda: is_listening(port))  # the first one has the store that they meet at
    agents.append(start_agent(fault))
    if killed == "agent":
        wait_for(lambda: (run / "training_state.bin.1.2.json").is_file())
        os.killpg(agents[1].pid, signal.SIGKILL)
        agents[1].wait()  # its worker, which it leaves behind, holds the pipes
        agents[1] = start_agent(NO_FAULT)
    for agent in agents:
        code, errors = finish(agent, 400)
        assert code == 0, errors[-3000:]
    assert "continuing from" in log_of(run)
    assert_same(whole("retrieval", 2), run, "retrieval")
