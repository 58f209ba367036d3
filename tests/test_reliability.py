"""What docs/reliability.md promises: nothing is lost when a run is killed, asked to stop, or meets a fault (files and parsers: test_hostile)."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import CLIP4IDCinference
import main_task_retrieval
from modules.optimization import BertAdam
from modules.training import loop, monitors, objectives, output, states
from modules.training import loop as training
from modules.training import objectives as stages
from modules.training.objectives import contrastive
from modules.training.output import RunFiles
from modules.training.progress import Progress
from modules.training.states import newest_state
from system import runtime
from system.signals import EXIT_TRY_AGAIN, StopRequested, StopSignals
from tests.conftest import TINY, make_clevr
from tests.runs import SCRIPTS, check_board, finish, refused, same_weights, start, words

EPOCHS = 3
STEPS = {"retrieval": 4, "caption": 2}  # of an epoch
SCORE = {"retrieval": "text_to_pair_R1", "caption": "CIDEr"}
RENAMES = 6  # that a run does before its first epoch is judged, and no fewer in each later one
FAULTY = "tests/faulty_run.py"
SAVED_OFTEN = ("--save_every_steps", "1")


@pytest.fixture(scope="module")
def sizes(tmp_path_factory):
    path = tmp_path_factory.mktemp("sizes") / "tiny.json"
    path.write_text(json.dumps(TINY))
    return path


def options_of(data: Path, run: Path, sizes: Path, stage: str, *more: str) -> list[str]:
    return words(data, run, sizes, stage, "--do_train", "--epochs", str(EPOCHS), *more)


@pytest.fixture(scope="module")
def whole(clevr, sizes, tmp_path_factory):
    """Uninterrupted runs by stage and number of processes, made when first asked for."""
    made: dict[tuple[str, int], Path] = {}

    def run(stage: str, processes: int = 1) -> Path:
        if (stage, processes) not in made:
            folder = tmp_path_factory.mktemp(f"{stage}{processes}") / "run"
            code, errors = finish(
                start(
                    [FAULTY, "none:step:0", stage, *options_of(clevr, folder, sizes, stage)],
                    processes,
                )
            )
            assert code == 0, errors[-3000:]
            made[stage, processes] = folder
        return made[stage, processes]

    return run


def assert_same(one: Path, other: Path, stage: str) -> None:
    """Weights bit for bit, scores of every epoch, TensorBoard."""
    assert same_weights(
        one / f"pytorch_model.bin.{EPOCHS - 1}", other / f"pytorch_model.bin.{EPOCHS - 1}"
    )
    pd.testing.assert_frame_equal(
        pd.read_csv(one / "history.csv"), pd.read_csv(other / "history.csv"), rtol=1e-6
    )
    assert json.loads((one / "metrics.json").read_text()) == json.loads(
        (other / "metrics.json").read_text()
    )
    for run in (one, other):
        check_board(run, epochs=EPOCHS, score=SCORE[stage])


class Killed(BaseException):
    """The end of a process, as far as one can be played inside a test's."""


def break_off_after_first_epoch(options: list[str]) -> None:
    """Adaptation that ends once its first epoch is saved and evaluated, but not yet judged."""

    def killing(*_args, **_more):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "append_history", killing)
        with pytest.raises(Killed):
            main_task_retrieval.main(options)


@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("retrieval", []),
        ("caption", []),
        pytest.param("retrieval", ["--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
        pytest.param("caption", ["--gradient_accumulation_steps", "2"], marks=pytest.mark.slow),
        pytest.param("caption", ["--scst"], marks=pytest.mark.slow),
    ],
)
def test_broken_off_at_any_step_or_evaluation_and_resumed_equals_uninterrupted(
    stage, more, clevr, sizes, tmp_path, monkeypatch
):
    if "--scst" in more:
        CLIP4IDCinference.main(
            [*words(clevr, tmp_path / "first", sizes, stage, "--do_train"), "--epochs", "1"]
        )
        more = [*more, "--init_model", str(tmp_path / "first" / "pytorch_model.bin.0")]
    assert SCRIPTS[stage].main(options_of(clevr, tmp_path / "whole", sizes, stage, *more)) == 0
    cut = options_of(clevr, tmp_path / "cut", sizes, stage, *more, *SAVED_OFTEN, "--resume", "auto")
    for name, left in (
        ("_update", random.Random(stage).randint(2, 3)),
        ("_append_history", 1),
    ):  # the latter ends an evaluation
        original = getattr(training, name)

        def killing(*args, original=original, **more):
            nonlocal left
            left -= 1
            if not left:
                raise Killed
            return original(*args, **more)

        with monkeypatch.context() as patch:
            patch.setattr(training, name, killing)
            with pytest.raises(Killed):
                SCRIPTS[stage].main(cut)
        time.sleep(1)  # TensorBoard orders the files of one process by the second
    assert SCRIPTS[stage].main(cut) == 0
    assert_same(tmp_path / "whole", tmp_path / "cut", stage)


def killed_and_resumed(stage, processes, point, clevr, sizes, run, whole) -> None:
    """SIGKILL at a point, then as often as it takes to be through; the point is one before which something may not be saved yet."""
    options = options_of(clevr, run, sizes, stage, *SAVED_OFTEN, "--resume", "auto")
    code, errors = finish(start([FAULTY, f"kill:{point}", stage, *options], processes))
    assert code != 0, errors[-3000:]
    code, errors = finish(start([FAULTY, "none:step:0", stage, *options], processes))
    assert code == 0, errors[-3000:]
    assert_same(whole(stage, processes), run, stage)


@pytest.mark.parametrize(
    ("stage", "processes", "point"),
    [
        ("retrieval", 1, "step:7"),
        ("caption", 1, "write:4"),
        ("retrieval", 2, "rename:7:0"),
        pytest.param("caption", 2, "step:3:1", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_uninterrupted(
    stage, processes, point, clevr, sizes, tmp_path, whole
):
    killed_and_resumed(stage, processes, point, clevr, sizes, tmp_path / "run", whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(40))
def test_killed_at_random_points_and_resumed_equals_uninterrupted(
    number, clevr, sizes, tmp_path, whole
):
    draw = random.Random(number)
    stage, processes = draw.choice(["retrieval", "caption"]), draw.choice([1, 1, 2])
    where = draw.choice(["step", "write", "rename"])
    last = {
        "step": EPOCHS * STEPS[stage],
        "write": EPOCHS * STEPS[stage],
        "rename": EPOCHS * RENAMES,
    }[where]
    process = f":{draw.randrange(processes) if where == 'step' else 0}" if processes > 1 else ""
    killed_and_resumed(
        stage,
        processes,
        f"{where}:{draw.randint(1, last)}{process}",
        clevr,
        sizes,
        tmp_path / "run",
        whole,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", range(12))
def test_killed_after_a_random_time_again_and_again(number, clevr, sizes, tmp_path, whole):
    draw = random.Random(number)
    stage, processes, run = draw.choice(["retrieval", "caption"]), 1 + number % 2, tmp_path / "run"
    options = options_of(clevr, run, sizes, stage, *SAVED_OFTEN, "--resume", "auto")
    code = -signal.SIGKILL
    for _ in range(20):
        if code == 0:
            break
        code, errors = finish(
            start([FAULTY, "none:step:0", stage, *options], processes), seconds=draw.uniform(8, 25)
        )
    assert code == 0, errors[-3000:]
    assert_same(whole(stage, processes), run, stage)


def test_a_damaged_state_is_told_and_an_older_one_taken(clevr, sizes, tmp_path, caplog):
    run = tmp_path / "run"
    options = options_of(clevr, run, sizes, "retrieval", *SAVED_OFTEN, "--resume", "auto")
    break_off_after_first_epoch(options)
    newest, older = states.list_states(run)
    assert (newest.name, older.name) == ("training_state.bin.0", "training_state.bin.0.3")
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert newest_state(run).path == older
    assert "is damaged: its SHA-256" in caplog.text
    older.with_name(f"{older.name}.json").write_text("{}")
    with pytest.raises(ValueError, match="no state in .* can be used"):
        newest_state(run)


def test_what_cannot_be_continued_is_refused_before_anything_is_written(
    spot, sizes, tmp_path, capsys
):
    run = tmp_path / "run"
    options = words(spot, run, sizes, "retrieval", "--do_train")
    main_task_retrieval.main(options)
    (run / "training_state.bin.0").unlink()
    before = sorted(file.name for file in run.iterdir()), (run / "log.txt").read_text()
    named = ["--resume_model", str(run / "pytorch_model.bin.1")]
    for more, message in (
        (
            ["--resume_model", str(run / "pytorch_model.bin.0")],
            "training_state.bin.1 is what this run continues from",
        ),
        (
            ["--resume_model", str(run / "pytorch_model.bin.best")],
            "expected a file pytorch_model.bin.<epoch>",
        ),
        ([*named, "--lr", "2e-3"], "is of another run: --lr is 0.002, was 0.001. Give"),
        ([*named, "--freeze_layer_num", "2", "--resume_force"], "with these options"),
        ([*named, "--output_dir", str(tmp_path / "other")], "give --output_dir"),
        ([*named, "--resume", "auto"], "give either"),
        (["--resume_force"], "belongs to --resume auto"),
    ):
        assert message in refused("retrieval", [*options, *more], capsys)
    assert before == (sorted(file.name for file in run.iterdir()), (run / "log.txt").read_text())
    assert not (tmp_path / "other").exists()


def test_other_data_are_refused_and_changes_without_effect_are_told(
    spot, sizes, tmp_path, capsys, caplog
):
    run, moved = tmp_path / "run", tmp_path / "moved"
    options = words(spot, run, sizes, "retrieval", "--do_train")
    main_task_retrieval.main(options)
    shutil.copytree(spot, moved)
    more = ["--data_path", str(moved), "--resume", "auto", "--n_display", "7"]
    assert main_task_retrieval.main([*options, *more]) == 0
    assert f"continuing although --data_path is {moved}, was {spot}" in caplog.text
    assert "--n_display is 7, was 1" in caplog.text
    entries = json.loads((moved / "reformat_train.json").read_text())
    entries[3]["sentences"][0] += " now"
    (moved / "reformat_train.json").write_text(json.dumps(entries))
    assert "training pairs, or those that choose the epoch, are others" in refused(
        "retrieval", [*options, *more], capsys
    )


def test_resuming_with_nothing_there_begins_and_a_finished_run_is_only_evaluated(
    spot, sizes, tmp_path, caplog
):
    run = tmp_path / "run"
    options = words(spot, run, sizes, "retrieval", "--do_train", "--resume", "auto")
    assert main_task_retrieval.main(options) == 0
    assert "this run starts afresh" in caplog.text
    saved = (run / "pytorch_model.bin.1").read_bytes()
    caplog.clear()
    assert main_task_retrieval.main(options) == 0
    assert "continuing from" in caplog.text
    assert "step 1/" not in caplog.text
    assert (run / "pytorch_model.bin.1").read_bytes() == saved


@pytest.mark.parametrize(
    ("processes", "number"), [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)]
)
def test_a_signal_finishes_the_step_saves_and_exits_75(
    processes, number, clevr, sizes, tmp_path, whole
):
    run = tmp_path / "run"
    options = options_of(clevr, run, sizes, "retrieval", "--resume", "auto")
    if processes == 1:
        what = "term" if number == signal.SIGTERM else "interrupt"
        code, errors = finish(start([FAULTY, f"{what}:step:6", "retrieval", *options]))
        assert code == EXIT_TRY_AGAIN
        last = errors.strip().splitlines()[-1]
        assert last.endswith("the same command with --resume auto continues")
    else:  # the launcher gives the signal to all, and has a code of its own
        process = start([FAULTY, "slow:step:6:0", "retrieval", *options], processes)
        _wait_for(
            lambda: (
                (run / "log.txt").is_file() and "epoch 1 step 1/" in (run / "log.txt").read_text()
            )
        )
        process.send_signal(number)
        code, errors = finish(process)
        assert code != 0
        assert "stopped as asked" in errors
    assert "Traceback" not in errors or processes == 2
    [state, *_] = states.list_states(run)
    assert re.fullmatch(r"training_state\.bin\.1\.\d", state.name)
    code, errors = finish(start([FAULTY, "none:step:0", "retrieval", *options], processes))
    assert code == 0, errors[-3000:]
    assert_same(whole("retrieval", processes), run, "retrieval")


def _wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_outside_of_a_step_a_signal_stops_at_once_and_in_it_only_the_second_one():
    def signalled(finishing: bool) -> None:
        with stop.deferred() if finishing else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            reached.append(stop.requested)

    for finishing in (False, True):
        reached: list[bool] = []
        with StopSignals() as stop, pytest.raises(StopRequested):
            signalled(finishing)
        assert reached == [True] * finishing
    code = (
        "import os, signal, time; from system.signals import StopSignals\n"
        "with StopSignals() as stop, stop.deferred():\n"
        "    os.kill(os.getpid(), signal.SIGTERM); print('still there', flush=True); os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)"
    )
    process = start(["-c", code])
    output, _ = process.communicate(timeout=60)
    assert output == "still there\n"
    assert process.returncode == -signal.SIGTERM


def test_the_best_and_the_newest_weights_are_kept_and_each_removal_is_told(
    spot, tmp_path, tiny_captioner, caplog
):
    caplog.set_level("INFO")
    names = {}
    for keep in (2, -1):
        files, progress = RunFiles(tmp_path / str(keep), keep, {}, "data", {}), Progress()
        files.folder.mkdir()
        for epoch, score in enumerate([0.1, 0.5, 0.2, 0.3, 0.4]):
            progress.finish_epoch(1.0)
            files.save_weights(tiny_captioner, epoch)
            files.save_state({"model": {}}, progress)
            progress.judge(epoch, score)
            files.save_progress(progress)
        names[keep] = sorted(
            path.name for path in files.folder.iterdir() if not path.name.endswith(".json")
        )
        assert (files.folder / "pytorch_model.bin.best").resolve().name == "pytorch_model.bin.1"
    assert names[2] == [
        "pytorch_model.bin.1",
        "pytorch_model.bin.3",
        "pytorch_model.bin.4",
        "pytorch_model.bin.best",
        "training_state.bin.3",
        "training_state.bin.4",
    ]
    assert len(names[-1]) == 11
    for name in (
        "pytorch_model.bin.0",
        "pytorch_model.bin.2",
        "training_state.bin.0",
        "training_state.bin.2",
    ):
        assert f"removed {tmp_path / '2' / name} (--keep_checkpoints 2)" in caplog.text


def test_a_forgotten_resume_loses_nothing_until_the_new_run_saves(
    spot, sizes, tmp_path, caplog, monkeypatch
):
    run = tmp_path / "run"
    options = words(spot, run, sizes, "retrieval", "--do_train")
    main_task_retrieval.main(options)
    before = newest_state(run)

    def killing(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_optimizer_step", killing)
        with pytest.raises(Killed):
            main_task_retrieval.main(options)
    assert "until then it can be stopped" in caplog.text
    assert newest_state(run) == before
    break_off_after_first_epoch(options)
    assert [path.name for path in states.list_states(run)] == ["training_state.bin.0"]


def test_a_full_disk_leaves_the_last_state_and_says_what_is_missing(
    spot, sizes, tmp_path, capsys, monkeypatch
):
    run = tmp_path / "run"
    options = words(spot, run, sizes, "retrieval", "--do_train", *SAVED_OFTEN)
    usage, calls = shutil.disk_usage(tmp_path), []

    def nearly_full(folder):
        calls.append(folder)
        return usage._replace(free=1_000_000 if len(calls) == 4 else usage.free)

    monkeypatch.setattr(states.shutil, "disk_usage", nearly_full)
    line = refused("retrieval", options, capsys)
    assert re.search(
        r"(training_state|pytorch_model)\.bin\.0\.?\d?: it takes 0\.\d+ GB, 0\.001 GB are free, 0\.\d+ GB are missing; make room",
        line,
    )
    kept = newest_state(run)
    assert kept.progress.epoch == 0
    assert kept.tensors()["model"].keys()
    assert not [path for path in run.iterdir() if path.name.startswith(".training_state")]


def test_a_disk_that_fills_up_while_writing_leaves_the_last_state(spot, sizes, tmp_path):
    """A limit on a file's size stands for the full disk: the system refuses to write on, in the middle."""
    run, big = tmp_path / "run", 20_000_000  # bytes; a state takes more
    options = words(spot, run, sizes, "retrieval", "--do_train", *SAVED_OFTEN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    break_off_after_first_epoch(options)
    before = newest_state(run)
    resource.setrlimit(resource.RLIMIT_FSIZE, (big, limits[1]))
    try:
        with pytest.raises(
            OSError, match="cannot write .*--resume auto continues from the last state"
        ):
            RunFiles(run, 2, {}, "data", {}).save_state(
                {"model": torch.zeros(big)}, Progress(epoch=1)
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert newest_state(run) == before


def test_two_runs_in_one_folder_are_refused(spot, sizes, tmp_path, capsys):
    run = tmp_path / "run"
    process = start(
        [FAULTY, "hang:step:1", "retrieval", *words(spot, run, sizes, "retrieval", "--do_train")]
    )
    _wait_for(lambda: (run / "log.txt").is_file())
    assert f"{run} is in use by another run" in refused(
        "retrieval", words(spot, run, sizes, "retrieval", "--do_train"), capsys
    )
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert main_task_retrieval.main(words(spot, run, sizes, "retrieval", "--do_train")) == 0


def test_a_step_without_finite_gradients_moves_nothing():
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = BertAdam([parameter], lr=0.1, max_global_norm=1.0)
    for bad in (float("nan"), float("inf")):
        parameter.grad = torch.tensor([0.1, bad, 0.1])
        optimizer.step()
    assert torch.equal(parameter, torch.ones(3))
    assert optimizer.skipped_steps == 2
    parameter.grad = torch.full((3,), 0.1)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))
    assert parameter.isfinite().all()


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
def test_bad_numbers_are_skipped_counted_and_their_pairs_named(
    stage, clevr, sizes, tmp_path, monkeypatch, caplog
):
    name = {"retrieval": "AdaptationStep", "caption": "FinetuningStep"}[stage]
    forward, ids = getattr(stages, name).forward, []

    def sometimes_nan(step, batch):
        ids.append(batch)
        return forward(step, batch) * (float("nan") if len(ids) == 2 else 1)

    monkeypatch.setattr(getattr(stages, name), "forward", sometimes_nan)
    assert SCRIPTS[stage].main(words(clevr, tmp_path / "run", sizes, stage, "--do_train")) == 0
    [line] = [
        record.getMessage()
        for record in caplog.records
        if "a step is skipped" in record.getMessage()
    ]
    assert re.search(
        r"epoch 0: a step is skipped, its gradients are not finite \(loss nan; 1 in a row, 1 in all\): 00000\d\.png, .*png",
        line,
    )
    history = pd.read_csv(tmp_path / "run" / "history.csv")
    assert history["loss"].notna().all()
    saved = torch.load(tmp_path / "run" / "pytorch_model.bin.1", weights_only=True)
    assert all(value.isfinite().all() for value in saved.values())


def test_nothing_but_bad_numbers_ends_the_run_with_the_last_good_state(
    clevr, sizes, tmp_path, monkeypatch, capsys
):
    forward, calls = contrastive.Contrastive.forward, []

    def nan_from_the_second_epoch_on(step, batch):
        calls.append(1)
        return forward(step, batch) * (float("nan") if len(calls) > STEPS["retrieval"] else 1)

    monkeypatch.setattr(contrastive.Contrastive, "forward", nan_from_the_second_epoch_on)
    monkeypatch.setattr(monitors, "MAX_NONFINITE_STEPS", 3)
    run = tmp_path / "run"
    line = refused("retrieval", options_of(clevr, run, sizes, "retrieval"), capsys)
    assert "3 steps in a row had no finite gradients" in line
    assert newest_state(run).path.name == "training_state.bin.0"


def test_an_epoch_without_any_finite_loss_ends_the_run(clevr, sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        objectives, "contrastive_loss", lambda similarity: similarity.sum() * float("nan")
    )
    assert "no batch of epoch 0 had a finite loss" in refused(
        "retrieval", options_of(clevr, tmp_path / "run", sizes, "retrieval"), capsys
    )


def test_fp16_scaling_goes_on_after_a_resume(clevr, sizes, tmp_path):
    """On the CPU too; its scale, which a step that overflows halves, is part of the state."""
    run = tmp_path / "run"
    options = options_of(clevr, run, sizes, "retrieval", "--precision", "fp16")
    break_off_after_first_epoch(options)
    scaler = newest_state(run).tensors()["scaler"]
    assert scaler["scale"] > 0
    assert main_task_retrieval.main([*options, "--resume", "auto"]) == 0


def test_deterministic_runs_give_the_same_weights(clevr, sizes, tmp_path, monkeypatch):
    seen, update = [], loop._optimizer_step
    monkeypatch.setattr(
        loop,
        "_optimizer_step",
        lambda trainer: (
            seen.append(torch.are_deterministic_algorithms_enabled()),
            update(trainer),
        )[1],
    )
    for name in ("one", "two"):
        assert (
            main_task_retrieval.main(
                words(clevr, tmp_path / name, sizes, "retrieval", "--do_train", "--deterministic")
            )
            == 0
        )
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()
    assert same_weights(
        tmp_path / "one" / "pytorch_model.bin.1", tmp_path / "two" / "pytorch_model.bin.1"
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            2,
            "out of memory: use a smaller --batch_size",
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
def test_want_of_memory_is_one_line(error, code, said, clevr, sizes, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(contrastive.Contrastive, "forward", fail)
    with pytest.raises(SystemExit) as stop:
        main_task_retrieval.main(options_of(clevr, tmp_path / "run", sizes, "retrieval"))
    assert stop.value.code == code
    assert said in capsys.readouterr().err.splitlines()[-1]


def spoil(images: Path) -> None:
    """Of the first four training pairs one image each: empty, cut off, text, a folder; a fifth one's is missing."""
    names = [f"{number}_2.png" for number in range(5)]
    whole_file = (images / names[1]).read_bytes()
    (images / names[0]).write_bytes(b"")
    (images / names[1]).write_bytes(whole_file[: len(whole_file) // 2])
    (images / names[2]).write_text("no image")
    (images / names[3]).unlink()
    (images / names[3]).mkdir()
    (images / names[4]).unlink()


@pytest.mark.parametrize("cached", [False, True])
def test_images_that_cannot_be_read_end_the_run_before_it_begins_or_are_gone_without(
    cached, spot, sizes, tmp_path, capsys, caplog
):
    data = tmp_path / "data"
    shutil.copytree(spot, data)
    spoil(data / "images_test")
    more = [
        "--do_train",
        "--batch_size",
        "2",
        *(["--image_cache", str(tmp_path / "cache")] if cached else []),
    ]
    options = words(data, tmp_path / "run", sizes, "retrieval", *more)
    assert "no image" in refused("retrieval", options, capsys)
    shutil.copy2(data / "images_test" / "4.png", data / "images_test" / "4_2.png")
    line = refused("retrieval", options, capsys)
    assert "0_2.png" in line
    assert cached or "3 more of 26 images cannot be read either (--on_bad_image skip" in line
    (data / "images_test" / "4_2.png").unlink()
    assert not (tmp_path / "run").exists()
    assert main_task_retrieval.main([*options, "--on_bad_image", "skip"]) == 0
    assert "the train split goes without 5 of its 8 pairs" in caplog.text
    for name in ("0_2", "1_2", "2_2", "3_2", "4_2"):
        assert f"images_test/{name}.png" in caplog.text


def test_images_are_checked_once_and_again_where_one_has_changed(spot, sizes, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(spot, data)
    options = words(data, tmp_path / "run", sizes, "retrieval", "--do_train", "--epochs", "1")
    said = "checking that 26 images can be read"
    for again in (False, True):
        assert main_task_retrieval.main(options) == 0
        assert main_task_retrieval.main(options) == 0
        assert [record.getMessage() for record in caplog.records].count(said) == 1 + again
        Image.open(data / "images_test" / "1.png").rotate(180).save(data / "images_test" / "1.png")


def torchrun_fault(
    fault: str,
    data: Path,
    run: Path,
    sizes: Path,
    *more: str,
    stage: str = "retrieval",
    seconds: float = 240,
    **environment: str,
) -> tuple[int, str, float]:
    begun = time.monotonic()
    code, errors = finish(
        start(
            [FAULTY, fault, stage, *options_of(data, run, sizes, stage, *more)], 2, **environment
        ),
        seconds,
    )
    return code, errors, time.monotonic() - begun


@pytest.mark.parametrize(
    ("fault", "shown"),
    [
        ("raise:step:3:1", "this process fails on purpose"),
        ("kill:step:3:1", "Signal 9"),
        pytest.param("hang:step:3:1", "another process has ended or hangs", marks=pytest.mark.slow),
    ],
)
def test_one_process_that_fails_or_hangs_ends_the_job(fault, shown, clevr, sizes, tmp_path):
    code, errors, _ = torchrun_fault(fault, clevr, tmp_path / "run", sizes, HANG="15", seconds=150)
    assert code not in (0, -signal.SIGKILL), "it had to be killed"
    assert shown in errors


def test_scoring_may_take_longer_than_processes_wait_for_a_step(clevr, sizes, tmp_path):
    code, errors, seconds = torchrun_fault(
        "slow:score:1:0", clevr, tmp_path / "run", sizes, "--epochs", "1", stage="caption", HANG="4"
    )
    assert code == 0, errors[-3000:]
    assert seconds > 5


def test_early_stop_reaches_all_processes(clevr, sizes, tmp_path):
    code, errors, _ = torchrun_fault(
        "impatient:step:0",
        clevr,
        tmp_path / "run",
        sizes,
        "--lr",
        "1e-12",
        "--epochs",
        "9",
        stage="caption",
    )
    assert code == 0, errors[-3000:]
    assert "epochs in a row brought nothing better" in (tmp_path / "run" / "log.txt").read_text()
    assert len(pd.read_csv(tmp_path / "run" / "history.csv")) < 9


def test_more_pairs_than_fill_the_batches_of_two_processes(sizes, tmp_path):
    """7 scenes in batches of 2·2: the last incomplete batch is dropped in training, nothing is scored twice or left out."""
    data = make_clevr(tmp_path / "data", {"train": 7, "val": 3, "test": 5})
    code, errors, _ = torchrun_fault("none:step:0", data, tmp_path / "run", sizes, stage="caption")
    assert code == 0, errors[-3000:]
    captioned = [
        row["image_id"] for row in json.loads((tmp_path / "run" / "hyp_ep_eval.json").read_text())
    ]
    assert sorted(captioned) == sorted(
        [f"{n:06d}.png{kind}" for n in range(10, 15) for kind in ("", "_n")]
    )


@pytest.mark.parametrize(
    "launcher",
    [
        ["--standalone"],
        pytest.param(["--nnodes=1", "--master_port={port}"], marks=pytest.mark.slow),
    ],
)
def test_a_killed_process_is_restarted_and_goes_on_from_the_last_state(
    launcher, clevr, sizes, tmp_path, whole
):
    run = tmp_path / "run"
    code, errors = finish(
        start(
            [
                "-m",
                "torch.distributed.run",
                *(word.format(port=free_port()) for word in launcher),
                "--nproc_per_node=2",
                "--max-restarts=1",
                FAULTY,
                "kill:step:7:1",
                "retrieval",
                *options_of(clevr, run, sizes, "retrieval", *SAVED_OFTEN, "--resume", "auto"),
            ]
        )
    )
    assert code == 0, errors[-3000:]
    assert "continuing from" in (run / "log.txt").read_text()
    assert_same(whole("retrieval", 2), run, "retrieval")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_several_agents_that_would_send_restarted_processes_astray_are_refused(monkeypatch):
    for name, value in (("USE_AGENT_STORE", "True"), ("MAX_RESTARTS", "3"), ("RESTART_COUNT", "0")):
        monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        runtime._restart_store()
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "0")
    assert runtime._restart_store() is None


@pytest.mark.parametrize("killed", ["worker", pytest.param("agent", marks=pytest.mark.slow)])
def test_two_agents_go_on_from_the_last_state_when_one_is_killed(
    killed, clevr, sizes, tmp_path, whole
):
    run, port = tmp_path / "run", free_port()

    def agent(fault: str):
        return start(
            [
                "-m",
                "torch.distributed.run",
                "--nnodes=2",
                "--nproc_per_node=1",
                "--max-restarts=3",
                "--rdzv_id=job",
                "--rdzv_backend=c10d",
                f"--rdzv_endpoint=127.0.0.1:{port}",
                FAULTY,
                fault,
                "retrieval",
                *options_of(clevr, run, sizes, "retrieval", *SAVED_OFTEN, "--resume", "auto"),
            ],
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            HANG="60",
        )

    agents = [agent("kill:step:7:1" if killed == "worker" else "hang:step:7:1") for _ in range(2)]
    if killed == "agent":
        _wait_for(lambda: (run / "training_state.bin.1.2.json").is_file())
        os.killpg(agents[1].pid, signal.SIGKILL)
        agents[1].wait()  # its worker, which it leaves behind, holds the pipes
        agents[1] = agent("none:step:0")
    for process in agents:
        code, errors = finish(process, 400)
        assert code == 0, errors[-3000:]
    assert "continuing from" in (run / "log.txt").read_text()
    assert_same(whole("retrieval", 2), run, "retrieval")
