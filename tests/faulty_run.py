"""A run of either script in which something fails on purpose: `python tests/faulty_run.py FAULT retrieval|caption OPTIONS…`.

FAULT is `what:where:number[:process]`. What: none, kill, term, interrupt (signals to itself), raise, hang, slow (5 s), impatient (a training
stops after two epochs without a better score). Where: step (after so many optimizer steps), write (in the middle of the file of that
number), rename (before that file takes its name), score (before captions are scored for the time of that number). Process: the
only one in which it happens. After a restart by torchrun nothing fails. HANG, in seconds, shortens how long processes wait for each
other.
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

import torch  # noqa: E402

import CLIP4IDCinference  # noqa: E402
import main_task_retrieval  # noqa: E402
from modules.evaluation import judge  # noqa: E402
from modules.training import loop  # noqa: E402
from system import files, runtime  # noqa: E402

SCRIPTS = {"retrieval": main_task_retrieval, "caption": CLIP4IDCinference}
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT}
SECONDS = {"slow": 5, "hang": 300}


def fail(what: str) -> None:
    """The fault itself."""
    if what in SIGNALS:
        os.kill(os.getpid(), SIGNALS[what])
    if what == "raise":
        raise AssertionError("this process fails on purpose")
    if what in SECONDS:
        time.sleep(SECONDS[what])


def at(
    number: int, what: str, before: Callable | None = None, after: Callable | None = None
) -> Callable:
    """Counts its calls and fails in the one of that number."""
    calls = 0

    def counted(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and before:
            before(*args)
            fail(what)
        result = after(*args, **more) if after else None
        if calls == number and not before:
            fail(what)
        return result

    return counted


def half_written(value: Any, path: Path) -> None:
    Path(path).write_bytes(b"half")


def prepare(what: str, where: str, number: int) -> None:
    """Make it fail there."""
    if where == "step":
        loop._optimizer_step = at(number, what, after=loop._optimizer_step)
    if where == "write":
        torch.save = at(number, what, before=half_written, after=torch.save)
    if where == "rename":
        files.Path.replace = at(number, what, before=lambda *_: None, after=files.Path.replace)
    if where == "score":
        judge.CaptionJudge.score = at(
            number, what, before=lambda *_: None, after=judge.CaptionJudge.score
        )


def main() -> int:
    fault, stage, *options = sys.argv[1:]
    what, where, number, *process = fault.split(":")
    if "HANG" in os.environ:
        runtime.STEP_TIMEOUT = timedelta(seconds=float(os.environ["HANG"]))
    if what == "impatient":
        loop.PATIENCE["caption"] = 2
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0" and process in (
        [],
        [os.environ.get("RANK")],
    ):
        prepare(what, where, int(number))
    return SCRIPTS[stage].main(options)


if __name__ == "__main__":
    sys.exit(main())
