"""The table of costs beside the aims: python benchmarks/run_all.py [--quick] [--output FILE]

Each benchmark runs in a process of its own and prints one JSON line; then comes the table. Aims are for two CPU cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
AIMS = {  # cost a pair: the published code's on two CPU cores (float32), and what is aimed at
    "finetuning": {"published": 118, "fp32": 80, "bf16": 40}, "adaptation": {"published": 93, "fp32": 72, "bf16": 36},
    "greedy": {"published": 169, "fp32": 28, "bf16": 14}, "beam": {"published": None, "fp32": 40, "bf16": 24}}


def main() -> int:
    """Run all, print a line each and the table; 1 where a benchmark failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats of each instead of seven")
    parser.add_argument("--output", type=Path, help="also write the JSON lines here")
    args = parser.parse_args()
    lines = []
    for what in AIMS:
        for precision in ("fp32", "bf16"):
            repeats = "3" if args.quick else "7"
            command = [sys.executable, str(FOLDER / "steps.py"), "--what", what, "--precision", precision, "--repeats", repeats]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"run_all.py: {' '.join(command)} ended with {done.returncode}", file=sys.stderr)
                return 1
            print(done.stdout, end="", flush=True)
            lines.append(done.stdout)
    if args.output:
        args.output.write_text("".join(lines))
    print_table([json.loads(line) for line in lines])
    return 0


def print_table(results: list[dict]) -> None:
    """Cost a pair of each benchmark and precision, the published cost and the aim; cost also by the tuned product's rate."""
    print(f"\n{'cost a pair (GFLOP of GEMM)':30}{'published':>10}{'here':>10}{'aim':>8}{'tuned':>10}{'pairs/s':>10}{'of GEMM':>9}")
    for row in results:
        aims, cost = AIMS[row["benchmark"]], row["cost_per_pair"]
        aim, published = aims[row["precision"]], aims["published"] or "–"
        print(f"{row['benchmark'] + ', ' + row['precision']:30}{published:>10}{cost:>10}{aim:>8}{row['cost_per_pair_tuned']:>10}"
              f"{row['pairs_per_second']:>10}{row['share_of_gemm']:>9.0%}{'  met' if cost <= aim else ''}")


if __name__ == "__main__":
    raise SystemExit(main())
