"""A run of either script in which something fails on purpose, for tests of what survives it.

`python tests/faulty_run.py FAULT retrieval|caption OPTIONS…`; FAULT is `none`, `worse`, or
`what:where:number[:process]`:

- what: kill, term, interrupt (signals to itself), raise, hang (300 s), slow (SLOW seconds)
- where: step (after so many optimizer steps), write (in the middle of the file of that number),
  rename (before the file of that number takes its name), score (before captions are scored for the
  time of that number)
- process: the rank of the only process in which it happens

`worse` is a training in which each epoch's score is worse than the one before. After a restart by
torchrun nothing fails. STEP_TIMEOUT, in seconds, shortens how long processes wait for each other.
Captions get quick scores, and no report is written.
"""

import os
import signal
import sys
import time
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from modules.evaluation.split_scorer import SplitScorer
from modules.training.trainer import Trainer
from system import runtime
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import SCRIPTS, with_fault

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}


def fail(what: str) -> None:
    """The fault itself."""
    print(f"fault: {what}", file=sys.stderr, flush=True)
    if what in SIGNALS:
        os.kill(os.getpid(), SIGNALS[what])
    elif what == "raise":
        raise AssertionError("this process fails on purpose")
    elif what == "slow":
        time.sleep(float(os.environ.get("SLOW", "5")))
    elif what == "hang":
        time.sleep(300)


def install_fault(what: str, where: str, number: int) -> None:
    """Patch the function at `where` so that its call `number` fails."""

    def fault(*_: Any) -> None:
        fail(what)

    def write_half_and_fail(_value: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        fail(what)

    if where == "step":
        Trainer.step = with_fault(Trainer.step, number, after=fault)
    elif where == "write":
        torch.save = with_fault(torch.save, number, before=write_half_and_fail)
    elif where == "rename":
        Path.replace = with_fault(Path.replace, number, before=fault)
    elif where == "score":
        SplitScorer.score = with_fault(SplitScorer.score, number, before=fault)


def main() -> int:
    """The command line; see the top of this file."""
    fault, task, *options = sys.argv[1:]
    what, *place = fault.split(":")
    worse = (1 / number for number in count(1))
    use_quick_scores(ciders=worse if what == "worse" else None)
    skip_reports()
    if "STEP_TIMEOUT" in os.environ:
        runtime.STEP_TIMEOUT = timedelta(seconds=float(os.environ["STEP_TIMEOUT"]))
    is_restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if place and not is_restart:
        where, number, *process = place
        if process in ([], [os.environ.get("RANK")]):
            install_fault(what, where, int(number))
    return SCRIPTS[task].main(options)


if __name__ == "__main__":
    sys.exit(main())
