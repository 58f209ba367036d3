"""benchmarks/gpu.py: every line of it runs in small on the CPU, and what fails is a row."""

import json
import signal
import time
from argparse import Namespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_parts import setting, tables
from benchmarks.gpu_parts.setting import SMOKE, Setting, attempt


def test_smoke(tmp_path, capfd):
    output, table = tmp_path / "rows.jsonl", tmp_path / "table.md"
    code = gpu.main(["--smoke", "--output", str(output), "--table", str(table)])
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row for row in rows if gpu.is_bad(row)] == []
    assert code == 0
    finished = [row["part"] for row in rows if row["what"] == "whole part"]
    assert finished == list(gpu.PARTS)
    printed = capfd.readouterr().out.splitlines()
    assert printed[: len(rows)] == output.read_text().splitlines()
    text = table.read_text()
    for title in ("**Training**", "**Captioning**", "**Reading data**", "**Checks**", "CIDEr-D"):
        assert title in text
    assert "**Failed**" not in text


@pytest.fixture
def parts(monkeypatch):
    """Replaces the parts; a part is a function in this file."""

    def set_parts(**functions):
        monkeypatch.setattr(gpu, "PARTS", {name: f"x:{name}" for name in functions})
        module = Namespace(**functions)
        monkeypatch.setattr(gpu, "import_module", lambda name: module)

    return set_parts


def run_here(capfd, *parts: str) -> list[dict]:
    words = ["--in_this_process", "--device", "cpu", "--parts", *parts]
    assert gpu.main(words) == 0
    return [json.loads(line) for line in capfd.readouterr().out.splitlines()]


def test_a_part_that_fails_is_a_row_and_the_next_one_runs(parts, capfd):
    def one(setting):
        print("not a row")
        yield {"what": "first", "value": 1}
        raise ValueError("no such kernel\nsecond line")

    def two(setting):
        yield attempt("second", lambda: {"value": 2})

    parts(one=one, two=two)
    rows = run_here(capfd, "one", "two")
    assert rows[0] == {"part": "one", "what": "first", "value": 1}
    assert rows[1]["failed"].startswith("no such kernel")
    assert rows[3] == {"part": "two", "what": "second", "value": 2}
    assert [row["part"] for row in rows if row.get("what") == "whole part"] == ["one", "two"]


def test_a_part_has_so_much_time(parts, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "PART_SECONDS", 1)

    def endless(setting):
        yield {"what": "first"}
        while True:
            time.sleep(0.01)

    parts(endless=endless)
    rows = run_here(capfd, "endless")
    assert rows[1] == {"part": "endless", "failed": "stopped after 1 seconds"}
    assert signal.alarm(0) == 0


def test_a_measurement_that_fails_is_a_row_with_its_fields():
    def fail():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 90 GiB")

    row = attempt("training step", fail, batch=256)
    assert row == {
        "what": "training step",
        "batch": 256,
        "failed": "CUDA out of memory. Tried to allocate 90 GiB",
    }


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import sys; sys.exit(7)", "its process ended with 7: "),
        ("import sys; print('line one', file=sys.stderr); sys.exit('why')", "with 1: why"),
        ("import os; os.abort()", "its process ended with -6: "),
        ("import time; time.sleep(60)", "its process ended with -9: "),
    ],
)
def test_a_process_that_dies_or_hangs_is_a_row(code, expected, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(code)
    monkeypatch.setattr(gpu, "__file__", str(script))
    monkeypatch.setattr(gpu, "START_SECONDS", 3)
    monkeypatch.setattr(gpu, "PART_SECONDS", 0)
    output = tmp_path / "rows.jsonl"
    assert gpu.main(["--parts", "device", "golden", "--output", str(output)]) == 1
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["part"] for row in rows] == ["device", "golden"]
    for row in rows:
        assert expected in row["failed"]


def test_no_part_is_started_late(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(gpu, "TOTAL_SECONDS", 0)
    assert gpu.main(["--parts", "device"]) == 1
    assert "not started: 0 seconds have passed" in capfd.readouterr().out


def test_wrong_input_is_one_line(capsys, monkeypatch):
    for words, message in (
        (["--parts", "speed"], "no such part: speed; there are device, golden"),
        (["--device", "gpu"], "'gpu' is no device"),
    ):
        with pytest.raises(SystemExit) as stop:
            gpu.main(words)
        assert stop.value.code == 2
        assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--device", "cuda", "--output", str(tmp_path / "rows.jsonl")])
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("cpu always works")
    assert "device cuda: no GPU was found" in line


def training_row(**fields):
    found = {"part": "training", "what": "training step", "stage": "finetuning"}
    found |= {"precision": "bf16", "compiled": False, "batch": 128, "pairs_per_second": 900.0}
    return {**found, "share_of_matrix_rate": 0.3, "peak_gb": 9.5, "first_seconds": 1.0, **fields}


def test_aims_stand_beside_the_figures():
    rows = [
        training_row(),
        training_row(compiled=True, share_of_matrix_rate=0.45),
        training_row(compiled=True, stage="adaptation", share_of_matrix_rate=0.449),
        training_row(compiled=True, batch=64, share_of_matrix_rate=0.2),
        {"what": "captioning", "method": "greedy", "batch": 1024, "pairs_per_second": 7999.0},
        {"what": "captioning", "method": "greedy", "batch": 64, "pairs_per_second": 9000.0},
        loader_row(900.0),
        loader_row(100.0, workers=8),
        loader_row(100.0, images="files"),
    ]
    text = tables.format_tables(rows)
    lines = [line for line in text.splitlines() if line.endswith(("met |", "missed |"))]
    assert lines == [
        "| finetuning, batch 128, --compile: 45% of the bf16 rate | 45.0 % | met |",
        "| adaptation, batch 128, --compile: 45% of the bf16 rate | 44.9 % | missed |",
        "| greedy, batch 1,024: 8,000 pairs/s | 7,999 | missed |",
        "| finetuning: 16 workers and a cache give what the step eats | 900 of 900 pairs/s | met |",
    ]


def loader_row(rate: float, **fields):
    found = {"what": "loader", "stage": "finetuning", "images": "cache", "workers": 16}
    return {**found, "pairs_per_second": rate, **fields}


def test_what_failed_and_what_is_wrong_stand_in_the_table():
    rows = [
        {"part": "golden", "what": "golden outputs", "ok": False, "difference": 0.012345},
        {"part": "training", "what": "training step", "batch": 256, "failed": "out of memory"},
    ]
    text = tables.format_tables(rows)
    assert "| golden outputs | difference 0.012 | wrong |" in text
    assert "- training (training step, 256): out of memory" in text
    assert [gpu.is_bad(row) for row in rows] == [True, True]


def test_a_script_that_fails_says_why(tmp_path):
    with pytest.raises(RuntimeError, match="main_task_retrieval.py ended with 2: .*--do_train"):
        setting.run_to_end(["main_task_retrieval.py"])
    small = Setting(torch.device("cpu"), SMOKE, tmp_path)
    assert small.workers == 2
    never = pytest.raises(RuntimeError, match="it ended before 'epoch 9'")
    with never, setting.start(["main_task_retrieval.py", "--help"]) as process:
        setting.wait_for_line(process, "epoch 9")
