"""The program that tests start instead of `python`: it must end, print and die as Python does."""

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests import quick_python


@pytest.mark.parametrize(
    ("code", "expected", "stdout", "stderr"),
    [
        ("print('out')", 0, "out\n", ""),
        ("import sys; sys.exit(75)", 75, "", ""),
        ("raise SystemExit('no')", 1, "", "no\n"),
        ("import os; os.kill(os.getpid(), 9)", -signal.SIGKILL, "", ""),
        ("import os; print(os.environ['GIVEN'], os.getcwd())", 0, "yes {folder}\n", ""),
        ("import sys; print(sys.stdin.read(), sys.argv[1:])", 0, "in ['one', 'two']\n", ""),
    ],
)
def test_it_ends_and_prints_as_python_does(code, expected, stdout, stderr, tmp_path):
    done = subprocess.run(
        [quick_python.executable(), "-c", code, "one", "two"],
        cwd=tmp_path,
        env={**os.environ, "GIVEN": "yes"},
        input="in",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == expected
    assert done.stdout == stdout.format(folder=tmp_path)
    assert done.stderr == stderr


def test_signals_reach_the_fork_and_it_dies_with_its_client():
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: print('asked', flush=True))\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [quick_python.executable(), "-c", code]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    fork = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "asked\n"
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{fork}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
