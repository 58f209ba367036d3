"""Thousands of mutated pictures and files of weights, read in a process of its own."""

import json
import random
import resource
from collections import Counter
from pathlib import Path

import pytest

from tests.hostile import (
    MAX_EXTRA_BYTES,
    MIB,
    at_both_sizes,
    only_our_error,
    peak_memory,
    run_in_child,
)
from tests.test_hostile_images import image_sources, read_picture
from tests.test_hostile_weights import read_all_weights, weight_sources

KINDS = {
    "images": (image_sources, read_picture),
    "weights": (weight_sources, read_all_weights),
}
MAX_LEAK = 32 * MIB  # what a process may hold more at the end than in the middle
# What one file may take for a moment: Pillow decodes up to 179 million pixels.
MAX_RISE = {"images": 1536 * MIB, "weights": MAX_EXTRA_BYTES}


def fuzz(kind: str, folder: str, count: int) -> None:
    """Read `count` mutated files of each source, and print what became of them and of the memory.

    Runs in a process of its own.
    """
    make_sources, read = KINDS[kind]
    sources = make_sources()
    path = Path(folder, "mutated")
    numbers_read = Counter()
    numbers_refused = Counter()
    draw = random.Random(f"{kind} {count}")
    for number in range(count):
        for name, source in sources.items():
            path.write_bytes(source(draw))
            numbers_refused[name] += 1
            with only_our_error(path):
                read(path)
                numbers_refused[name] -= 1
                numbers_read[name] += 1
        if number == count // 2:
            held = resident_memory()
            highest = peak_memory()
    facts = {
        "files": count * len(sources),
        "read": numbers_read.total(),
        "leaked": resident_memory() - held,
        "never read": [name for name in sources if not numbers_read[name]],
        "rise": peak_memory() - highest,
        "never refused": [name for name in sources if not numbers_refused[name]],
    }
    print(json.dumps(facts))


def resident_memory() -> int:
    """Bytes that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@at_both_sizes
@pytest.mark.parametrize("kind", KINDS)
def test_mutated_files_crash_nothing_and_leave_no_memory_behind(kind, count, tmp_path):
    code = f"from tests.test_mutated_files import fuzz; fuzz({kind!r}, {str(tmp_path)!r}, {count})"
    facts = run_in_child(code)
    print(kind, facts)
    assert not facts["never refused"]
    assert facts["read"] > facts["files"] / 20
    assert facts["leaked"] < MAX_LEAK
    assert facts["rise"] < MAX_RISE[kind]
