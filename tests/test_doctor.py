"""`clip4idc doctor`: what works and what does not, with and without torch, and its exit code."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from clip4idc import doctor
from clip4idc.doctor import Finding
from tests.conftest import ROOT

LINE = re.compile(r"([✔✘–]) ([^:]+): (.+)")


def examine(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[tuple[str, ...]]]:
    """The exit code, and mark, part and text of each line between the first and the last."""
    code = doctor.main([*words])
    first, *lines, last = capsys.readouterr().out.splitlines()
    assert first.startswith("clip4idc 0.")
    assert last.startswith("Captioning works.") == (code == 0)
    return code, [LINE.fullmatch(line).groups() for line in lines]


def test_all_is_found_and_the_example_is_captioned(capsys, tmp_path) -> None:
    code, lines = examine(capsys, "--data", str(tmp_path))
    assert code == 0
    found = {part: (mark, text) for mark, part, text in lines}
    for part in ("Python", "packages", "device", "Java", "disk", "cache", "weights", "caption"):
        assert found[part][0] == "✔", (part, found[part])
    assert found["device"][1].startswith(("cpu, in fp32, with torch ", "cuda"))
    assert "demo/model.safetensors (20 MB)" in found["weights"][1]
    assert found["dataset"][0] == "–"
    assert found["caption"][1].startswith('"the big red matte block is missing", in ')
    assert lines[-1][1] == "caption"


def test_without_torch_it_says_so_in_any_encoding() -> None:
    done = subprocess.run(
        [sys.executable, "-S", "-m", "clip4idc", "doctor", "--data", "docs"],
        cwd=ROOT,
        env={"PYTHONIOENCODING": "ascii", "PATH": "/nowhere"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ""
    for part in ("packages: no torch, ", "device: torch is not installed", "caption: torch is not"):
        (line,) = re.findall(rf"^NO {part}.+$", done.stdout, re.MULTILINE)
        assert "bash scripts/setup.sh" in line
    assert done.stdout.endswith("\nCaptioning does not work yet: see the lines above.\n")


@pytest.fixture
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the checks of files, and an example that works."""

    def caption(data: Path) -> Iterator[Finding]:
        yield Finding(True, "caption", "fine")

    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_weights, doctor.check_datasets, caption))


@pytest.mark.usefixtures("_quick")
def test_datasets_below_a_folder_are_counted(capsys, tmp_path, clevr, spot) -> None:
    (tmp_path / "c").symlink_to(clevr)
    (tmp_path / "s").symlink_to(spot)
    (tmp_path / "mine").mkdir()
    rows = ["before,after,split,caption", "a.png,b.png,train,x", "a.png,c.png,test,y"]
    (tmp_path / "mine" / "pairs.csv").write_text("\n".join(rows))
    (tmp_path / "mine" / "prices.csv").write_text("item,price\nx,2\n")
    (tmp_path / "wrong.tsv").write_text("before\tafter\tsplit\tcaption\na.png\t\ttrain\tx\n")
    code, lines = examine(capsys, "--data", str(tmp_path))
    assert code == 0
    found = [(mark, text) for mark, part, text in lines if part == "dataset"]
    assert [mark for mark, _ in found] == ["✘", "✔", "✔", "✔"]
    assert "wrong.tsv line 2" in found[0][1]
    assert found[1][1].startswith(f"{tmp_path / 'c'}, data in CLEVR-Change's layout: 8 train, ")
    assert found[2][1] == (
        f"{tmp_path / 'mine' / 'pairs.csv'}, a table of pairs: 1 train, 1 test pairs "
        f"(--datatype pairs --data_path {tmp_path / 'mine' / 'pairs.csv'})"
    )
    assert "Spot-the-Diff: 8 train, 3 val, 5 test pairs" in found[3][1]


@pytest.mark.usefixtures("_quick")
def test_weights_are_listed_without_states(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "list_ckpts_folders", lambda: [tmp_path])
    names = ["run/pytorch_model.bin.3", "run/training_state.bin.3", "ViT-B-32.pt", "log.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(2_000_000))
    _, lines = examine(capsys, "--data", str(tmp_path))
    assert lines[0] == (
        "✔",
        "weights",
        f"in {tmp_path}: ViT-B-32.pt (2 MB), run/pytorch_model.bin.3 (2 MB)",
    )


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError("CUDA error: no kernel\nimage"), "CUDA error: no kernel image"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "torch is not installed"),
        (ImportError("cannot import name 'x' from 'modules.y'"), "cannot import name 'x'"),
    ],
)
def test_whatever_fails_is_a_line_and_code_1(error, text, capsys, monkeypatch, tmp_path) -> None:
    def check_caption(data: Path) -> Iterator[Finding]:
        yield Finding(True, "first", "works")
        raise error

    monkeypatch.setattr(doctor, "CHECKS", (check_caption,))
    code, lines = examine(capsys, "--data", str(tmp_path))
    assert code == 1
    assert [(mark, part) for mark, part, _ in lines] == [("✔", "first"), ("✘", "caption")]
    assert lines[1][2].startswith(text)


def test_another_caption_is_a_failure(capsys, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(doctor, "CHECKS", (doctor.check_caption,))
    other = SimpleNamespace(caption=lambda *pair: "a cat")
    monkeypatch.setattr("modules.predictor.Predictor.load", lambda: other)
    code, lines = examine(capsys, "--data", str(tmp_path))
    assert code == 1
    assert lines[0][2].startswith('"a cat" instead of "the big red matte block is missing": ')


def test_a_folder_that_is_not_there_is_refused(capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        doctor.main(["--data", "nowhere"])
    assert stop.value.code == 2
    assert "--data nowhere is not a folder" in capsys.readouterr().err
