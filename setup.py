"""Builds the wheel: all packages below `clip4idc`, so that none clashes with another `modules`.

pyproject.toml holds the fixed settings; this file computes the rest. `pip install -e` installs the
checkout as it is, so that `modules`, `system` and the others can be imported by these names.
"""

import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # pip does not

from scripts.wheel_names import OurNames, UnhandledName, rename_modules  # noqa: E402

ENTRY_SCRIPTS = ("main_task_retrieval", "CLIP4IDCinference", "app")
PACKAGES = ("system", "dataloaders", "modules", "gt", "preprocess")
DATA_FOLDERS = ("ckpts.demo", "docs.examples")


def is_module(name: str) -> bool:
    """Whether a dotted name is a module or a package of the checkout."""
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


OURS = OurNames((*PACKAGES, *ENTRY_SCRIPTS), is_module)


class RenamingBuild(build_py):
    """Writes `clip4idc.` before the names of our modules, in all files."""

    def find_modules(self) -> list[tuple[str, str, str]]:
        """The entry scripts, as modules of the package `clip4idc`."""
        if self.editable_mode:
            return super().find_modules()
        return [("clip4idc", name, f"{name}.py") for name in ENTRY_SCRIPTS]

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        target, is_copied = super().build_module(module, module_file, package)
        source = Path(module_file).read_text(encoding="utf-8")
        try:
            renamed = rename_modules(source, module_file, OURS)
        except UnhandledName as error:
            raise SystemExit(str(error)) from None
        Path(target).write_text(renamed, encoding="utf-8")
        return target, is_copied


class EditableWheel(editable_wheel):
    """`pip install -e`: the checkout, whose packages keep their names."""

    def finalize_options(self) -> None:
        self.distribution.packages = ["clip4idc", *list_our_packages()]
        self.distribution.package_dir = {"": "."}
        super().finalize_options()


def list_our_packages() -> list[str]:
    """The names of all packages in the checkout, `clip4idc` left out."""
    return find_packages(include=[*PACKAGES, *(f"{name}.*" for name in PACKAGES)])


def locate_package(name: str) -> str:
    """The folder of a package in the checkout."""
    return name.removeprefix("clip4idc.").replace(".", "/")


packages = ["clip4idc", *(f"clip4idc.{name}" for name in (*list_our_packages(), *DATA_FOLDERS))]
setup(
    packages=packages,
    package_dir={name: locate_package(name) for name in packages},
    py_modules=list(ENTRY_SCRIPTS),
    cmdclass={"build_py": RenamingBuild, "editable_wheel": EditableWheel},
)
