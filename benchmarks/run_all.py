"""The table of costs beside the aims: python benchmarks/run_all.py [--quick] [--scale] [--output FILE]

Each benchmark runs in a process of its own and prints one JSON line; then comes the table. Aims are for two CPU cores. `--scale`
runs the data path at two sizes and training by 1, 2 and 4 processes instead.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
AIMS = {  # cost a pair: the published code's on two CPU cores (float32), and what is aimed at
    "finetuning": {"published": 118, "fp32": 80, "bf16": 40},
    "adaptation": {"published": 93, "fp32": 72, "bf16": 36},
    "greedy": {"published": 169, "fp32": 28, "bf16": 14},
    "beam": {"published": None, "fp32": 40, "bf16": 24},
}
PROCESSES = (1, 2, 4)


def main() -> int:
    """Run all, print a line each and the tables; 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--quick", action="store_true", help="three repeats of each instead of seven"
    )
    parser.add_argument(
        "--scale", action="store_true", help="data path and several processes instead"
    )
    parser.add_argument(
        "--annotations",
        type=Path,
        help="with --scale: a folder with Spot-the-Diff's train.json, measured too",
    )
    parser.add_argument("--output", type=Path, help="also write the JSON lines here")
    args = parser.parse_args()
    lines = []
    for command in scale_commands(args) if args.scale else step_commands(args):
        done = subprocess.run(
            [sys.executable, *command], stdout=subprocess.PIPE, text=True, check=False
        )
        if done.returncode:
            print(f"run_all.py: {' '.join(command)} ended with {done.returncode}", file=sys.stderr)
            return 1
        print(done.stdout, end="", flush=True)
        lines.append(done.stdout)
    if args.output:
        args.output.write_text("".join(lines))
    results = [json.loads(line) for line in lines]
    if args.scale:
        print_data_paths([row for row in results if row["benchmark"].startswith("data path")])
        print_processes([row for row in results if "processes" in row])
    else:
        print_costs(results)
    return 0


def step_commands(args: argparse.Namespace) -> list[list[str]]:
    """steps.py on everything, in float32 and bf16."""
    repeats = "3" if args.quick else "7"
    return [
        [str(FOLDER / "steps.py"), "--what", what, "--precision", precision, "--repeats", repeats]
        for what in AIMS
        for precision in ("fp32", "bf16")
    ]


def scale_commands(args: argparse.Namespace) -> list[list[str]]:
    """data_path.py on growing datasets, and steps.py by several processes."""
    data = [
        ["--datatype", "clevr", "--scenes", "4000"],
        ["--datatype", "clevr", "--scenes", "40000"],
    ]
    if args.annotations:
        data.append(["--datatype", "spot", "--annotations", str(args.annotations)])
    launch = [
        [
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={n}",
            str(FOLDER / "steps.py"),
            "--what",
            what,
            "--repeats",
            "3" if args.quick else "7",
        ]
        for what in ("adaptation", "finetuning")
        for n in PROCESSES
    ]
    return [[str(FOLDER / "data_path.py"), *more] for more in data] + launch


def print_costs(results: list[dict]) -> None:
    """Cost a pair of each benchmark and precision, the published cost and the aim; cost also by the tuned product's rate."""
    print(
        f"\n{'cost a pair (GFLOP of GEMM)':30}{'published':>10}{'here':>10}{'aim':>8}{'tuned':>10}{'pairs/s':>10}{'of GEMM':>9}"
    )
    for row in results:
        aims, cost = AIMS[row["benchmark"]], row["cost_per_pair"]
        aim, published = aims[row["precision"]], aims["published"] or "–"
        print(
            f"{row['benchmark'] + ', ' + row['precision']:30}{published:>10}{cost:>10}{aim:>8}{row['cost_per_pair_tuned']:>10}"
            f"{row['pairs_per_second']:>10}{row['share_of_gemm']:>9.0%}{'  met' if cost <= aim else ''}"
        )


def print_data_paths(results: list[dict]) -> None:
    """Start-up, a worker's own memory after all sentences, and pairs a second by number of workers."""
    workers = list(results[0]["adaptation"]["pairs_per_second"])
    print(
        f"\n{'data path':34}{'start-up s':>11}{'worker +MB':>11}{'(objects)':>10}"
        + "".join(f"{f'pairs/s, {n}w':>13}" for n in workers)
    )
    for row in results:
        for stage in ("adaptation", "finetuning"):
            part = row[stage]
            print(
                f"{row['benchmark'].removeprefix('data path, ')} {row['scenes']:6}, {stage:20}{row['startup_seconds']:>11}"
                f"{part['worker_grows_mb']:>11}{part['worker_grows_mb_by_objects']:>10}"
                + "".join(f"{part['pairs_per_second'][n]:>13}" for n in workers)
            )


def print_processes(results: list[dict]) -> None:
    """Pairs a second by number of processes, and the share of one process' speed that is left; all have the same cores."""
    print(f"\n{'training, float32':24}{'processes':>10}{'pairs/s':>10}{'of one':>8}")
    for row in results:
        one = next(r for r in results if r["benchmark"] == row["benchmark"] and r["processes"] == 1)
        print(
            f"{row['benchmark']:24}{row['processes']:>10}{row['pairs_per_second']:>10}{one['seconds'] / row['seconds']:>8.0%}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
