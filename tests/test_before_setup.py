"""Every script before set-up: one line that says what is missing and what to run, exit code 2."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from system import requirements
from system.command import run_command
from system.requirements import explain_missing, find_problems, list_requirements
from tests.conftest import ROOT

PAIR = ["--before", "docs/examples/added_before.png", "--after", "docs/examples/added_after.png"]
RUN = ["--do_eval", "--datatype", "pairs", "--data_path", "a.csv", "--init_model", "demo"]
RUN += ["--output_dir", "nowhere"]
COMMANDS = {
    "CLIP4IDCinference.py": ["CLIP4IDCinference.py", "--do_predict", *PAIR],
    "main_task_retrieval.py": ["main_task_retrieval.py", *RUN],
    "app.py": ["app.py"],
    "clip4idc predict": ["-m", "clip4idc", "predict", *PAIR],
    "eval_utils.py": ["gt/eval_utils.py", "score"],
    "check_dataset.py": ["preprocess/check_dataset.py"],
    "convert_weights.py": ["preprocess/convert_weights.py", "a.pt", "b.pt"],
    "synthesize.py": ["preprocess/synthesize.py"],
    "steps.py": ["benchmarks/steps.py"],
    "compare.py": ["scripts/compare.py"],
}


def run_bare(*words: str) -> subprocess.CompletedProcess:
    """Run a Python that sees only its own modules and the checkout."""
    command = [sys.executable, "-S", "-E", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("program", COMMANDS)
def test_a_script_says_what_to_run(program: str) -> None:
    done = run_bare(*COMMANDS[program])
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"{program}: "), done.stderr
    assert "bash scripts/setup.sh" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("script", ["CLIP4IDCinference.py", "app.py"])
def test_an_old_python_is_refused_first(script: str) -> None:
    code = f"import runpy, sys; sys.version_info = (3, 9); runpy.run_path('{script}')"
    done = run_bare("-c", code)
    assert done.returncode == 2
    assert done.stderr.startswith("CLIP4IDC needs Python 3.10 or newer, and ")
    assert done.stderr.endswith("run bash scripts/setup.sh, then source .venv/bin/activate\n")


def test_other_errors_keep_their_traceback() -> None:
    code = (
        "from system.requirements import report_missing; report_missing(); import modules.nothing"
    )
    done = run_bare("-c", code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("No module named 'modules.nothing'\n")


def missing(name: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize("name", ["modules.losses", "clip4idc.modules.x", "_lzma", "tomllib", ""])
def test_what_setup_does_not_bring_is_no_reason_to_run_it(name: str) -> None:
    assert explain_missing(missing(name)) is None


def test_the_advice_fits_the_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/py")
    start = "cv2 is not installed for /bin/py: run "
    assert explain_missing(missing("cv2")) == (
        f"{start}bash scripts/setup.sh, then source .venv/bin/activate"
    )
    (tmp_path / ".venv").mkdir()
    assert explain_missing(missing("cv2")) == (
        f"{start}source .venv/bin/activate, or bash scripts/setup.sh if that is not enough"
    )
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert explain_missing(missing("cv2")) == f"{start}bash scripts/setup.sh"
    monkeypatch.setattr(requirements, "IS_PACKAGED", True)
    assert explain_missing(missing("cv2.x")) == (
        f"{start}pip install --upgrade opencv-python-headless"
    )


def test_an_extra_goes_into_the_environment_in_use(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(requirements, "ROOT", tmp_path)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    for prefix, advice in (
        (sys.base_prefix, "run bash scripts/setup.sh app"),
        (tmp_path / ".venv", "run bash scripts/setup.sh app"),
        (tmp_path / "own", "run pip install -r requirements-app.txt"),
    ):
        monkeypatch.setattr(sys, "prefix", str(prefix))
        assert requirements.advise_extra("app") == advice


def test_a_damaged_package_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    def job() -> None:
        raise ImportError("libcudnn.so.9: cannot open\nshared object file", name="torch._C")

    with pytest.raises(SystemExit) as stop:
        run_command("program", job)
    assert stop.value.code == 2
    expected = (
        "program: torch cannot be loaded (libcudnn.so.9: cannot open shared object file): run "
    )
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize("extra", [None, *requirements.EXTRAS])
def test_requirements_are_read(extra: str | None) -> None:
    found = list_requirements(extra)
    file = ROOT / (f"requirements-{extra}.txt" if extra else "requirements.txt")
    lines = [line for line in file.read_text().splitlines() if line and line[0] != "#"]
    assert len(found) == len(lines) > 0
    for requirement, line in zip(found, lines, strict=True):
        name, at_least = line.split(">=")
        assert (requirement.name, requirement.at_least) == (name.partition("[")[0], at_least)
        assert ";" not in line, "the reader knows no markers"


def test_constraints_fit_the_requirements() -> None:
    """A whole set of versions that any registry has: no local paths, no builds such as +cu130."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if line[0] != "#")
    assert len(pins) > 150
    assert all(re.fullmatch(r"\d[\w.]*", version) for version in pins.values())
    for extra in (None, *requirements.EXTRAS):
        for requirement in list_requirements(extra):
            version = pins[requirement.name.lower().replace("_", "-")]
            numbers = [list(map(int, re.findall(r"\d+", v))) for v in (version, requirement[1])]
            assert numbers[0] >= numbers[1], requirement


def test_old_and_absent_packages_are_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    named = (("pip", "999.1"), ("qqqq", "1.0"), ("pytest", "0"))
    lines = [requirements.Requirement(*line) for line in named]
    monkeypatch.setattr(requirements, "list_requirements", lambda extra: lines)
    problems = find_problems()
    assert list(problems) == ["pip", "qqqq"]
    assert problems["pip"].endswith(", which is older than 999.1")
    assert problems["qqqq"] == "no qqqq"


def test_a_wheel_names_packages_of_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["torch>=2.4", 'gradio>=6.0; extra == "app"', "psutil>=5.9 ; extra == 'app'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: listed)
    monkeypatch.setattr(requirements, "IS_PACKAGED", True)
    assert list_requirements() == [("torch", "2.4")]
    assert requirements.advise_extra("app") == "run pip install gradio psutil"
