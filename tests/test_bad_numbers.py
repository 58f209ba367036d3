"""docs/reliability.md: gradients that are not finite, and memory that runs out."""

import re

import pandas as pd
import pytest
import torch

import main_task_retrieval
from modules.optimization import BertAdam
from modules.training import monitors, output
from modules.training.objectives import contrastive
from modules.training.objectives.contrastive import Contrastive
from modules.training.objectives.cross_entropy import CrossEntropy
from modules.training.states import newest_state
from modules.training.trainer import Trainer
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import SCRIPTS, STEPS, Killed, arguments, die_at, run_refused, same_weights

OBJECTIVES = {"retrieval": Contrastive, "caption": CrossEntropy}
NAN = float("nan")
FIRST_SCALE = 2.0**16  # of torch's gradient scaler


@pytest.fixture(autouse=True)
def _without_reports(monkeypatch):
    use_quick_scores(monkeypatch.setattr)
    skip_reports(monkeypatch.setattr)


def multiply_losses(patch, task: str, factor_of) -> None:
    """Multiply each loss by `factor_of` its number, from 1."""
    forward = OBJECTIVES[task].forward
    calls = 0

    def multiplied(objective, batch):
        nonlocal calls
        calls += 1
        return forward(objective, batch) * factor_of(calls)

    patch.setattr(OBJECTIVES[task], "forward", multiplied)


def test_a_step_without_finite_gradients_moves_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = BertAdam([parameter], lr=0.1, max_global_norm=1.0)
    for bad in (NAN, float("inf")):
        parameter.grad = torch.tensor([0.1, bad, 0.1])
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    assert optimizer.skipped_steps == 2
    parameter.grad = torch.full((3,), 0.1)
    optimizer.step()
    assert (parameter < 1).all()
    assert parameter.isfinite().all()


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_bad_numbers_are_skipped_counted_and_their_pairs_named(
    task, clevr, tiny_sizes, tmp_path, monkeypatch, caplog
):
    multiply_losses(monkeypatch, task, lambda number: NAN if number == 2 else 1)
    run = tmp_path / "run"
    assert SCRIPTS[task].main(arguments(clevr, run, tiny_sizes, task, "--do_train")) == 0
    messages = [record.getMessage() for record in caplog.records]
    [line] = [message for message in messages if "skipped a step" in message]
    said = r"with non-finite gradients \(loss nan, 1 in a row, 1 in total\)"
    ids = r"(00000\d\.png, ){3}00000\d\.png"
    assert re.fullmatch(f"epoch 1: skipped a step {said}: {ids}", line)
    assert pd.read_csv(run / "history.csv")["loss"].notna().all()
    saved = torch.load(run / "pytorch_model.bin.1", weights_only=True)
    assert all(value.isfinite().all() for value in saved.values())


def test_nothing_but_bad_numbers_ends_the_run_with_the_last_good_state(
    clevr, tiny_sizes, tmp_path, monkeypatch, capsys
):
    good_steps = STEPS["retrieval"]
    multiply_losses(monkeypatch, "retrieval", lambda number: NAN if number > good_steps else 1)
    monkeypatch.setattr(monitors, "MAX_NONFINITE_STEPS", 3)
    run = tmp_path / "run"
    line = run_refused(
        "retrieval", arguments(clevr, run, tiny_sizes, "retrieval", "--do_train"), capsys
    )
    assert "3 steps in a row had non-finite gradients" in line
    kept = newest_state(run)
    assert kept.path.name == "training_state.bin.0"
    assert all(value.isfinite().all() for value in kept.tensors()["model"].values())


def test_an_epoch_without_any_finite_loss_ends_the_run(
    clevr, tiny_sizes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(contrastive, "contrastive_loss", lambda similarity: similarity.sum() * NAN)
    options = arguments(clevr, tmp_path / "run", tiny_sizes, "retrieval", "--do_train")
    assert "no batch of epoch 1 had a finite loss" in run_refused("retrieval", options, capsys)


def test_fp16_scaling_continues_after_a_resume(clevr, tiny_sizes, tmp_path, monkeypatch):
    """On the CPU too: each step that overflows halves the scale, which is part of the state."""
    run = tmp_path / "run"
    more = ("--do_train", "--precision", "fp16")
    options = arguments(clevr, run, tiny_sizes, "retrieval", *more)
    with monkeypatch.context() as patch:
        multiply_losses(patch, "retrieval", lambda number: float("inf") if number == 2 else 1)
        die_at(patch, output, "append_history")
        with pytest.raises(Killed):
            main_task_retrieval.main(options)
    broken_off = newest_state(run)
    assert broken_off.progress.skipped >= 1
    assert scale_of(broken_off) == FIRST_SCALE / 2**broken_off.progress.skipped
    assert main_task_retrieval.main([*options, "--resume", "auto"]) == 0
    finished = newest_state(run)
    assert finished.path.name == "training_state.bin.1"
    assert scale_of(finished) == FIRST_SCALE / 2**finished.progress.skipped


def scale_of(state) -> float:
    return state.tensors()["scaler"]["scale"]


def test_deterministic_runs_give_the_same_weights(clevr, tiny_sizes, tmp_path, monkeypatch):
    are_deterministic = []
    step = Trainer.step

    def observed(trainer):
        are_deterministic.append(torch.are_deterministic_algorithms_enabled())
        return step(trainer)

    monkeypatch.setattr(Trainer, "step", observed)
    for name in ("one", "two"):
        more = ("--do_train", "--epochs", "1", "--deterministic")
        options = arguments(clevr, tmp_path / name, tiny_sizes, "retrieval", *more)
        assert main_task_retrieval.main(options) == 0
    assert are_deterministic == [True] * (2 * STEPS["retrieval"])
    assert not torch.are_deterministic_algorithms_enabled()
    weights = [tmp_path / name / "pytorch_model.bin.0" for name in ("one", "two")]
    assert same_weights(*weights)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"),
            2,
            "out of memory: use a smaller --batch_size",
        ),
        (
            RuntimeError("some_cuda_kernel does not have a deterministic implementation, but you"),
            2,
            "--deterministic asks for an algorithm that torch does not have here (some_cuda_kernel",
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9"),
            2,
            "out of memory: use a smaller --batch_size",
        ),
        (MemoryError(), 2, "out of memory: use a smaller --batch_size"),
        (
            RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
            1,
            "use fewer --num_thread_reader",
        ),
    ],
)
def test_what_torch_refuses_is_one_line(
    error, code, said, clevr, tiny_sizes, tmp_path, monkeypatch, capsys
):
    def fail(*_):
        raise error

    monkeypatch.setattr(Contrastive, "forward", fail)
    options = arguments(clevr, tmp_path / "run", tiny_sizes, "retrieval", "--do_train")
    with pytest.raises(SystemExit) as stop:
        main_task_retrieval.main(options)
    assert stop.value.code == code
    assert said in capsys.readouterr().err.splitlines()[-1]
