"""Builds the wheel: all packages below `clip4idc`, so that none clashes with another `modules`.

pyproject.toml holds the fixed settings; this file computes the rest. `pip install -e` is not
supported, because module names differ between the checkout and the package. The checkout runs
without being installed.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ENTRY_SCRIPTS = ("main_task_retrieval", "CLIP4IDCinference", "app")
PACKAGES = ("system", "dataloaders", "modules", "gt", "preprocess")
DATA_FOLDERS = ("ckpts.demo", "docs.examples")
OURS = "|".join((*PACKAGES, *ENTRY_SCRIPTS))
FROM_IMPORT = re.compile(rf"^(\s*from )(?=(?:{OURS})[. ])", re.MULTILINE)
PLAIN_IMPORT = re.compile(rf"^\s*import (?:{OURS})\b", re.MULTILINE)


class RenamingBuild(build_py):
    """Puts `clip4idc.` before our packages in import statements, those of examples included."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("pip install -e is not supported: run the scripts in the checkout")
        super().run()

    def find_modules(self) -> list[tuple[str, str, str]]:
        """The entry scripts, as modules of the package `clip4idc`."""
        return [("clip4idc", name, f"{name}.py") for name in ENTRY_SCRIPTS]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target, is_copied = super().build_module(module, module_file, package)
        source = Path(module_file).read_text(encoding="utf-8")
        if PLAIN_IMPORT.search(source):
            raise SystemExit(
                f"{module_file}: import our modules with `from`, so that they are renamed"
            )
        Path(target).write_text(FROM_IMPORT.sub(r"\1clip4idc.", source), encoding="utf-8")
        return target, is_copied


def list_packages() -> list[str]:
    """The names of all packages in the wheel, `clip4idc` first."""
    subpackages = [f"{name}.*" for name in PACKAGES]
    found = find_packages(include=[*PACKAGES, *subpackages])
    return ["clip4idc", *(f"clip4idc.{name}" for name in (*found, *DATA_FOLDERS))]


def locate_package(name: str) -> str:
    """The folder of a package in the checkout."""
    return name.removeprefix("clip4idc.").replace(".", "/")


def read_requirements(file: str) -> list[str]:
    """The requirements in a file, without comments and options of pip."""
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


packages = list_packages()
setup(
    packages=packages,
    package_dir={name: locate_package(name) for name in packages},
    py_modules=list(ENTRY_SCRIPTS),
    install_requires=read_requirements("requirements.txt"),
    extras_require={"page": read_requirements("requirements-app.txt")},
    cmdclass={"build_py": RenamingBuild},
)
