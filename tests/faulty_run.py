"""A run of either script in which something fails on purpose, for tests of what survives it.

`python tests/faulty_run.py FAULT retrieval|caption OPTIONS…`; FAULT is `none`, `impatient`, or
`what:where:number[:process]`:

- what: kill, term, interrupt (signals to itself), raise, hang (300 s), slow (SLOW seconds)
- where: step (after so many optimizer steps), write (in the middle of the file of that number),
  rename (before the file of that number takes its name), score (before captions are scored for the
  time of that number)
- process: the rank of the only process in which it happens

`impatient` is a training that stops after two epochs without a better score, where no score gets
better. After a restart by torchrun nothing fails. STEP_TIMEOUT, in seconds, shortens how long
processes wait for each other. Captions are scored by a stand-in, and no report is written.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from modules.evaluation.split_scorer import SplitScorer
from modules.training.objectives.cross_entropy import CrossEntropy
from modules.training.trainer import Trainer
from system import runtime
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import SCRIPTS

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


def fail_at(number: int, what: str, original: Callable, before: Callable | None = None) -> Callable:
    """`original`, with the fault in its call of that number: after it, or where `before` is given,
    after `before` and instead of it."""
    calls = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        is_now = calls == number
        if is_now and before:
            before(*args)
            fail(what)
        result = original(*args, **more)
        if is_now and not before:
            fail(what)
        return result

    return counted


def write_half(_value: Any, path: Path) -> None:
    """What a process leaves that is killed while it writes."""
    Path(path).write_bytes(b"half")


def do_nothing(*_: Any) -> None:
    """The fault comes before anything else."""


def install_fault(what: str, where: str, number: int) -> None:
    """Make it fail there."""
    if where == "step":
        Trainer.step = fail_at(number, what, Trainer.step)
    elif where == "write":
        torch.save = fail_at(number, what, torch.save, before=write_half)
    elif where == "rename":
        Path.replace = fail_at(number, what, Path.replace, before=do_nothing)
    elif where == "score":
        SplitScorer.score = fail_at(number, what, SplitScorer.score, before=do_nothing)


def main() -> int:
    """The command line; see the top of this file."""
    fault, task, *options = sys.argv[1:]
    what, *place = fault.split(":")
    use_quick_scores(cider=0.0 if what == "impatient" else None)
    skip_reports()
    if what == "impatient":
        CrossEntropy.recipe = CrossEntropy.recipe._replace(patience=2)
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
