"""scripts/setup.sh with stand-ins for python3, pip, uv and df: the good way and each failure."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

TOOLS = ("awk", "bash", "cat", "chmod", "cksum", "cp", "cut", "dirname", "grep", "mkdir", "rm")
TOOLS += ("sed", "tail")
PYTHON = """#!/bin/bash
echo "$*" >>calls
case "$*" in
  *version_info*) echo "${VERSION:-3.11}" ;;
  "-c ") ;;
  *find_problems*) exit "${PROBLEMS:-0}" ;;
  "-m pip --version" | "-m ensurepip") exit "${NO_PIP:-0}" ;;
  "-m venv .venv")
    mkdir -p .venv/bin
    [ -z "${VENV_ERROR:-}" ] || { echo "$VENV_ERROR"; exit 1; }
    cp "$0" .venv/bin/python
    ;;
  *" install "*)
    [ -z "${SIGNAL:-}" ] || { kill -"$SIGNAL" "$PPID"; exit 1; }
    echo "pip installs"; [ "$TMPDIR" = "$PWD/.venv/tmp" ] && [ -d "$TMPDIR" ] || exit 1
    [ -z "${PIP_ERROR:-}" ] || { printf '%s\\n' "$PIP_ERROR" >>.venv/setup.log; exit "$CODE"; }
    case "$*" in
      *--editable*) cp "$0" .venv/bin/clip4idc ;;
      *) mkdir -p .venv/lib/python3/site-packages/torch-2.dist-info
         echo >.venv/lib/python3/site-packages/torch-2.dist-info/RECORD ;;
    esac
    ;;
  "-m clip4idc doctor") echo "doctor: fine"; exit "${DOCTOR:-0}" ;;
esac
"""
UV = """#!/bin/bash
echo "uv $*" >>calls
case "$*" in
  venv*) [ -z "${UV_VENV_ERROR:-}" ] || { echo "$UV_VENV_ERROR"; exit 1; }
         mkdir -p .venv/bin; cp bin/real .venv/bin/python ;;
  *) exit "${UV_CODE:-0}" ;;
esac
"""
AGAIN = "run this again: it goes on where it was"


class Project:
    """A copy of setup.sh, with stand-ins in bin/ and nothing else on the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "setup.sh", folder / "scripts")
        for file in ROOT.glob("requirements*.txt"):
            shutil.copy(file, folder)
        (folder / "bin").mkdir()
        for tool in TOOLS:
            (folder / "bin" / tool).symlink_to(shutil.which(tool))
        self.write("bin/python3", PYTHON)
        self.write("bin/uname", "#!/bin/bash\necho ${SYSTEM:-Linux}\n")
        self.write(
            "bin/df", "#!/bin/bash\nprintf 'Disk\\n/dev/x 1 1 %s000000 1 /\\n' ${FREE:-50}\n"
        )

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.unlink(missing_ok=True)  # not into the program that it links to
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)

    def run(self, *words: str, **variables: str) -> subprocess.CompletedProcess:
        (self.folder / "calls").write_text("")
        return subprocess.run(
            ["bash", "scripts/setup.sh", *words],
            cwd=self.folder,
            env={"PATH": str(self.folder / "bin"), "CODE": "1", **variables},
            capture_output=True,
            text=True,
            check=False,
        )

    def fail(self, *words: str, **variables: str) -> str:
        """What it says on stderr; exit code 2 and one line."""
        done = self.run(*words, **variables)
        assert done.returncode == 2, done
        assert done.stderr.startswith("setup.sh: ")
        assert done.stderr.count("\n") == 1, done.stderr
        return done.stderr.removeprefix("setup.sh: ").rstrip("\n")

    def calls(self, part: str) -> list[str]:
        """The calls of Python and uv that contain a text."""
        return [line for line in (self.folder / "calls").read_text().splitlines() if part in line]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_it_says_what_it_does_and_what_to_type_next(project: Project) -> None:
    done = project.run("dev")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    steps, _, after = done.stdout.partition("\n\n")
    assert steps.splitlines() == [
        "[1/4] Python",
        "      python3 is Python 3.11",
        "[2/4] Making .venv",
        "[3/4] Packages",
        "      up to 3 GB to download and 6 GB on the disk, so it takes some minutes",
        "pip installs",
        "[4/4] The first caption",
        "doctor: fine",
    ]
    assert after.splitlines()[:2] == ["Next, type:", "  source .venv/bin/activate"]
    files = "-r requirements.txt -r requirements-app.txt -r requirements-dev.txt"
    first, second = project.calls(" install ")
    assert first.endswith(f"--no-input --log .venv/setup.log install {files}")
    assert second.endswith("install --no-deps --editable .")
    assert not (project.folder / ".venv" / "tmp").exists()


def test_again_it_installs_nothing_unless_something_is_missing(project: Project) -> None:
    assert project.run("dev").returncode == 0
    for words in (["dev"], [], ["app"]):
        done = project.run(*words)
        assert done.stdout == "All is set up. To use it: source .venv/bin/activate\n"
        assert project.calls(" -m ") == []
    assert project.run("data").returncode == 0
    assert len(project.calls("-r requirements-data.txt")) == 1
    assert project.run(PROBLEMS="1").returncode == 0
    assert len(project.calls(" install ")) == 1
    with open(project.folder / "requirements.txt", "a") as file:
        file.write("one-more>=1.0\n")
    assert project.run().returncode == 0
    assert len(project.calls(" install ")) == 1


def test_quiet_says_nothing(project: Project) -> None:
    done = project.run("-q", "app")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(project.calls("doctor")) == 1


def test_cpu_takes_torch_from_its_own_index(project: Project) -> None:
    done = project.run("--cpu", FREE="4")
    assert done.returncode == 0, done.stderr
    assert "up to 1 GB to download and 2 GB on the disk" in done.stdout
    first, second, _ = project.calls(" install ")
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    torch = " ".join(line for line in lines if line.startswith("torch"))
    assert first.endswith(f"install --index-url https://download.pytorch.org/whl/cpu {torch}")
    assert second.endswith("install -r requirements.txt")
    assert project.run("--cpu", "data").returncode == 0
    assert project.calls("--index-url") == []
    project.write(".venv/lib/python3/site-packages/nvidia/x", "")
    assert project.fail("--cpu").startswith("PyTorch with CUDA is there already: rm -rf .venv")


def test_a_new_enough_python_is_looked_for(project: Project) -> None:
    project.write("bin/python3.12", PYTHON)
    project.write("bin/python3", "#!/bin/bash\necho 3.9\n")
    assert "      python3.12 is Python 3.11\n" in project.run().stdout
    (project.folder / "bin" / "python3.12").unlink()
    shutil.rmtree(project.folder / ".venv")
    start = "step 1 of 4 failed: Python 3.10 or newer is needed, and "
    assert project.fail().startswith(f"{start}python3 is Python 3.9. Install one,")
    assert project.fail(PYTHON="no/python").startswith(f"{start}no/python does not run. ")
    project.write(
        ".venv/bin/python", '#!/bin/bash\n[ $# = 2 ] || exit 1; [ -z "$2" ] || echo 3.8\n'
    )
    (project.folder / "bin" / "uv").symlink_to("/bin/true")
    assert project.fail().startswith("step 1 of 4 failed: .venv has Python 3.8, and 3.10 or newer")


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "The virtual environment was not created because ensurepip is not\navailable.",
            "python3 has no module venv. On Debian and Ubuntu: sudo apt install python3-venv",
        ),
        ("python3: No module named venv", "python3 has no module venv."),
        ("Error: [Errno 28] No space left on device", "the disk is full: make room"),
        ("Error: [Errno 13] Permission denied: '.venv'", "nothing can be written into "),
        ("what?\nthe last line", "python3 -m venv .venv says: the last line"),
    ],
)
def test_an_environment_that_cannot_be_made(output: str, reason: str, project: Project) -> None:
    error = project.fail("-q", VENV_ERROR=output)
    assert error.startswith(f"step 2 of 4 failed: {reason}")
    assert not (project.folder / ".venv").exists()


def test_a_small_disk_is_told_before_anything_is_downloaded(project: Project) -> None:
    assert project.fail(FREE="5") == (
        "step 3 of 4 failed: 8 GB are needed here, and 5 GB are free: make room, or take --cpu, "
        "which needs 3 GB"
    )
    assert project.calls(" install ") == []
    project.write("bin/df", "#!/bin/bash\nexit 1\n")
    assert project.run().returncode == 0


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ERROR: [Errno 28] No space left on device", f"the disk is full. Make room, and {AGAIN}"),
        (
            "connection broken by 'ProxyError('Cannot connect to proxy.'",
            "the proxy does not answer or refuses; https_proxy is http://…@proxy:3128. Correct it",
        ),
        ("SSLError(SSLCertVerificationError(1, '[SSL: CERTIFICATE_VERIFY", "the server's cert"),
        ("'NewConnectionError('<…>: Failed: [Errno 111]", "the packages' server cannot be reached"),
        ("NameResolutionError(\"Failed to resolve 'a.b'", "the packages' server cannot be reached"),
        ("ReadTimeoutError('HTTPSConnectionPool", f"the download broke off: {AGAIN}"),
        (
            "ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM",
            "a download is damaged. Type .venv/",
        ),
        ("ERROR: [Errno 13] Permission denied: '/x'", "nothing can be written into .venv, perhaps"),
        (
            "ERROR: No matching distribution found for torch>=2.4",
            "torch>=2.4 does not exist for Python 3.11 on this system. Type rm -rf .venv",
        ),
        ("1 ERROR: first\n2 ERROR: last", "pip says: 2 ERROR: last (more in .venv/setup.log)"),
    ],
)
def test_why_pip_failed_is_said_in_plain_words(text: str, reason: str, project: Project) -> None:
    error = project.fail(PIP_ERROR=text, https_proxy="http://me:secret@proxy:3128")
    assert error.startswith(f"step 3 of 4 failed: {reason}")


def test_after_a_failure_it_goes_on_at_the_same_step(project: Project) -> None:
    killed = project.fail("-q", PIP_ERROR="Collecting torch", CODE="137")
    assert "pip was ended from outside, most often for lack of memory" in killed
    half = project.folder / ".venv/lib/python3/site-packages/half-1.dist-info"
    half.mkdir(parents=True)
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert "[2/4] .venv is there, with Python 3.11\n" in done.stdout
    assert project.calls("-m venv") == []
    assert not half.exists(), "pip would take it for installed"


def test_a_model_that_does_not_caption_is_tried_again(project: Project) -> None:
    assert project.fail(DOCTOR="1") == "step 4 of 4 failed: the lines with ✘ say why"
    assert project.fail("-q", DOCTOR="1") == "step 4 of 4 failed: doctor: fine"
    assert "[4/4] The first caption\n" in project.run().stdout


def test_an_environment_that_does_not_work_is_made_anew(project: Project) -> None:
    (project.folder / ".venv" / "bin").mkdir(parents=True)
    (project.folder / ".venv" / "bin" / "python").symlink_to("removed/python3.9")
    done = project.run()
    assert done.returncode == 0, done.stderr
    assert "the .venv that is here does not work: it is made anew\n[2/4] Making" in done.stdout
    (project.folder / ".venv" / "set-up").unlink()
    assert "is made anew" in project.run(NO_PIP="1").stdout, "its pip was never installed"


def test_an_environment_of_somebody_else_is_left_alone(project: Project) -> None:
    for broken in (True, False):
        project.write(".venv/bin/python", "#!/bin/bash\nexit 1\n" if broken else PYTHON)
        project.write("bin/rm", "#!/bin/bash\necho no; echo no; exit 1\n")
        project.write("bin/mkdir", "#!/bin/bash\necho no >&2; exit 1\n")
        step = 1 if broken else 3
        start = f"step {step} of 4 failed: nothing can be written into .venv, perhaps since root"
        assert project.fail("-q").startswith(start)


def test_a_link_to_another_checkouts_environment_gets_no_command(project: Project) -> None:
    project.write("other/bin/python", PYTHON)
    (project.folder / ".venv").symlink_to("other")
    assert project.run().returncode == 0
    assert project.calls("--editable") == []


def test_uv_is_taken_where_it_is(project: Project) -> None:
    project.write("bin/uv", UV)
    project.write("bin/real", PYTHON)
    project.write("bin/python3", "#!/bin/bash\necho 3.8\n")
    done = project.run("-q")
    assert done.returncode == 0, done.stderr
    assert project.calls("uv ") == [
        "uv venv --quiet --seed --python 3.12 .venv",
        "uv pip install --python .venv/bin/python -r requirements.txt",
        "uv pip install --python .venv/bin/python --no-deps --editable .",
    ]
    assert project.calls("-m pip") == []
    shutil.rmtree(project.folder / ".venv")
    error = project.fail(UV_VENV_ERROR="no network")
    assert error == "step 2 of 4 failed: uv cannot get Python 3.12: no network"


def test_pip_installs_where_uv_fails(project: Project) -> None:
    project.write("bin/uv", UV)
    done = project.run(UV_VENV_ERROR="it has no pip", UV_CODE="1")
    assert done.returncode == 0, done.stderr
    assert "uv failed: trying pip\npip installs\n" in done.stdout


def test_ctrl_c_says_how_to_go_on(project: Project) -> None:
    done = project.run(SIGNAL="INT")
    assert done.returncode == 130
    assert done.stderr == "\nsetup.sh: interrupted in step 3 of 4: run it again to continue\n"
    assert project.run().returncode == 0


def test_wrong_words_and_places_are_refused(project: Project) -> None:
    assert project.fail("tests") == "tests is unknown: expected -q, --cpu, app, data or dev"
    assert project.fail(SYSTEM="MINGW64_NT-10.0").startswith("on Windows use WSL, or type py -m")
    project.write(".venv", "a file")
    assert project.fail() == ".venv is a file: move it away"
    usage = project.run("--help")
    assert usage.returncode == 0
    assert "scripts/setup.sh [-q] [--cpu] [EXTRA…]" in usage.stdout


def test_its_file_is_a_program() -> None:
    assert os.access(ROOT / "scripts" / "setup.sh", os.X_OK)
