"""The rules of docs/architecture.md, read from the import statements of every file."""

import ast
import re
from collections.abc import Iterator
from functools import cache

import pytest

from tests.conftest import ROOT

GUIDE = ROOT / "docs" / "architecture.md"
FOLDERS = (
    "system",
    "dataloaders",
    "modules",
    "gt",
    "preprocess",
    "benchmarks",
    "scripts",
    "clip4idc",
)
ENTRY_SCRIPTS = ("main_task_retrieval.py", "CLIP4IDCinference.py", "app.py")
STARTED_BY_PATH = ("gt/", "preprocess/", "benchmarks/", "scripts/")
PATH_BLOCK = """\
if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()
"""
WHOLE_OPTIONS = {"Options", "parse_options"}
SHORTEST_FILE = 60
ENTRY_LAYER = 9  # the picture shows this layer and those below
PATH_IN_TEXT = re.compile(
    rf"(?<![\w/.])(?:{'|'.join((*FOLDERS, 'docs', 'tests'))})/[\w/]+\.(?:py|md|sh)\b"
)


@cache
def source_files() -> tuple[str, ...]:
    """Every Python file with content, as a path from the root.

    Without the tests and setup.py, which nothing imports.
    """
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    found += [ROOT / name for name in ENTRY_SCRIPTS]
    names = [path.relative_to(ROOT).as_posix() for path in found if path.stat().st_size]
    return tuple(sorted(names))


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse((ROOT / file).read_text(encoding="utf-8"))


@cache
def layers() -> dict[str, int]:
    """Package → layer, from the guide's table. A module that stands alone counts as one too."""
    rows = re.findall(r"^\| (\d+) \| (.+?) \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    return {
        package: int(layer)
        for layer, packages in rows
        for package in re.findall(r"`([^`]+)`", packages)
    }


def package_of(file: str) -> str:
    """The package of a file: the longest name in the table that its path begins with."""
    packages = [
        package for package in layers() if file == package or file.startswith(f"{package}/")
    ]
    assert packages, f"{file} is in no package of docs/architecture.md"
    return max(packages, key=len)


def file_of(module: str) -> str | None:
    """The file of a module of ours; None for any other."""
    path = module.replace(".", "/")
    for candidate in (f"{path}.py", f"{path}/__init__.py"):
        if (ROOT / candidate).is_file() and candidate in source_files():
            return candidate
    return None


def imports_of(file: str, top_level_only: bool = False) -> Iterator[tuple[str, str | None]]:
    """(module, name) of each import, also inside functions; None where a module is imported."""
    nodes = tree_of(file).body if top_level_only else ast.walk(tree_of(file))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, None
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            for alias in node.names:
                yield node.module, alias.name


def targets_of(file: str, top_level_only: bool = False) -> set[str]:
    """The files of ours that a file imports."""
    found = set()
    for module, name in imports_of(file, top_level_only):
        target = file_of(f"{module}.{name}") if name else None
        target = target or file_of(module)
        if target:
            found.add(target)
    return found - {file}


@pytest.mark.parametrize("file", source_files())
def test_imports_go_to_lower_layers(file: str) -> None:
    package = package_of(file)
    for target in targets_of(file):
        other = package_of(target)
        is_lower = layers()[other] < layers()[package]
        assert other == package or is_lower, f"{file} ({package}) imports {target} ({other})"


def test_no_files_import_each_other_in_a_circle() -> None:
    done: set[str] = set()

    def walk(file: str, path: tuple[str, ...]) -> None:
        assert file not in path, f"a circle of imports: {' → '.join((*path, file))}"
        if file in done:
            return
        for target in sorted(targets_of(file)):
            walk(target, (*path, file))
        done.add(file)

    for file in source_files():
        walk(file, ())


@pytest.mark.parametrize("file", source_files())
def test_private_names_stay_in_their_file(file: str) -> None:
    modules = set()
    for module, name in imports_of(file):
        if file_of(module) is None:
            continue
        is_private = name is not None and name.startswith("_") and not name.startswith("__")
        assert not is_private, f"{file} imports {name} of {module}"
        if name and file_of(f"{module}.{name}"):
            modules.add(name)
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            is_private = node.attr.startswith("_") and not node.attr.startswith("__")
            reaches_in = node.value.id in modules and is_private
            assert not reaches_in, f"{file} uses {node.value.id}.{node.attr}"


@pytest.mark.parametrize("file", source_files())
def test_only_scripts_change_the_path(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    text = text.replace("tuple(sys.path)", "")  # a copy, to read
    count = text.count("sys.path")
    if file.startswith(STARTED_BY_PATH):
        assert count <= 1, f"{file} changes sys.path {count} times"
        assert count == text.count(PATH_BLOCK), f"{file} has other lines than the others"
    else:
        assert count == 0, f"{file} changes sys.path"


@pytest.mark.parametrize("file", source_files())
def test_only_the_pipeline_knows_all_options(file: str) -> None:
    knows = {name for module, name in imports_of(file) if module.startswith("modules.options")}
    is_allowed = file.startswith(("modules/pipeline/", "modules/options/")) or file in ENTRY_SCRIPTS
    assert is_allowed or not knows & WHOLE_OPTIONS, f"{file} imports {knows & WHOLE_OPTIONS}"


@pytest.mark.parametrize(
    "start",
    [*ENTRY_SCRIPTS, "modules/options/__init__.py", "modules/registries.py"],
)
def test_help_needs_no_torch(start: str) -> None:
    seen: set[str] = set()
    queue = [start]
    while queue:
        file = queue.pop()
        if file in seen:
            continue
        seen.add(file)
        for module, _ in imports_of(file, top_level_only=True):
            assert module.split(".")[0] not in ("torch", "torchvision"), f"{file} imports torch"
        queue += targets_of(file, top_level_only=True)


def test_short_files_have_a_reason() -> None:
    table = GUIDE.read_text(encoding="utf-8").partition("## Short files")[2]
    reasons = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|", table, re.MULTILINE))
    short = set()
    for file in (*source_files(), "setup.py"):
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        if len(lines) < SHORTEST_FILE:
            short.add(file)
    assert short == set(reasons)


def test_the_picture_shows_the_imports() -> None:
    """Every package up to the entry points, and the arrows that do not follow from others."""
    drawing = GUIDE.read_text(encoding="utf-8").partition("```mermaid")[2].partition("```")[0]
    box_of = {}
    for box, names in re.findall(r'^ +(\w+)\["(.+?)<br>', drawing, re.MULTILINE):
        box_of.update(dict.fromkeys(names.split(" · "), box))
    assert set(box_of) == {name for name, layer in layers().items() if layer <= ENTRY_LAYER}
    imports: dict[str, set[str]] = {box: set() for box in box_of.values()}
    for file in source_files():
        box = box_of.get(package_of(file))
        if box:
            imports[box] |= {box_of[package_of(target)] for target in targets_of(file)} - {box}
    arrows = set()
    for start, ends in re.findall(r"^ +(\w+) --> (.+)$", drawing, re.MULTILINE):
        arrows |= {(start, end) for end in ends.split(" & ")}
    assert arrows == {
        (start, end)
        for start, ends in imports.items()
        for end in ends
        if not any(end in reachable(other, imports) for other in ends - {end})
    }


def reachable(start: str, imports: dict[str, set[str]]) -> set[str]:
    """Everything that a package imports, also through others."""
    found = set(imports[start])
    for end in imports[start]:
        found |= reachable(end, imports)
    return found


def test_every_package_of_the_table_exists() -> None:
    missing = [package for package in layers() if not (ROOT / package).exists()]
    assert missing == []


def test_files_that_code_and_tests_name_exist() -> None:
    tests = [path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").glob("*.py")]
    missing = []
    for file in (*source_files(), *tests):
        for named in PATH_IN_TEXT.findall((ROOT / file).read_text(encoding="utf-8")):
            if not (ROOT / named).is_file():
                missing.append((file, named))
    assert missing == []


def test_the_reference_names_tests_that_exist() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    found = re.findall(r"`(tests/\w+\.py)(?:::(\w+))?`", reference)
    assert len(found) > 20
    for file, test in found:
        path = ROOT / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"


def test_the_promises_name_tests_that_exist() -> None:
    """Names in docs/reliability.md are parts of the tests' names."""
    promises = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").glob("test_*.py"))
    found = re.findall(r"`…?(\w+)…`", promises)
    assert len(found) > 30
    missing = []
    for part in found:
        if not re.search(rf"def test_\w*{part.removeprefix('test_')}", tests):
            missing.append(part)
    assert missing == []
