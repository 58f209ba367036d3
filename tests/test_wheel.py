"""What pip installs: the wheel's files and imports, and the command `clip4idc`."""

import ast
import csv
import os
import re
import runpy
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

import clip4idc
from clip4idc.__main__ import COMMANDS, main
from modules.clip4idc import CLIP4IDC
from modules.options.decoding import Decoding
from modules.predictor import Predictor
from system.requirements import list_requirements
from tests.conftest import ROOT

PACKAGES = ("system", "dataloaders", "modules", "gt", "preprocess")
SCRIPTS = ("main_task_retrieval", "CLIP4IDCinference", "app")
DATA_FOLDERS = ("ckpts/demo", "docs/examples")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `clip4idc` as the wheel has it; the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", ["setup.py", "-q", "build_py", "--build-lib", str(folder)])
        runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
    assert [path.name for path in folder.iterdir()] == ["clip4idc"]
    return folder / "clip4idc"


def known_files(*folders: str) -> list[str]:
    """The files that git knows or would add, as paths from the root; all of them, or in folders."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", *folders]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if (ROOT / name).is_file()]


def test_the_wheel_holds_every_file_of_the_packages_and_no_other(built: Path) -> None:
    expected = {*known_files(*PACKAGES, *DATA_FOLDERS), *(f"{name}.py" for name in SCRIPTS)}
    expected |= {name.removeprefix("clip4idc/") for name in known_files("clip4idc")}
    found = {path.relative_to(built).as_posix() for path in built.rglob("*") if path.is_file()}
    assert found == expected


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules that a file's import statements name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_imports_in_the_wheel_lead_into_it(built: Path) -> None:
    renamed = 0
    for path in built.rglob("*.py"):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            first, *rest = name.split(".")
            assert first not in (*PACKAGES, *SCRIPTS), f"{path}: {name}"
            if first == "clip4idc":
                renamed += 1
                place = built.joinpath(*rest)
                assert place.is_dir() or place.with_suffix(".py").is_file(), f"{path}: {name}"
    assert renamed > 200


def test_nothing_but_names_is_changed(built: Path) -> None:
    for name in known_files(*PACKAGES, *DATA_FOLDERS):
        if not name.endswith(".py"):
            assert (built / name).read_bytes() == (ROOT / name).read_bytes(), name
            continue
        text = (built / name).read_text(encoding="utf-8")
        source = (ROOT / name).read_text(encoding="utf-8")
        assert text.replace("clip4idc.", "") == source.replace("clip4idc.", ""), name


def test_targets_of_commands_are_renamed(built: Path) -> None:
    text = (built / "__main__.py").read_text(encoding="utf-8")
    targets = re.findall(r'"(\S+):main"', text)
    assert len(targets) == len(COMMANDS)
    for target in targets:
        first, *rest = target.split(".")
        assert first == "clip4idc"
        assert built.joinpath(*rest).with_suffix(".py").is_file(), target


def test_the_package_offers_what_programs_use() -> None:
    assert clip4idc.Predictor is Predictor
    assert clip4idc.Decoding is Decoding
    assert clip4idc.CLIP4IDC is CLIP4IDC
    with pytest.raises(AttributeError, match="has no attribute 'Captioner'"):
        _ = clip4idc.Captioner


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_has_a_main(name: str) -> None:
    module, _, function = COMMANDS[name].target.partition(":")
    file = ROOT / f"{module.replace('.', '/')}.py"
    functions = [node for node in ast.parse(file.read_text()).body if hasattr(node, "name")]
    assert function in [node.name for node in functions]


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in COMMANDS)
    assert main(["evaluate", "--help"]) == 0
    listed = re.findall(r"^  (\S+ \S+)  ", capsys.readouterr().out, re.MULTILINE)
    assert listed == ["evaluate retrieval", "evaluate captions"]
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{clip4idc.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("predcit a.png", "there is no command 'predcit'; did you mean \"predict\"?"),
        ("train", "there is no command 'train'; did you mean \"finetune\"?"),
        ("evaluate-captions", "'evaluate-captions'; did you mean \"evaluate captions\"?"),
        ("evaluate retreival", "'evaluate retreival'; did you mean \"retrieval\"?"),
        ("evaluate caption", "'evaluate caption'; did you mean \"captions\"?"),
        ("evaluate", "evaluate needs a second word, one of retrieval, captions"),
        ("evaluate --gt x", "no command 'evaluate --gt': expected one of retrieval, captions"),
        ("qqqq", "there is no command 'qqqq': expected one of predict, page, adapt, "),
    ],
)
def test_an_unknown_command_names_the_nearest(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert message in output.err
    assert output.err.startswith("clip4idc: ")
    assert output.err.count("\n") == 1


def test_a_command_passes_its_words_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["clip4idc"])
    output = tmp_path / "drawn"
    counts = ["--train", "1", "--val", "0", "--test", "0", "--workers", "1"]
    assert main(["draw", "--output", str(output), *counts]) == 0
    assert (output / "images" / "CLEVR_default_000000.png").is_file()
    with pytest.raises(SystemExit) as stop:
        main(["draw", "--output", str(output)])
    assert stop.value.code == 2
    assert capsys.readouterr().err.startswith("clip4idc draw: --output ")
    with pytest.raises(SystemExit):
        main(["predict", "--before", "nowhere.png", "--after", "nowhere.png"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("clip4idc predict: no ")


def copy_checkout(target: Path) -> None:
    """Without what pip leaves where it builds, and without custom weights."""
    for name in known_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target / name)


def make_environment(folder: Path) -> Path:
    """A new environment that also sees the packages of this one, so that torch need not be
    installed again, but not the checkout; its folder of programs."""
    venv.create(folder / "env", symlinks=True)
    (packages,) = (folder / "env").glob("lib/python*/site-packages")
    others = [path for path in sys.path[1:] if Path(path) != ROOT]
    (packages / "others.pth").write_text("\n".join(others), encoding="utf-8")
    return folder / "env" / "bin"


def pip(command: str, *words: str, python: str = sys.executable) -> None:
    """Run pip without a network, and without installing what a package depends on."""
    start = [sys.executable, "-m", "pip", "--no-input", "--quiet", "--python", python]
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*start, command, *options, *words], check=True)


def install(folder: Path) -> Path:
    """Build the wheel and install it into a new environment; its folder of programs."""
    copy_checkout(folder / "checkout")
    pip("wheel", "-w", str(folder), str(folder / "checkout"))
    (wheel,) = folder.glob("clip4idc-*.whl")
    shutil.rmtree(folder / "checkout")
    programs = make_environment(folder)
    pip("install", "--ignore-installed", str(wheel), python=str(programs / "python"))
    return programs


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return install(tmp_path_factory.mktemp("installed"))


@pytest.fixture
def run(installed: Path, tmp_path: Path):
    """Runs an installed program in a folder with packages of the same names as ours."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(f"raise SystemExit('wrong {package}')")
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    variables["XDG_CACHE_HOME"] = str(tmp_path / "cache")

    def output(program: str, *words: str) -> str:
        command = [str(installed / program), *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return output


BEFORE = str(ROOT / "docs/examples/added_before.png")
AFTER = str(ROOT / "docs/examples/added_after.png")
CAPTION = "the small purple shiny sphere has been added\n"


@pytest.mark.slow
@pytest.mark.parametrize("start", [["clip4idc"], ["python", "-m", "clip4idc"]])
def test_the_installed_command_captions_two_images(run, start: list[str]) -> None:
    assert run(*start, "predict", "--before", BEFORE, "--after", AFTER) == CAPTION


@pytest.mark.slow
def test_the_wheel_has_no_other_package_at_its_top(installed: Path) -> None:
    (record,) = installed.parent.glob("lib/python*/site-packages/clip4idc-*.dist-info/RECORD")
    files = [row[0] for row in csv.reader(record.read_text(encoding="utf-8").splitlines())]
    tops = {file.split("/")[0] for file in files}
    assert tops == {"clip4idc", record.parent.name, ".."}
    assert [file for file in files if file.startswith("..")] == ["../../../bin/clip4idc"]


@pytest.mark.slow
def test_the_wheel_names_its_extras(run) -> None:
    script = (
        "from importlib.metadata import metadata\n"
        "print(*metadata('clip4idc').get_all('Provides-Extra'))\n"
        "from clip4idc.system.requirements import find_problems, list_requirements\n"
        "print(len(list_requirements()), find_problems(), list_requirements('data')[0].name)\n"
    )
    count = len(list_requirements())
    assert run("python", "-c", script) == f"app page data dev\n{count} {{}} pi-heif\n"


@pytest.mark.slow
def test_the_installed_doctor_finds_all_that_is_needed(run) -> None:
    assert run("clip4idc", "doctor").endswith("\nCaptioning works.\n")


@pytest.mark.slow
def test_an_editable_install_is_the_checkout_under_its_own_names(tmp_path: Path) -> None:
    copy_checkout(tmp_path / "checkout")
    programs = make_environment(tmp_path)
    python = str(programs / "python")
    pip("install", "--editable", str(tmp_path / "checkout"), python=python)
    script = "import clip4idc, modules.losses, gt.eval_utils; print(modules.__file__)"
    for command in ([python, "-c", script], [str(programs / "clip4idc"), "--version"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        expected = tmp_path / "checkout" / "modules" / "__init__.py"
        assert done.stdout in (f"{expected}\n", f"{clip4idc.__version__}\n")


@pytest.mark.slow
def test_downloads_of_the_installed_command_go_to_the_cache(run, tmp_path: Path) -> None:
    script = "from clip4idc.system import places; print(places.choose_downloads_folder())"
    assert run("python", "-c", script) == f"{tmp_path / 'cache' / 'clip4idc'}\n"


@pytest.mark.slow
def test_the_installed_package_loads_nothing_of_another_project(run) -> None:
    script = (
        "import sys, clip4idc\n"
        f"print(clip4idc.Predictor.load().caption({BEFORE!r}, {AFTER!r}))\n"
        f"print([name for name in sys.modules if name.split('.')[0] in {PACKAGES}])\n"
    )
    assert run("python", "-c", script) == f"{CAPTION}[]\n"
