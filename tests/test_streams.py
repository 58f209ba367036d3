"""Standard streams that are closed, narrow or gone, and the signal of a terminal that closes."""

import io
import logging
import os
import signal
import subprocess
import sys

import pytest

from system.logs import showing_log_lines
from system.signals import StopRequested, StopSignals, stopping_at_once
from system.streams import prepare_streams, print_if_heard
from tests.conftest import ROOT

PROGRAM = """
import os, sys
from system.streams import prepare_streams
prepare_streams()
opened = os.open(os.devnull, os.O_RDONLY)
assert opened > 2, opened
print("to stderr", file=sys.stderr)
print("caf\\u00e9 \\u524d")
"""


def run(closed: str, encoding: str) -> subprocess.CompletedProcess:
    """The program with some streams closed, by a shell."""
    words = f'"{sys.executable}" -c "$PROGRAM" {closed}'
    environment = {**os.environ, "PROGRAM": PROGRAM, "PYTHONIOENCODING": encoding}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(["sh", "-c", words], env=environment, capture_output=True, check=False)


@pytest.mark.parametrize("closed", ["", "2>&-", "<&-", "<&- 2>&-"])
def test_closed_streams_lead_nowhere(closed):
    done = run(closed, "utf-8")
    assert (done.returncode, done.stdout.decode()) == (0, "caf\u00e9 \u524d\n")
    assert done.stderr == (b"" if "2>" in closed else b"to stderr\n")


def test_no_stream_at_all():
    done = run("<&- >&- 2>&-", "utf-8")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", b"caf\\xe9 \\u524d\n"), ("cp1252", b"caf\xe9 \\u524d\n")]
)
def test_what_an_encoding_lacks_is_escaped(encoding, expected):
    done = run("", encoding)
    assert (done.returncode, done.stdout) == (0, expected)


class Gone(io.StringIO):
    """A terminal that is gone."""

    def write(self, text: str) -> int:
        raise OSError(5, "Input/output error")


def test_nobody_listens_any_more(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    print_if_heard("a line", file=sys.stderr)
    with showing_log_lines():
        logging.getLogger("system.test").warning("a line")
    closed = io.StringIO()
    closed.close()
    print_if_heard("a line", file=closed)


def test_streams_of_other_kinds_stay(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stdout", stream)
    prepare_streams()
    assert sys.stdout is stream


def close_terminal_while_busy(stop: StopSignals) -> None:
    with stop.deferred():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGHUP)


def test_a_terminal_that_closes_stops_a_job_once():
    with StopSignals() as stop:
        with pytest.raises(StopRequested):
            close_terminal_while_busy(stop)
        assert stop.requested
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_waits_in_compiled_code_end_at_once():
    with StopSignals():
        ours = signal.getsignal(signal.SIGTERM)
        with stopping_at_once():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
            assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) == ours
