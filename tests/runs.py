"""Runs of both entry scripts on tiny drawn data: in this process, in another, under torchrun."""

import contextlib
import io
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from PIL import Image

import CLIP4IDCinference
import main_task_retrieval
from tests import quick_python
from tests.conftest import ROOT

SCRIPTS = {"retrieval": main_task_retrieval, "caption": CLIP4IDCinference}
FILES = {"retrieval": "main_task_retrieval.py", "caption": "CLIP4IDCinference.py"}
SCORE = {"retrieval": "text_to_pair_R1", "caption": "CIDEr"}  # which chooses the epoch
STEPS = {"retrieval": 4, "caption": 2}  # of an epoch on the datasets of conftest.SIZES
SAVED_OFTEN = ("--save_every_steps", "1")
FAULTY = "tests/faulty_run.py"  # its first word is a fault, its second a task
NO_FAULT = "none"
TORCHRUN = ("-m", "torch.distributed.run")


def arguments(data: Path, output: Path, sizes: Path, task: str, *more: str) -> list[str]:
    """The command line of a run on data as `make_spot` or `make_clevr` draws it.

    `sizes` is the file of `tiny_sizes`. What `more` repeats takes precedence.
    """
    found = [
        *("--datatype", "clevr" if (data / "splits.json").exists() else "spot"),
        *("--data_path", str(data), "--features_path", str(data / "images_test")),
        *("--output_dir", str(output), "--pretrained_clip_name", str(sizes)),
        *("--batch_size", "4", "--batch_size_val", "2", "--max_words", "12"),
        *("--epochs", "2", "--lr", "1e-3", "--intra_num_hidden_layers", "1"),
        *("--n_display", "1", "--num_thread_reader", "0"),
    ]
    if task == "caption":
        found += ["--gt_dir", str(data / "gt"), "--decoder_num_hidden_layers", "1"]
    return [*found, *more]


def run_refused(task: str, options: list[str], capsys: pytest.CaptureFixture) -> str:
    """The last line on stderr of a run that ends with 2."""
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[task].main(options)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


class Killed(BaseException):
    """Stands for the death of a process that is this one."""


def do_nothing(*_: Any) -> None:
    """What most calls of `with_fault` do besides."""


def with_fault(
    original: Callable, number: int, before: Callable = do_nothing, after: Callable = do_nothing
) -> Callable:
    """`original`; around its call `number` come `before` and `after`, with its arguments."""
    calls = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        is_now = calls == number
        if is_now:
            before(*args)
        result = original(*args, **more)
        if is_now:
            after(*args)
        return result

    return counted


def die_at(patch: pytest.MonkeyPatch, owner: Any, name: str, call: int = 1) -> None:
    """Call `call` of `owner.name` raises Killed instead of doing anything."""

    def die(*_: Any) -> None:
        raise Killed

    patch.setattr(owner, name, with_fault(getattr(owner, name), call, before=die))


def start(program: list[str], processes: int = 1, **environment: str) -> subprocess.Popen:
    """Start a Python program with its words, alone or under torchrun, and keep its output.

    It is a fork of a process that has imported torch already, in a session of its own.
    """
    python = quick_python.executable()
    launcher = []
    if processes > 1:
        launcher = [*TORCHRUN, "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen(
        [python, *launcher, *program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHON_EXEC": python, **environment},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Its exit code, and what it wrote on stderr; after so many seconds it is killed."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    return process.returncode, errors


def kill_all_of(run: Path) -> None:
    """SIGKILL all processes whose command lines name a run's folder: launcher and workers."""
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if str(run) in cmdline.read_text():
                os.kill(int(cmdline.parent.name), signal.SIGKILL)


def succeed(program: list[str], processes: int = 1) -> None:
    """Run a program, which must end with 0."""
    code, errors = finish(start(program, processes))
    assert code == 0, errors[-3000:]


def log_of(run: Path) -> str:
    """A run's log.txt; nothing where it has none yet."""
    path = run / "log.txt"
    return path.read_text() if path.is_file() else ""


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Until it is true; fails after so many seconds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def free_port() -> int:
    """A port of this machine at which nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def is_listening(port: int) -> bool:
    """Whether a process of this machine accepts connections at a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0


def same_weights(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    left = torch.load(one, weights_only=True)
    right = torch.load(other, weights_only=True)
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def check_tensorboard(run: Path, epochs: int, score: str) -> None:
    """TensorBoard reads what history.csv says, a picture for each epoch, and each step once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    history = pd.read_csv(run / "history.csv")
    for name in ("loss", score):
        values = [event.value for event in board.Scalars(f"epoch/{name}")]
        assert values == pytest.approx(history[name].tolist())
    pictures = board.Images("samples")
    assert len(pictures) == epochs
    epoch_ends = [event.step for event in board.Scalars("epoch/loss")]
    assert [event.step for event in pictures] == epoch_ends
    picture = Image.open(io.BytesIO(pictures[0].encoded_image_string))
    assert picture.size[0] > 900
    steps = [event.step for event in board.Scalars("step/loss")]
    assert steps == list(range(1, epoch_ends[-1] + 1))
