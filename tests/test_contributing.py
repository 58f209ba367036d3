"""All code of CONTRIBUTING.md's examples is in the tests that run them, word for word."""

import ast
import re

import pytest

from tests.conftest import ROOT

EXTENSIONS = ("dataset", "metric", "decoding", "objective", "backbone")


def guide_examples() -> list[str]:
    """Each class, function and assignment of the guide's Python."""
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    examples = []
    for code in re.findall(r"```python\n(.*?)```", guide, re.DOTALL):
        lines = code.splitlines(keepends=True)
        for node in ast.parse(code).body:
            first = min([node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))])
            examples.append("".join(lines[first - 1 : node.end_lineno]))
    return examples


def name_example(example: str) -> str:
    """A short name for a test of this example."""
    return re.findall(r"^(?:class |def )?([\w.]+)", example, re.MULTILINE)[0]


@pytest.mark.parametrize("example", guide_examples(), ids=name_example)
def test_the_guide_shows_what_is_tested(example):
    files = [ROOT / "tests" / f"test_extend_{kind}.py" for kind in EXTENSIONS]
    files.append(ROOT / "tests" / "conftest.py")
    sources = [path.read_text(encoding="utf-8") for path in files]
    assert any(example in source for source in sources)


@pytest.mark.parametrize("kind", EXTENSIONS)
def test_the_guide_names_the_test_of_each_extension(kind):
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"`tests/test_extend_{kind}.py`" in guide
