"""Mutated pickle programs: instructions inserted, doubled, nested, repeated.

Each must be read or refused in one line, within bounds of time and memory, without a crash.
"""

import functools
import json
import pickletools
import random
import resource
import signal
import struct
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from modules.weights.tensor_files import read_torch_file, read_weights
from tests.hostile import (
    MIB,
    make_script_archive,
    only_our_error,
    run_in_child,
    torch_save_bytes,
    with_entries,
)

MAX_SECONDS = 10  # of the processor's time, for one program
MAX_MEMORY = 1024 * MIB
MAX_PROGRAM_BYTES = 12 * MIB  # less than what is refused unread
# How often something is repeated, and how likely each number is in the quick tests and the others.
REPEATS = (2, 5, 60, 150, 5000, 100_000, 2_000_000)
QUICK = (25, 25, 25, 25, 10, 2, 0)
THOROUGH = (20, 20, 20, 20, 15, 4, 1)
QUICK_COUNT = 300
GETS = (b"h\0", b"h\1", b"j\0\0\0\0", b"j\xff\xff\xff\x7f")
VALUES = (
    b"N",
    b"\x88",
    b"K\1",
    b"J\xff\xff\xff\x7f",
    b"\x8a\xff" + b"\xff" * 255,
    b"G" + struct.pack(">d", 1e300),
    b"X\3\0\0\0abc",
    b"]",
    b"}",
    b")",
    b"(",
    b"U\3abc",
    b"ccollections\nOrderedDict\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch\nFloatStorage\n",
    b"c__torch__\nM\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"cos\nsystem\n",
    b"ctorch.jit._pickle\nbuild_intlist\n",
    *GETS,
)
ACTIONS = (
    *(bytes([code]) for code in b"aesut\x85\x86\x87R\x81bQ"),
    b"q\0",
    b"r\xff\xff\xff\x7f",
    *(bytes([code]) for code in b"012dloi\x93\x94\x90\x91"),
    b"\x95" + b"\xff" * 8,
    b"\x96" + b"\xff" * 8,
    b".",
)
CHANGES = (
    "insert",
    "insert",
    "insert pair",
    "double",
    "delete",
    "swap",
    "deep",
    "deep key",
    "shared",
    "repeat",
    "chain",
    "stretch",
)


@functools.cache
def instructions(program: bytes) -> tuple[bytes, ...]:
    """A pickle's instructions, each with its arguments."""
    places = [place for _, _, place in pickletools.genops(program)]
    return tuple(
        program[start:end] for start, end in zip(places, [*places[1:], len(program)], strict=True)
    )


def data_pickle(archive: bytes) -> bytes:
    """The program in an archive of torch's."""
    found: list[bytes] = []
    with_entries(archive, lambda content: found.append(content) or content)
    return found[0]


def sound_programs() -> list[tuple[bytes, bytes]]:
    """Archives of torch's, each with its program: weights, a training state, a scripted module."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": 3,
        "scheduler": {"steps": [1, 2.5, None, True]},
    }
    archives = [
        torch_save_bytes(model.state_dict()),
        torch_save_bytes(state),
        make_script_archive(),
    ]
    return [(archive, data_pickle(archive)) for archive in archives]


def mutated_program(program: bytes, draw: random.Random, weights: Sequence[int]) -> bytes:
    """The program with one to four changes to its instructions."""
    parts = list(instructions(program))
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(1, len(parts))
        times = draw.choices(REPEATS, weights)[0]
        change = draw.choice(CHANGES)
        if change == "double":
            parts[place:place] = parts[place : place + draw.randrange(1, 20)]
        elif change == "delete":
            del parts[place : place + draw.randrange(1, 4)]
        elif change == "swap":
            other = draw.randrange(1, len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif change == "stretch":
            piece = parts[place : place + draw.randrange(2, 40)]
            most = MAX_PROGRAM_BYTES // (sum(map(len, piece)) + 1)
            parts[place:place] = piece * min(times, 5000, most)
        else:
            parts.insert(place, new_part(change, times, draw))
        if sum(map(len, parts)) > MAX_PROGRAM_BYTES:
            break
    return b"".join(parts)[:MAX_PROGRAM_BYTES]


def new_part(change: str, times: int, draw: random.Random) -> bytes:
    """Instructions to insert."""
    if change == "insert":
        return draw.choice(VALUES + ACTIONS)
    if change == "insert pair":
        return draw.choice(VALUES) + draw.choice(VALUES) + draw.choice(ACTIONS)
    if change == "deep":
        return draw.choice(nested_containers(times))
    if change == "deep key":
        return b"})" + b"\x85" * times + b"K\1s"
    if change == "shared":  # 2 ** times leaves in `times` instructions
        return b")" + b"q\5h\5\x86" * times + draw.choice((b"", b"q\6}h\6K\1s"))
    if change == "repeat":
        return draw.choice(VALUES) * min(times, 20_000)
    assert change == "chain", change  # calls, items and attributes of what was made before
    return (draw.choice(VALUES) + draw.choice(ACTIONS)) * min(times, 200_000)


def nested_containers(times: int) -> tuple[bytes, ...]:
    """Tuples, lists and dictionaries inside each other."""
    return (
        b"\x85" * times,
        b"(" * times + b"t" * times,
        b"]" * times + b"a" * (times - 1),
        b"}" + b"N}" * times + b"s" * times,
        b"]" + b"q\0]h\0a0" * times,
        b"]" * times,
    )


def fuzz(folder: str, count: int) -> None:
    """Read `count` mutated programs and print what became of them.

    Runs in a process of its own, which ends where one program takes too much time or memory. The
    program that is being read lies in the folder.
    """
    torch.set_num_threads(1)
    limit_memory()
    path = Path(folder, "mutated")
    outcomes = Counter()
    slowest = 0.0
    largest = 0
    archives = sound_programs()
    draw = random.Random(f"pickles {count}")
    weights = QUICK if count <= QUICK_COUNT else THOROUGH
    for number in range(count):
        archive, program = archives[number % len(archives)]
        content = mutated_program(program, draw, weights)
        path.write_bytes(with_entries(archive, lambda _, content=content: content))
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = memory("VmRSS")
        start = time.process_time()
        outcomes["refused"] += 1
        with only_our_error(path):
            value = read_torch_file(path) if number % 2 else read_weights(path)
            outcomes["refused"] -= 1
            outcomes["read"] += 1
            del value
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - start)
        largest = max(largest, memory("VmHWM") - before)
    print(json.dumps({**outcomes, "slowest": round(slowest, 2), "largest": largest // MIB}))


def limit_memory() -> None:
    """From now on the process may take so much more."""
    most = memory("VmData") + MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def memory(name: str) -> int:
    """Bytes that this process holds (VmRSS), has held at most (VmHWM), has as data (VmData)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    "count",
    [
        pytest.param(QUICK_COUNT, id="quick"),
        pytest.param(10_000, id="thorough", marks=pytest.mark.slow),
    ],
)
def test_mutated_programs_crash_nothing_and_stay_within_bounds(count, tmp_path):
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("peaks of memory are measured by Linux's /proc")
    code = f"from tests.test_mutated_pickles import fuzz; fuzz({str(tmp_path)!r}, {count})"
    facts = run_in_child(code)
    print(facts)
    assert facts["read"] > count / 50
    assert facts["refused"] > count / 3
    assert facts["slowest"] < MAX_SECONDS
    assert facts["largest"] < MAX_MEMORY // MIB
