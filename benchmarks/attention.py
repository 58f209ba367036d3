"""Attention by plain products and by SDPA on the CPU, for several lengths.

The limit MAX_PRODUCT_KEYS in modules/model/layers.py was chosen by it.

    python benchmarks/attention.py --precision bf16

prints one JSON line: milliseconds for the forward pass (f), and for forward and backward (fb), of
16 × 12 heads of width 64, by products and by SDPA.
"""

import json
import sys
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import torch

from benchmarks.machine import machine_info, time_runs
from modules.model import layers
from system.compute import DTYPES, use_fast_matmuls
from system.parser import OneLineParser, first_line

LENGTHS = (25, 50, 100, 200, 400, 800)
BATCH_SIZE = 16
HEADS = 12
HEAD_WIDTH = 64


def milliseconds(
    length: int, dtype: torch.dtype, max_product_keys: int, backward: bool, repeats: int
) -> float:
    """Milliseconds of the fastest run of `attend` with this value of MAX_PRODUCT_KEYS."""
    shape = (BATCH_SIZE, HEADS, length, HEAD_WIDTH)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=backward) for _ in range(3))

    def work() -> None:
        out = layers.attend(q, k, v)
        if backward:
            out.backward(torch.ones_like(out))

    chosen = layers.MAX_PRODUCT_KEYS
    layers.MAX_PRODUCT_KEYS = max_product_keys
    try:
        seconds = time_runs(work, q.device, repeats)
    finally:
        layers.MAX_PRODUCT_KEYS = chosen
    return round(1000 * min(seconds), 2)


def measure(precision: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds [by products, by SDPA] for each length, forward, and forward and backward."""
    dtype = DTYPES[precision]
    only_products = LENGTHS[-1]
    only_sdpa = 0
    results = {}
    for length in LENGTHS:
        for name, backward in (("f", False), ("fb", True)):
            by_products = milliseconds(length, dtype, only_products, backward, repeats)
            by_sdpa = milliseconds(length, dtype, only_sdpa, backward, repeats)
            results[f"{length}{name}"] = [by_products, by_sdpa]
    return results


def main() -> None:
    """Print one JSON line."""
    parser = OneLineParser(description=first_line(__doc__))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    with use_fast_matmuls(cpu, args.precision):
        results = measure(args.precision, args.repeats)
    row = {
        "benchmark": "attention",
        "precision": args.precision,
        "products_and_sdpa_ms": results,
        **machine_info(cpu),
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
