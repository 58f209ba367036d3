"""Runs of both entry scripts on tiny drawn data, in this process, in another, and under torchrun."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image

import CLIP4IDCinference
import main_task_retrieval
from tests.conftest import ROOT

SCRIPTS = {"retrieval": main_task_retrieval, "caption": CLIP4IDCinference}
FILES = {"retrieval": "main_task_retrieval.py", "caption": "CLIP4IDCinference.py"}


def words(data: Path, output: Path, sizes: Path, stage: str, *more: str) -> list[str]:
    """A command line for data as `make_spot` or `make_clevr` draws it, and a CLIP of `tiny_sizes`."""
    datatype = "clevr" if (data / "splits.json").exists() else "spot"
    return [
        "--data_path",
        str(data),
        "--features_path",
        str(data / "images_test"),
        "--output_dir",
        str(output),
        "--datatype",
        datatype,
        "--batch_size",
        "4",
        "--batch_size_val",
        "2",
        "--max_words",
        "12",
        "--epochs",
        "2",
        "--n_display",
        "1",
        "--num_thread_reader",
        "0",
        "--intra_num_hidden_layers",
        "1",
        "--pretrained_clip_name",
        str(sizes),
        "--lr",
        "1e-3",
        *(
            ["--gt_dir", str(data / "gt"), "--decoder_num_hidden_layers", "1"]
            if stage == "caption"
            else []
        ),
        *more,
    ]


def refused(stage: str, options: list[str], capsys: pytest.CaptureFixture) -> str:
    """The last line on stderr of a run that ends with 2."""
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[stage].main(options)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def start(program: list[str], processes: int = 1, **environment: str) -> subprocess.Popen:
    """A Python program with its words, alone or under torchrun, in a session of its own, its output kept."""
    launcher = (
        []
        if processes == 1
        else ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    )
    return subprocess.Popen(
        [sys.executable, *launcher, *program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        start_new_session=True,
    )


def finish(process: subprocess.Popen, seconds: float = 300) -> tuple[int, str]:
    """Its exit code, and what it wrote on stderr; after so many seconds it is killed with all that it started."""
    try:
        _, errors = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, errors = process.communicate()
    return process.returncode, errors


def same_weights(one: Path, other: Path) -> bool:
    """Whether two files hold the same tensors, bit for bit."""
    left, right = (torch.load(path, weights_only=True) for path in (one, other))
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def check_board(run: Path, epochs: int, score: str) -> None:
    """TensorBoard reads what history.csv says, a picture for each epoch, and the losses of steps that come one after another."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    history = pd.read_csv(run / "history.csv")
    for name in ("loss", score):
        assert [event.value for event in board.Scalars(f"epoch/{name}")] == pytest.approx(
            history[name].tolist()
        )
    pictures = board.Images("samples")
    assert [event.step for event in pictures] == [
        event.step for event in board.Scalars("epoch/loss")
    ]
    assert Image.open(io.BytesIO(pictures[0].encoded_image_string)).size[0] > 900
    steps = [event.step for event in board.Scalars("step/loss")]
    assert len(pictures) == epochs
    assert steps == list(range(1, len(steps) + 1))
    assert steps[-1] == pictures[-1].step
