"""Attention by plain products against SDPA on the CPU, by length: it sets MAX_PRODUCT_KEYS.

    python benchmarks/attention.py --precision bf16

prints one JSON line: milliseconds forward (f) and forward and backward (fb) of 16 × 12 heads of
width 64, by products and by SDPA.
"""

import json
import sys
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import machine_info, time_runs
from modules.model import layers
from system.command import OneLineParser
from system.compute import DTYPES, use_fast_matmuls

LENGTHS = (25, 50, 100, 200, 400, 800)
BATCH_SIZE = 16
HEADS = 12
HEAD_WIDTH = 64


def milliseconds(
    length: int, dtype: torch.dtype, max_product_keys: int, backward: bool, repeats: int
) -> float:
    """The fastest run of `attend` with MAX_PRODUCT_KEYS set to this value."""
    layers.MAX_PRODUCT_KEYS = max_product_keys
    shape = (BATCH_SIZE, HEADS, length, HEAD_WIDTH)
    q, k, v = (torch.randn(shape, dtype=dtype, requires_grad=backward) for _ in range(3))

    def work() -> None:
        out = layers.attend(q, k, v)
        if backward:
            out.backward(torch.ones_like(out))

    return round(1000 * min(time_runs(work, q.device, repeats)), 2)


def measure(precision: str, repeats: int) -> dict[str, list[float]]:
    """Milliseconds [by products, by SDPA] for each length, forward and with backward."""
    only_products = LENGTHS[-1]
    only_sdpa = 0
    results = {}
    for length in LENGTHS:
        for backward in (False, True):
            results[f"{length}{'fb' if backward else 'f'}"] = [
                milliseconds(length, DTYPES[precision], limit, backward, repeats)
                for limit in (only_products, only_sdpa)
            ]
    return results


def main() -> None:
    """Print one JSON line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    cpu = torch.device("cpu")
    row: dict[str, object] = {"benchmark": "attention", "precision": args.precision}
    with use_fast_matmuls(cpu, args.precision):
        row["products_and_sdpa_ms"] = measure(args.precision, args.repeats)
    print(json.dumps({**row, **machine_info(cpu)}))


if __name__ == "__main__":
    main()
