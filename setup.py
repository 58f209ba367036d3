"""Builds the wheel: all packages below `clip4idc`, so that none meets another project's `modules`.

pyproject.toml holds what is fixed; here is what must be computed. The checkout runs as it is and
needs no installation; `pip install -e` is not supported, as the names differ.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ENTRY_SCRIPTS = ("main_task_retrieval", "CLIP4IDCinference", "app")
PACKAGES = ("system", "dataloaders", "modules", "gt", "preprocess")
DATA_FOLDERS = ("ckpts.demo", "docs.examples")
IMPORT = re.compile(
    rf"^(\s*)(from|import) ({'|'.join((*PACKAGES, *ENTRY_SCRIPTS))})(?=[. ])", re.MULTILINE
)


class RenamingBuild(build_py):
    """Puts `clip4idc.` before our packages in import statements."""

    def run(self) -> None:
        if self.editable_mode:
            raise SystemExit("pip install -e is not supported: run the scripts in the checkout")
        super().run()

    def find_modules(self) -> list[tuple[str, str, str]]:
        """The entry scripts, which are files of the package `clip4idc`, too."""
        return [("clip4idc", name, f"{name}.py") for name in ENTRY_SCRIPTS]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target, is_copied = super().build_module(module, module_file, package)
        source = Path(module_file).read_text(encoding="utf-8")
        Path(target).write_text(IMPORT.sub(r"\1\2 clip4idc.\3", source), encoding="utf-8")
        return target, is_copied


def packages() -> list[str]:
    found = find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")])
    return ["clip4idc", *(f"clip4idc.{name}" for name in (*found, *DATA_FOLDERS))]


def requirements(file: str) -> list[str]:
    lines = Path(file).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith(("#", "-"))]


setup(
    packages=packages(),
    package_dir={name: name.removeprefix("clip4idc.").replace(".", "/") for name in packages()},
    py_modules=list(ENTRY_SCRIPTS),
    install_requires=requirements("requirements.txt"),
    extras_require={"page": requirements("requirements-app.txt")},
    cmdclass={"build_py": RenamingBuild},
)
