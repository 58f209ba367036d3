"""Progress: a bar on a terminal, lines in a log, and nothing that breaks where nobody listens."""

import io
import sys

import pytest

from system import progress
from system.progress import show_progress


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def every_step(monkeypatch):
    """A line after each step."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)


def test_a_log_gets_lines_of_their_own(every_step, capsys):
    assert list(show_progress("abc", "letters")) == ["a", "b", "c"]
    out, error = capsys.readouterr()
    assert out == ""
    first, *others = error.splitlines()
    assert first == "letters: 0 of 3, ? left"
    assert others[-1] == "letters: 3 of 3, 00:00 left"
    assert "\r" not in error


def test_without_a_total_a_line_counts(every_step, capsys):
    list(show_progress(iter("abc"), "letters"))
    assert capsys.readouterr().err.splitlines()[-1] == "letters: 3"


def test_short_work_says_nothing(capsys):
    list(show_progress("abc", "letters"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("hidden", [{"is_shown": False}, {"has_lines": False}])
def test_lines_can_be_left_out(hidden, every_step, capsys):
    assert list(show_progress("abc", "letters", **hidden)) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar_that_is_cleared(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    list(show_progress("abc", "letters"))
    assert "letters:   0%" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r")


def test_a_closed_stream_stops_nothing(every_step, monkeypatch):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    assert list(show_progress("abc", "letters")) == ["a", "b", "c"]
