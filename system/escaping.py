"""Escapes text that others wrote, with one function for each kind of place that it is put into.

HTML has `html.escape` and the templates' autoescape; JSON and CSV have their writers.
"""

import logging
import os
import re
import unicodedata
from typing import Any

from system.urls import scrub

MAX_ERROR_LENGTH = 160  # characters
MAX_VALUE_LENGTH = 40
MAX_MARKDOWN_LENGTH = 300  # characters of a text that is shown on a page
KEPT_WHITESPACE = "\n\t"  # in a text of several lines

# They reverse the order of what follows, so that a line looks different from what it contains.
BIDI_CONTROLS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")

# Unicode's categories of control characters, line and paragraph separators, and surrogates.
UNPRINTABLE = ("Cc", "Zl", "Zp", "Cs")

# What makes a spreadsheet read a cell as a formula, and characters that may stand before it.
FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r", "＝", "＋", "－", "＠")
INVISIBLE = " \u00a0\u200b\u2060\ufeff"

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
    **{character: f"\\{character}" for character in "&%$#_"},
}

MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+\-.!|~$:@&])")


class MultilineText(str):
    """A text of several lines that we wrote: its line breaks stay line breaks in the log."""


def to_one_line(value: object) -> str:
    """A value as one line for a terminal or a log: control characters and line breaks escaped."""
    return _escape(str(value), keep="")


def summarize_error(error: Exception) -> str:
    """An error's message as one short line (MAX_ERROR_LENGTH), without secrets of URLs."""
    text = " ".join(scrub(str(error)).split()) or type(error).__name__
    if len(text) > MAX_ERROR_LENGTH:
        return text[: MAX_ERROR_LENGTH - 3] + "..."
    return text


def shorten(text: str) -> str:
    """A user's value for a message: at most MAX_VALUE_LENGTH characters of it."""
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 3] + "..."


def escape_text(text: str) -> str:
    """A text of several lines for a terminal or a log: as `to_one_line`, but line breaks and tabs
    stay."""
    return _escape(text, keep=KEPT_WHITESPACE)


def _escape(text: str, keep: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape_character(character, keep) for character in text)


def _escape_character(character: str, keep: str) -> str:
    if character in keep:
        return character
    if character in BIDI_CONTROLS or has_control_characters(character):
        return character.encode("unicode_escape", "backslashreplace").decode("ascii")
    return character


def has_control_characters(text: str) -> bool:
    """Whether it has control characters, line or paragraph separators, or lone surrogates."""
    return any(unicodedata.category(character) in UNPRINTABLE for character in text)


def name_as_text(name: str | os.PathLike) -> str:
    """A file's name or path as text that UTF-8 can hold: other bytes of it as `\\xe9`."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def escape_markdown(text: str, max_length: int = MAX_MARKDOWN_LENGTH) -> str:
    """Markdown that shows the text as it is, in one line, shortened to `max_length` characters."""
    line = to_one_line(" ".join(text.split()))
    if len(line) > max_length:
        line = line[: max_length - 1] + "…"
    escaped = MARKDOWN.sub(r"\\\1", line)
    return escaped.replace("<", "&lt;").replace(">", "&gt;")


def escape_latex(text: str) -> str:
    """LaTeX that shows the text as it is, in one line."""
    line = to_one_line(" ".join(text.split()))
    escaped = "".join(LATEX.get(character, character) for character in line)
    # After the \\ that ends a table's row, these would be an argument of it.
    if escaped.startswith(("[", "*")):
        return f"{{}}{escaped}"
    return escaped


def escape_formula(text: str) -> str:
    """A text for a cell of a spreadsheet: with a ' before it if it would be read as a formula."""
    is_formula = text.lstrip(INVISIBLE).startswith(FORMULA_STARTS)
    return f"'{text}" if is_formula else text


class SafeFormatter(logging.Formatter):
    """Formats log records without control characters and secrets.

    Each argument becomes one line, unless it is `MultilineText`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record's text, escaped and scrubbed."""
        safe = logging.makeLogRecord(record.__dict__)
        if isinstance(record.args, tuple):
            safe.args = tuple(map(_escape_argument, record.args))
        return scrub(escape_text(super().format(safe)))


def _escape_argument(value: Any) -> Any:
    is_number = hasattr(value, "__float__") or hasattr(value, "__index__")
    if is_number or isinstance(value, MultilineText):
        return value
    return to_one_line(value)


def show(text: object, **options: Any) -> None:
    """Print a text of one or several lines without control characters and secrets.

    `options` are those of `print`, such as `file`.
    """
    print(scrub(escape_text(str(text))), **options)
