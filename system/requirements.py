"""What the code needs that pip installs, and what to run where it is missing."""

import os
import re
import sys
from types import TracebackType
from typing import Any, NamedTuple

from system.places import IS_PACKAGED, ROOT
from system.streams import print_if_heard

PACKAGE = "clip4idc"  # as pip knows it
EXTRAS = {
    "app": "the web page",
    "data": "HEIC pictures, such as an iPhone's",
    "dev": "the tests",
}

# Modules whose packages pip knows by another name.
PACKAGE_NAMES = {
    "cv2": "opencv-python-headless",
    "open_clip": "open_clip_torch",
    "PIL": "pillow",
}
OWN_MODULES = frozenset(
    {"system", "dataloaders", "modules", "gt", "preprocess", "benchmarks", "scripts", "clip4idc"}
    | {"main_task_retrieval", "CLIP4IDCinference", "app"}
)

REQUIREMENT = re.compile(r"([A-Za-z][\w.-]*)(?:\[[\w,]*\])?\s*(?:>=\s*([\w.]+))?")
NUMBER = re.compile(r"\d+")
EXTRA = re.compile(r"extra == ['\"](\w+)['\"]")


def explain_missing(error: ImportError) -> str | None:
    """What to run so that an import will work. None for a module of ours or of Python's."""
    module = (error.name or "").partition(".")[0]
    if not module or module in OWN_MODULES or module in sys.stdlib_module_names:
        return None
    if isinstance(error, ModuleNotFoundError):
        problem = f"{module} is not installed for {sys.executable}"
    else:
        problem = f"{module} cannot be loaded ({' '.join(str(error).split())})"
    return f"{problem}: {advise_setup(PACKAGE_NAMES.get(module, module))}"


def advise_setup(packages: str) -> str:
    """What to run to get packages that all code needs; several are separated by blanks."""
    if IS_PACKAGED:
        return f"run pip install --upgrade {packages}"
    in_shell = "source .venv/bin/activate"
    if not (ROOT / ".venv").exists():
        return f"run bash scripts/setup.sh, then {in_shell}"
    if _is_ours():
        return "run bash scripts/setup.sh"
    return f"run {in_shell}, or bash scripts/setup.sh if that is not enough"


def report_missing() -> None:
    """From here on, a failed import of what pip installs ends the program with one line and 2.

    For scripts that are started by path, before their imports.
    """
    sys.excepthook = _report


def _report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> Any:
    message = explain_missing(error) if isinstance(error, ImportError) else None
    if message is None:
        return sys.__excepthook__(kind, error, trace)
    print_if_heard(f"{os.path.basename(sys.argv[0])}: {message}", file=sys.stderr)
    raise SystemExit(2)


class Requirement(NamedTuple):
    """A package by the name that pip knows it by, and the oldest version that will do."""

    name: str
    at_least: str

    def find_problem(self) -> str | None:
        """What is wrong with the installed package, such as "no torch"; None if it will do."""
        from importlib import metadata  # slow, and seldom needed

        try:
            version = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            version = None
        if not version:  # also of a package that is there only in part
            return f"no {self.name}"
        if _read_numbers(version) < _read_numbers(self.at_least):
            return f"{self.name} {version}, which is older than {self.at_least}"
        return None


def _read_numbers(version: str) -> list[int]:
    """The first three numbers of a version; others do not matter here."""
    return [int(number) for number in NUMBER.findall(version)[:3]]


def list_requirements(extra: str | None = None) -> list[Requirement]:
    """The packages that all code needs, or those of one of EXTRAS."""
    if IS_PACKAGED:
        from importlib import metadata

        lines = [line for line in metadata.requires(PACKAGE) or [] if _extra_of(line) == extra]
    else:
        file = f"requirements-{extra}.txt" if extra else "requirements.txt"
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    return [Requirement(*found.groups("0")) for found in map(REQUIREMENT.match, lines) if found]


def _extra_of(requirement: str) -> str | None:
    found = EXTRA.search(requirement)
    return found[1] if found else None


def find_problems(extra: str | None = None) -> dict[str, str]:
    """Package → what is wrong with it, of those that all code needs or those of one of EXTRAS."""
    problems = {one.name: one.find_problem() for one in list_requirements(extra)}
    return {name: problem for name, problem in problems.items() if problem}


def advise_extra(extra: str) -> str:
    """What to run to get one of EXTRAS."""
    if IS_PACKAGED:
        return f"run pip install {' '.join(one.name for one in list_requirements(extra))}"
    is_in_environment = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    if is_in_environment and not _is_ours():
        return f"run pip install -r requirements-{extra}.txt"
    return f"run bash scripts/setup.sh {extra}"


def _is_ours() -> bool:
    """Whether this Python is that of the .venv which scripts/setup.sh makes."""
    return os.path.realpath(sys.prefix) == os.path.realpath(ROOT / ".venv")
