"""Attention by plain products against SDPA on the CPU, by sequence length: what `FEW_KEYS` in modules/model/layers.py is set by.

    python benchmarks/attention.py --precision bf16

prints one JSON line: milliseconds forward (f) and forward and backward (fb) of 16 × 12 heads of 64, products / SDPA.
"""

import json
import sys
from pathlib import Path

import torch

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import description, seconds_of
from modules.model import layers
from system.command import OneLineParser
from system.compute import DTYPES, matmul_precision

LENGTHS = (25, 50, 100, 200, 400, 800)
ROWS, HEADS = 16, 12


def milliseconds(
    length: int, dtype: torch.dtype, few_keys: int, backward: bool, repeats: int
) -> float:
    """The fastest of some runs of `attend` with its limit set to few_keys."""
    layers.SDPA_MIN_KEYS = few_keys
    q, k, v = (
        torch.randn(ROWS, HEADS, length, 64, dtype=dtype, requires_grad=backward) for _ in range(3)
    )

    def work() -> None:
        out = layers.attend(q, k, v)
        if backward:
            out.backward(torch.ones_like(out))

    return round(1000 * min(seconds_of(work, q.device, repeats)), 2)


def main() -> None:
    """Print one JSON line."""
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with matmul_precision(torch.device("cpu"), args.precision):
        results = {
            f"{length}{'fb' if backward else 'f'}": [
                milliseconds(length, DTYPES[args.precision], few_keys, backward, args.repeats)
                for few_keys in (LENGTHS[-1], 0)
            ]
            for length in LENGTHS
            for backward in (False, True)
        }
    print(
        json.dumps(
            {
                "benchmark": "attention",
                "precision": args.precision,
                "products_and_sdpa_ms": results,
                **description(torch.device("cpu")),
            }
        )
    )


if __name__ == "__main__":
    main()
