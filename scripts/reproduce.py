"""Reproduce the paper's table on one dataset, from the download to the scores.

    scripts/reproduce.sh spot             # everything, which takes days on a GPU
    scripts/reproduce.sh spot --plan      # the steps, and which of them are finished
    scripts/reproduce.sh spot --small     # the same steps on drawn scenes, in minutes
    scripts/reproduce.sh spot -- --gradient_accumulation_steps 2    # options of all trainings

Each seed is trained twice. Epochs are chosen on the test split, as in the paper, and on the val
split, as they should be. After any stop give the same command again: finished steps are skipped,
and a training goes on from its last saved state. The table is in results.md in --output.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from scripts.reproduce_plan import DATASETS, Reproduction, Step
from scripts.reproduce_table import collect_scores, format_table
from system.command import EXIT_LOST_PROCESS, EXIT_USER_ERROR, run_command
from system.escaping import show
from system.files import atomic_write, check_free_space
from system.flags import MAX_SEED, MAX_WORKERS, bounded
from system.java import ensure_java
from system.json_files import read_json, write_json
from system.locks import LockTaken, hold_lock
from system.parser import OneLineParser
from system.places import ROOT
from system.signals import SIGNALS

SEEDS = (2021, 42, 44)  # of the published command, and the first two of the published table
CHOICES = ("test", "val")
TRAINING_SIZE = 6.0  # gigabytes of weights and states that a training leaves
SMALL_TRAINING_SIZE = 0.2
AGAIN = "give the same command again to go on"


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    arguments = sys.argv[1:] if argv is None else argv
    ours, options = split_at_dashes(arguments)
    parser = _build_parser()
    args = parser.parse_args(ours)
    if args.small and args.data:
        parser.error("--data is for the real dataset: --small draws its own")
    plan = _make_plan(args, options)
    if args.plan:
        return run_command(parser.prog, lambda: show(format_plan(plan)))
    return run_command(parser.prog, lambda: reproduce(plan, args.processes))


def split_at_dashes(arguments: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """The words before `--`, and those after it."""
    words = list(arguments)
    place = words.index("--") if "--" in words else len(words)
    return words[:place], tuple(words[place + 1 :])


def reproduce(plan: Reproduction, processes: int = 1) -> None:
    """Run all steps that are not finished, then print the table.

    Raises ValueError or OSError, and SystemExit with the code of a step that failed.
    """
    show(describe(plan))
    plan.output.mkdir(parents=True, exist_ok=True)
    try:
        with hold_lock(plan.output / ".lock", timeout=0):
            _check_machine(plan)
            _refuse_other_options(plan)
            environment = make_environment(plan, processes)
            _download(plan, environment)
            _run_steps(plan, environment)
    except LockTaken:
        raise ValueError(
            f"{plan.output} is in use: wait for the other command, or give another --output"
        ) from None


def describe(plan: Reproduction) -> str:
    """What is to be done, and what it takes."""
    num_finished = sum(plan.read_scores(training) is not None for training in plan.trainings)
    lines = [
        f"{plan.dataset.title}: {len(plan.trainings)} trainings, {num_finished} of them finished",
        f"seeds   {', '.join(map(str, plan.seeds))}, each with two stages",
        f"epochs  chosen on {' and on '.join(plan.choices)}, each with trainings of its own",
    ]
    if plan.is_small:
        lines.append("time    some minutes: this is a rehearsal on drawn scenes with a tiny model")
    else:
        lines += [
            f"time    up to {len(plan.trainings)} × 24 hours on two V100s by the published README;",
            "        measured here on two CPU cores only: 21 s a step of stage 1, 5.3 s of stage 2",
            "memory  measured here on a CPU only, in bf16: 11.7 GB in stage 1, 6.2 GB in stage 2",
            f"disk    {required_space(plan):.0f} GB for what is missing, the download included",
        ]
    lines += [
        f"output  {plan.output}",
        f"stop    whenever you like, with Ctrl-C; {AGAIN}",
    ]
    return "\n".join(lines)


def format_plan(plan: Reproduction) -> str:
    """`describe`, and a line for each step."""
    steps = [*plan.list_downloads(), *plan.list_steps()]
    marks = ["finished" if step.is_finished() else "to do" for step in steps]
    lines = [f"{mark:<9} {step.title}" for mark, step in zip(marks, steps, strict=True)]
    return "\n".join([describe(plan), "", *lines])


def required_space(plan: Reproduction) -> float:
    """Gigabytes that the unfinished trainings and the download take at most."""
    num_open = sum(plan.read_scores(training) is None for training in plan.trainings)
    if plan.is_small:
        return num_open * SMALL_TRAINING_SIZE
    return num_open * TRAINING_SIZE + (0 if plan.has_data() else plan.dataset.download_size)


def make_environment(plan: Reproduction, processes: int) -> dict[str, str]:
    """The variables of all steps: this Python comes first, and the published scripts use it."""
    environment = dict(os.environ)
    environment.pop("PYTHON", None)  # setup.sh's, the Python that .venv was made with
    programs = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join([programs, environment.get("PATH", "")])
    environment["DATA_PATH"] = str(plan.data)
    if processes > 1:
        environment["PYTHON"] = f"torchrun --standalone --nproc_per_node={processes}"
    return environment


def _refuse_other_options(plan: Reproduction) -> None:
    """Raise ValueError if finished trainings had other options; note those of this time."""
    path = plan.output / "options.json"
    now = {"small": plan.is_small, "data": str(plan.data), "options": list(plan.options)}
    is_begun = any(plan.read_scores(training) is not None for training in plan.trainings)
    before = read_json(path, dict) if path.is_file() else now
    changed = [name for name in now if before.get(name) != now[name]]
    if is_begun and changed:
        name = changed[0]
        raise ValueError(
            f"trainings in {plan.output} were finished with other settings ({name} was "
            f"{before.get(name)}, now {now[name]}): give the same, or another --output"
        )
    write_json(path, now)


def _check_machine(plan: Reproduction) -> None:
    """Raise OSError for what would stop the scores hours later."""
    ensure_java("METEOR and the tokenizer of captions")
    needed = round(required_space(plan) * 1e9)
    refusal = f"{plan.output} has too little space (fewer --seeds or --select_on need less)"
    check_free_space(plan.output, needed, refusal)


def _download(plan: Reproduction, environment: dict[str, str]) -> None:
    """Try all downloads, so that all that is missing is named at once."""
    failed = []
    for step in plan.list_downloads():
        if not step.is_finished() and run_step(step, environment) == EXIT_USER_ERROR:
            failed.append(step)
    if not failed:
        return
    if not plan.is_small and not plan.has_data():
        show(f"You can put these files there by hand:\n{plan.dataset.by_hand.format(plan.data)}")
    titles = " and ".join(step.title for step in failed)
    raise ValueError(f"could not {titles}: do what the lines above say, then {AGAIN}")


def _run_steps(plan: Reproduction, environment: dict[str, str]) -> None:
    steps = plan.list_steps()
    for number, step in enumerate(steps, start=1):
        if step.is_finished():
            continue
        show(f"\n== {number} of {len(steps)}: {step.title}")
        start = time.monotonic()
        code = run_step(step, environment)
        if code:
            _stop(step, code)
        show(f"== took {(time.monotonic() - start) / 60:.1f} min")
        write_results(plan)
    show(f"\n{write_results(plan)}\n\nalso in {plan.output / 'results.md'}")


def run_step(step: Step, environment: dict[str, str]) -> int:
    """Run a step's command in the checkout, and return its exit code.

    Signals that ask this process to stop go on to the command, each of them once.
    """
    process = subprocess.Popen(
        step.command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE if step.report else None,
        text=True,
        start_new_session=True,
    )
    with passing_signals_on(process):
        output, _ = process.communicate()
    if step.report:
        show(output.rstrip())
        if process.returncode == 0:
            with atomic_write(step.report) as path:
                path.write_text(output, encoding="utf-8")
        elif process.returncode == 1:  # a check that found something
            return EXIT_USER_ERROR
    return process.returncode


@contextmanager
def passing_signals_on(process: subprocess.Popen) -> Iterator[None]:
    """Inside, signals that ask to stop are sent on to a process in a session of its own."""

    def pass_on(number: int, _frame: object) -> None:
        process.send_signal(number)

    previous = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in previous.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, pass_on)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _stop(step: Step, code: int) -> NoReturn:
    """Say what failed, and exit with the step's code; 1 if a signal ended it."""
    show(f"{step.title}: stopped. Its last line says why; {AGAIN}.", file=sys.stderr)
    raise SystemExit(code if code > 0 else EXIT_LOST_PROCESS)


def write_results(plan: Reproduction) -> str:
    """Write results.md and results.csv from the finished trainings; the table."""
    scores = collect_scores(plan.trainings, plan.read_scores)
    table = format_table(plan.dataset, plan.choices, scores, plan.is_small)
    with atomic_write(plan.output / "results.md") as path:
        path.write_text(f"{table}\n", encoding="utf-8")
    with atomic_write(plan.output / "results.csv") as path:
        scores.to_csv(path, index=False)
    return table


def _make_plan(args: argparse.Namespace, options: tuple[str, ...]) -> Reproduction:
    dataset = DATASETS[args.dataset]
    name = f"{dataset.name}-small" if args.small else dataset.name
    output = (args.output or ROOT / "runs" / "reproduce" / name).resolve()
    data = output / "data" if args.small else (args.data or ROOT / dataset.folder).resolve()
    return Reproduction(
        dataset,
        data,
        output,
        tuple(dict.fromkeys(args.seeds)),
        tuple(dict.fromkeys(args.select_on)),
        args.small,
        options,
    )


def _build_parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument(
        "--small",
        action="store_true",
        help="rehearse: every step on drawn scenes, with a tiny model, in minutes",
    )
    parser.add_argument(
        "--plan", action="store_true", help="show the steps and what they take; run nothing"
    )
    parser.add_argument(
        "--seeds",
        type=bounded(int, 0, MAX_SEED),
        nargs="+",
        default=SEEDS,
        metavar="SEED",
        help="seeds of both stages (default: 2021 42 44)",
    )
    parser.add_argument(
        "--select_on",
        nargs="+",
        choices=CHOICES,
        default=CHOICES,
        help="splits that choose the epochs; each costs all trainings (default: test val)",
    )
    parser.add_argument(
        "--processes",
        type=bounded(int, 1, MAX_WORKERS),
        default=1,
        metavar="N",
        help="GPUs of this machine to train on, one process each (default: 1)",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="where the dataset is, or is downloaded to (default: images for spot, data for clevr)",
    )
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="folder of runs and results (default: runs/…)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
