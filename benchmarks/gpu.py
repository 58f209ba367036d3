"""Measure and check everything on a GPU, in about five minutes, without network or Java.

    python benchmarks/gpu.py --output RESULTS.jsonl --table TABLE.md

Each part runs in a process of its own and under a time limit; what fails is a row that says why,
and the next part runs. Rows are written as they come. The exit code is 1 if a row failed. --smoke
runs every line in small on the CPU. Aims and how to run it offline: benchmarks/README.md.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import IO, TYPE_CHECKING, Any, TextIO

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from system.command import run_command
from system.flags import device_name
from system.parser import EXIT_USER_ERROR, OneLineParser

if TYPE_CHECKING:
    from benchmarks.gpu_parts.setting import Setting

# In order of worth: what comes late may find no time left.
PARTS = {
    "device": "speed:measure_device",
    "golden": "checks:check_golden",
    "training": "speed:measure_training",
    "captioning": "speed:measure_captioning",
    "compiled": "speed:measure_compiled_training",
    "loader": "loading:measure_loader",
    "start": "loading:measure_start",
    "checks": "checks:check_training",
    "interruption": "checks:check_interruption",
    "ranks": "checks:check_ranks",
    "demo": "demo:train_demo",
}
PART_SECONDS = 40  # of a part's own work
START_SECONDS = 30  # to import torch and find the GPU, beyond which a part is killed
TOTAL_SECONDS = 300  # after which no part is started

Row = dict[str, Any]


class OutOfTime(BaseException):
    """A part has had its time. A BaseException, so that no `except Exception` takes it for a failed
    row."""


def main(argv: list[str] | None = None) -> int:
    """Run the parts. Returns 1 if a row failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    unknown = [name for name in args.parts if name not in PARTS]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if args.in_this_process:
        return run_command(parser.prog, lambda: run_here(args))
    rows: list[Row] = []
    run_command(parser.prog, lambda: rows.extend(run_parts(args)))
    return int(any(is_bad(row) for row in rows))


def _parser() -> OneLineParser:
    parser = OneLineParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, help="write the JSON lines here")
    add("--table", type=Path, help="write tables, in Markdown, here")
    add("--device", type=device_name, default="auto", help="default: auto, a GPU or else the CPU")
    add("--parts", nargs="+", default=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    add("--smoke", action="store_true", help="all parts in small, on the CPU, in one process")
    add("--in_this_process", action="store_true", help="run parts here; how this script runs them")
    return parser


def is_bad(row: Row) -> bool:
    """Whether something failed, or a check did not hold."""
    return "failed" in row or row.get("ok") is False


def run_parts(args: Namespace) -> list[Row]:
    """Run all parts, print and write their rows as they come, and the tables at the end."""
    from benchmarks.gpu_parts.tables import format_tables

    groups = [args.parts] if args.smoke else [[part] for part in args.parts]
    begin = time.monotonic()
    rows: list[Row] = []
    with _open_output(args.output) as output:
        for parts in groups:
            seconds = TOTAL_SECONDS - (time.monotonic() - begin)
            for row in _run_group(parts, args, seconds):
                rows.append(row)
                line = json.dumps(row)
                print(line, flush=True)
                print(line, file=output, flush=True)
    text = format_tables(rows)
    print(f"\n{text}")
    if args.table:
        args.table.write_text(text, encoding="utf-8")
    return rows


def _open_output(path: Path | None) -> TextIO:
    return open(path or os.devnull, "w", encoding="utf-8")


def _run_group(parts: Sequence[str], args: Namespace, seconds_left: float) -> Iterator[Row]:
    """The rows of parts that share a process, and one that says how it broke off, if it did.

    Raises ValueError if the device cannot be had.
    """
    if seconds_left <= 0:
        yield {"part": parts[0], "failed": f"not started: {TOTAL_SECONDS} seconds have passed"}
        return
    command = [sys.executable, __file__, "--in_this_process", "--device", args.device]
    command += ["--parts", *parts, *(["--smoke"] if args.smoke else [])]
    limit = START_SECONDS + sum(_limit(args.smoke) for _ in parts)
    part = parts[0]
    with TemporaryFile("w+") as errors, _start(command, errors, limit) as process:
        for line in process.stdout:
            row = json.loads(line)
            part = row["part"]
            yield row
        code = process.wait()
        errors.seek(0)
        reason = errors.read().strip().rpartition("\n")[2]
    if code == EXIT_USER_ERROR:
        raise ValueError(reason.partition(": ")[2])
    if code:
        yield {"part": part, "failed": f"its process ended with {code}: {reason}"}


def _limit(smoke: bool) -> int:
    """Seconds of a part. A trial in small may run on a busy machine."""
    return 10 * PART_SECONDS if smoke else PART_SECONDS


@contextmanager
def _start(command: Sequence[str], errors: IO, limit: float) -> Iterator[subprocess.Popen]:
    """A process that is killed, with all it has started, after `limit` seconds and at the end."""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True
    )
    timer = threading.Timer(limit, _kill_group, [process])
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        _kill_group(process)
        process.stdout.close()
        process.wait()


def _kill_group(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def run_here(args: Namespace) -> None:
    """Run the parts in this process; only rows go to stdout."""
    is_on_cpu = args.smoke and args.device == "auto"
    if is_on_cpu:
        # Here and in the runs that parts start: several threads only wait for each other in small.
        os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    from benchmarks.gpu_parts.setting import FULL, SMOKE, Setting
    from benchmarks.steps import silence_logs
    from system.compute import select_device

    rows = sys.stdout
    device = select_device("cpu" if is_on_cpu else args.device)
    if args.smoke and hasattr(torch.compiler, "set_stance"):
        torch.compiler.set_stance("force_eager")  # compiling a tiny model takes half a minute
    for part in args.parts:
        with TemporaryDirectory() as folder, redirect_stdout(sys.stderr), silence_logs():
            setting = Setting(device, SMOKE if args.smoke else FULL, Path(folder))
            for row in _run_limited(part, setting, _limit(args.smoke)):
                print(json.dumps({"part": part, **row}), file=rows, flush=True)


def _run_limited(part: str, setting: "Setting", seconds: int) -> Iterator[Row]:
    """A part's rows, one that says why it broke off if it did, and one with its time."""
    from system.escaping import summarize_error

    begin = time.perf_counter()
    module, _, name = PARTS[part].partition(":")
    try:
        with _alarm(seconds):
            yield from getattr(import_module(f"benchmarks.gpu_parts.{module}"), name)(setting)
    except OutOfTime:
        yield {"failed": f"stopped after {seconds} seconds"}
    except Exception as error:
        yield {"failed": summarize_error(error)}
    yield {"what": "whole part", "seconds": round(time.perf_counter() - begin, 1)}


@contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise OutOfTime in the block after so many seconds, where the system has such an alarm."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def stop(*_: object) -> None:
        raise OutOfTime

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


if __name__ == "__main__":
    sys.exit(main())
