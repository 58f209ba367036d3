"""Run all benchmarks of the model, and print their costs next to the aims.

    python benchmarks/run_all.py [--quick] [--output FILE]
    python benchmarks/run_all.py --scale [--annotations FOLDER] [--quick] [--output FILE]

Each benchmark runs in its own process and prints one JSON line. The aims are for two CPU cores.
With --scale it measures other things instead of the steps: the data path at two sizes, and training
by 1, 2 and 4 processes.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

from system.parser import OneLineParser

FOLDER = Path(__file__).parent

# Cost of a pair: the published code's on two CPU cores (float32), and the aims for ours.
AIMS = {
    "finetuning": {"published": 118, "fp32": 80, "bf16": 40},
    "adaptation": {"published": 93, "fp32": 72, "bf16": 36},
    "greedy": {"published": 169, "fp32": 28, "bf16": 14},
    "beam": {"published": None, "fp32": 40, "bf16": 24},
}
TRAININGS = ("adaptation", "finetuning")
PROCESSES = (1, 2, 4)
CLEVR_SCENES = (4_000, 40_000)

Row = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Run all, print the JSON lines and the tables. Returns 1 if a benchmark failed."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.annotations and not args.scale:
        parser.error("--annotations is for --scale")
    commands = _scale_commands(args) if args.scale else _step_commands(args)
    lines = []
    for command in commands:
        done = subprocess.run(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            name = " ".join(command)
            print(f"run_all.py: {name} ended with {done.returncode}", file=sys.stderr)
            return 1
        print(done.stdout, end="", flush=True)
        lines.append(done.stdout)
    if args.output:
        args.output.write_text("".join(lines))
    rows = [json.loads(line) for line in lines]
    if args.scale:
        print_data_paths([row for row in rows if row["benchmark"].startswith("data path")])
        print_processes([row for row in rows if "processes" in row])
    else:
        print_costs(rows)
    return 0


def _parser() -> OneLineParser:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    quick = "three repeats of each instead of seven"
    scale = "measure the data path and several processes instead of the steps"
    annotations = "with --scale: a folder with Spot-the-Diff's train.json, which is measured too"
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--scale", action="store_true", help=scale)
    parser.add_argument("--annotations", type=Path, help=annotations)
    parser.add_argument("--output", type=Path, help="also write the JSON lines here")
    return parser


def _repeats(args: argparse.Namespace) -> list[str]:
    return ["--repeats", "3" if args.quick else "7"]


def _step_commands(args: argparse.Namespace) -> list[list[str]]:
    """Commands that run each benchmark of steps.py in float32 and bf16."""
    return [
        [str(FOLDER / "steps.py"), "--what", what, "--precision", precision, *_repeats(args)]
        for what in AIMS
        for precision in ("fp32", "bf16")
    ]


def _scale_commands(args: argparse.Namespace) -> list[list[str]]:
    """Commands that run data_path.py at growing sizes, and steps.py in several processes."""
    data_path = str(FOLDER / "data_path.py")
    commands = [
        [data_path, "--datatype", "clevr", "--scenes", str(count)] for count in CLEVR_SCENES
    ]
    if args.annotations:
        commands.append([data_path, "--datatype", "spot", "--annotations", str(args.annotations)])
    for what in TRAININGS:
        steps = [str(FOLDER / "steps.py"), "--what", what, *_repeats(args)]
        for count in PROCESSES:
            launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={count}"]
            commands.append([*launcher, *steps])
    return commands


def _print_line(cells: Sequence[object], widths: Sequence[int]) -> None:
    """Cells in columns: the first is aligned left, the others right."""
    first, *others = cells
    columns = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
    print(f"{first:<{widths[0]}}" + "".join(columns).rstrip())


def print_costs(rows: Sequence[Row]) -> None:
    """For each benchmark, the cost of a pair next to the published one and the aim.

    "tuned" is the cost at the rate of the product that the scripts use; see README.md here.
    """
    widths = (30, 10, 10, 8, 10, 10, 9, 5)
    title = "cost a pair (GFLOP of GEMM)"
    print()
    _print_line((title, "published", "here", "aim", "tuned", "pairs/s", "of GEMM", ""), widths)
    for row in rows:
        aims = AIMS[row["benchmark"]]
        aim = aims[row["precision"]]
        cells = (
            f"{row['benchmark']}, {row['precision']}",
            aims["published"] or "–",
            row["cost_per_pair"],
            aim,
            row["cost_per_pair_tuned"],
            row["pairs_per_second"],
            f"{row['share_of_gemm']:.0%}",
            "met" if row["cost_per_pair"] <= aim else "",
        )
        _print_line(cells, widths)


def print_data_paths(rows: Sequence[Row]) -> None:
    """Start-up, the memory of a worker, and pairs per second by the number of workers."""
    workers = list(rows[0]["adaptation"]["pairs_per_second"])
    widths = (34, 11, 11, 10, *(13 for _ in workers))
    rates = [f"pairs/s, {count}w" for count in workers]
    print()
    _print_line(("data path", "start-up s", "worker +MB", "(objects)", *rates), widths)
    for row in rows:
        dataset = row["benchmark"].removeprefix("data path, ")
        for training in TRAININGS:
            part = row[training]
            cells = (
                f"{dataset} {row['scenes']:6}, {training}",
                row["startup_seconds"],
                part["worker_grows_mb"],
                part["worker_grows_mb_by_objects"],
                *(part["pairs_per_second"][count] for count in workers),
            )
            _print_line(cells, widths)


def print_processes(rows: Sequence[Row]) -> None:
    """Pairs per second by the number of processes, and the speed relative to one process.

    All processes share the same cores.
    """
    widths = (24, 10, 10, 8)
    alone = {row["benchmark"]: row["seconds"] for row in rows if row["processes"] == 1}
    print()
    _print_line(("training, float32", "processes", "pairs/s", "of one"), widths)
    for row in rows:
        relative = f"{alone[row['benchmark']] / row['seconds']:.0%}"
        cells = (row["benchmark"], row["processes"], row["pairs_per_second"], relative)
        _print_line(cells, widths)


if __name__ == "__main__":
    sys.exit(main())
