"""--device: which device a name stands for, and one line where it cannot be had."""

import pytest
import torch

import app
import CLIP4IDCinference
import main_task_retrieval
from modules.predictor import Predictor
from system.compute import choose_precision, select_device
from tests.runs import arguments, run_refused

CPU = torch.device("cpu")


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs, as torch shows it; what becomes the current device is recorded."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90a", "compute_90"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.parametrize(
    ("name", "expected"),
    [("auto", "cuda:0"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")],
)
def test_names_with_two_gpus(gpus, name, expected):
    assert select_device(name) == torch.device(expected)
    assert gpus == ([] if expected == "cpu" else [torch.device(expected)])


def test_each_process_takes_its_own_gpu(gpus, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert select_device("cuda", local_rank=0) == torch.device("cuda:1")
    assert select_device("auto") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="cuda:0 is one GPU for several processes"):
        select_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU: 2 are visible"):
        select_device("auto")


def test_an_old_launcher_says_its_rank_by_the_argument(gpus):
    assert select_device("auto", local_rank=1) == torch.device("cuda:1")


def test_a_gpu_that_is_not_there(gpus):
    with pytest.raises(ValueError, match="device cuda:2: 2 GPUs are visible, numbered from 0"):
        select_device("cuda:2")
    assert gpus == []


def test_a_gpu_that_is_too_old_for_this_torch(gpus, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    for name in ("auto", "cuda"):
        with pytest.raises(ValueError, match=r"7\.0\) is too old for torch .* needs 7\.5"):
            select_device(name)
    assert select_device("cpu") == CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (12, 0))
    assert select_device("cuda") == torch.device("cuda:0")  # newer than what torch was built for


def test_a_precision_that_the_gpu_lacks(gpus, monkeypatch):
    gpu = torch.device("cuda:0")
    assert choose_precision("bf16", gpu) == "bf16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    with pytest.raises(ValueError, match="precision bf16: NVIDIA H200 .* use fp16, or auto"):
        choose_precision("bf16", gpu)
    assert choose_precision("fp16", gpu) == "fp16"
    assert choose_precision("bf16", CPU) == "bf16"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("cuda", "visible", "reason"),
    [
        ("13.0", "", "CUDA_VISIBLE_DEVICES hides all of them"),
        ("13.0", None, "torch sees no NVIDIA driver"),
        (None, None, "is a build without CUDA"),
    ],
)
def test_why_there_is_no_gpu(no_gpu, monkeypatch, cuda, visible, reason):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(ValueError, match=reason):
        select_device("cuda:1")
    assert select_device("auto") == CPU


def test_apples_gpu_is_for_one_process(no_gpu, monkeypatch):
    with pytest.raises(ValueError, match="device mps: this machine or this torch has no MPS"):
        select_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("mps") == select_device("auto") == torch.device("mps")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert select_device("auto") == CPU
    with pytest.raises(ValueError, match="one process only"):
        select_device("mps")


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CPU", "", "cuda:0000"])
@pytest.mark.parametrize("main", [main_task_retrieval.main, CLIP4IDCinference.main, app.main])
def test_other_names_are_refused_in_one_line(name, main, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--device", name])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"argument --device: {name!r} is no device, expected auto, cpu, cuda" in line


def test_a_run_without_the_wanted_gpu_leaves_nothing(no_gpu, clevr, tiny_sizes, tmp_path, capsys):
    words = arguments(clevr, tmp_path / "run", tiny_sizes, "retrieval", "--do_train")
    line = run_refused("retrieval", [*words, "--device", "cuda"], capsys)
    assert "device cuda: no GPU was found" in line
    assert not (tmp_path / "run").exists()


def test_predictor_takes_names_and_devices(no_gpu):
    assert Predictor.load(device="cpu").runtime.device == CPU
    assert Predictor.load(device=CPU).runtime.device == CPU
    for name, message in (("cuda", "no GPU was found"), ("gpu", "'gpu' is no device")):
        with pytest.raises(ValueError, match=message):
            Predictor.load(device=name)


def test_the_page_computes_where_it_is_told(no_gpu, capsys):
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with pytest.raises(SystemExit) as stop:
        app.main(["--device", "cuda", "--port", "7999"])
    assert stop.value.code == 2
    assert "device cuda: no GPU was found" in capsys.readouterr().err.splitlines()[-1]
