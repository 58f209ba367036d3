"""Escapes text that others wrote, with one function for each grammar that it is put into.

HTML has `html.escape` and the templates' autoescape; JSON and CSV have their writers.
"""

import logging
import re
import unicodedata
from typing import Any

from system.urls import scrub

LONGEST_MARKDOWN = 300  # letters of a text that is shown on a page


BREAKS = "\n\t"  # what a text of several lines of our own may hold


# They turn the order of what follows around, so that a line reads as what it is not.
DIRECTIONS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


# Unicode's categories of controls, line and paragraph separators, and surrogates.
UNPRINTABLE = ("Cc", "Zl", "Zp", "Cs")


FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")


INVISIBLE = " \u00a0\u200b\u2060\ufeff"  # which may stand before them


LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    **{letter: f"\\{letter}" for letter in "&%$#_"},
}


MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:@&])")


class Lines(str):
    """A text of several lines that is ours: in the log its breaks stay breaks."""


def one_line(value: object) -> str:
    """For a terminal or a log: all control characters, breaks of lines too, shown as escapes."""
    return _escaped(str(value), "")


def printable(text: str) -> str:
    """The same for a text of several lines, whose line breaks and tabs stay."""
    return _escaped(text, BREAKS)


def _escaped(text: str, kept: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(letter if letter in kept else _as_shown(letter) for letter in text)


def _as_shown(letter: str) -> str:
    if letter in DIRECTIONS or has_control_characters(letter):
        return letter.encode("unicode_escape", "backslashreplace").decode("ascii")
    return letter


def has_control_characters(text: str) -> bool:
    """Whether it has control characters, line or paragraph separators, or lone surrogates."""
    return any(unicodedata.category(letter) in UNPRINTABLE for letter in text)


def markdown_text(text: str, longest: int = LONGEST_MARKDOWN) -> str:
    """For Markdown that a browser shows: plain text in one line of at most so many letters."""
    line = one_line(" ".join(text.split()))
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    marked = MARKDOWN.sub(r"\\\1", line)
    return marked.replace("<", "&lt;").replace(">", "&gt;")


def latex_text(text: str) -> str:
    """For LaTeX: letters that mean something there escaped, in one line."""
    escaped = "".join(LATEX.get(letter, letter) for letter in one_line(" ".join(text.split())))
    if escaped.startswith(("[", "*")):  # which would be an argument of the row's end before it
        return f"{{}}{escaped}"
    return escaped


def spreadsheet_text(text: str) -> str:
    """For a cell that a spreadsheet may open: what it would take for a formula begins with a '."""
    return f"'{text}" if text.lstrip(INVISIBLE).startswith(FORMULA_STARTS) else text


class SafeFormatter(logging.Formatter):
    """Formats log records without control characters and secrets.

    Each argument becomes one line, unless it is `Lines`.
    """

    def format(self, record: logging.LogRecord) -> str:
        shown = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            shown.args = tuple(map(_as_argument, record.args))
        return scrub(printable(super().format(shown)))


def _as_argument(value: Any) -> Any:
    is_number = hasattr(value, "__float__") or hasattr(value, "__index__")
    return value if is_number or isinstance(value, Lines) else one_line(value)


def show(text: object, **where: Any) -> None:
    """Print a text of one or several lines: no control characters, no secrets."""
    print(scrub(printable(str(text))), **where)
