"""docs/troubleshooting.md: every message that it quotes is one that the code can print."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
FOLDERS = ("modules", "dataloaders", "system", "preprocess", "gt", "clip4idc")
CODE = re.compile(r"`([^`]+)`")
PLACEHOLDER = re.compile(r"%(?:\.\d)?[sdf]|\{[^{}]*\}")
ANY = "\0"  # stands for what a message fills in


def quoted_messages() -> list[str]:
    """What stands in backquotes in the first column of the page's tables."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    cells = [row.split(" | ")[0] for row in rows]
    return [message for cell in cells for message in CODE.findall(cell)]


@cache
def sources() -> str:
    """All texts in the code, with a mark for what is filled in."""
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    texts = [text for path in [*files, ROOT / "app.py"] for text in _find_texts(path)]
    return "\n".join(texts)


def _find_texts(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else ANY for part in node.values]
            found.append("".join(parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(PLACEHOLDER.sub(ANY, node.value))
    return found


def pattern_of(message: str) -> re.Pattern:
    """Where `…` stands, something is filled in."""
    return re.compile(f"{ANY}+".join(map(re.escape, message.strip("… ").split("…"))))


@pytest.mark.parametrize("message", quoted_messages())
def test_the_code_has_this_message(message):
    assert pattern_of(message).search(sources())


def test_there_are_thirty_messages_and_each_row_says_what_to_do():
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    rows = [row for row in rows if not row.startswith("| message")]
    assert len(rows) >= 30
    for row in rows:
        assert len(row.split(" | ")) == 3, row


def test_a_message_that_is_nowhere_is_noticed():
    assert not pattern_of("no such … message").search(sources())
