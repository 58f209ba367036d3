"""Hostile pickle programs: instructions inserted, doubled, nested, repeated.

Each must be read or refused in one line, within bounds of time and memory, without a crash.
"""

import functools
import json
import os
import pickle
import pickletools
import random
import resource
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from modules.weights.tensor_files import read_torch_file, read_weights
from modules.weights.unpickler import MAX_DEPTH
from tests.conftest import ROOT
from tests.hostile import MIB, only_our_error, rebuilt, saved, scripted, with_entries

MOST_SECONDS, MOST_MEMORY = 10, 1024 * MIB
LONGEST_PROGRAM = 12 * MIB  # less than what is refused unread
REPEATS = (
    2,
    5,
    60,
    150,
    5000,
    100_000,
    2_000_000,
)  # how often something is repeated; the last two rarely
QUICK = (25, 25, 25, 25, 10, 2, 0)  # the weights of REPEATS
THOROUGH = (20, 20, 20, 20, 15, 4, 1)
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
    b"a",
    b"e",
    b"s",
    b"u",
    b"t",
    b"\x85",
    b"\x86",
    b"\x87",
    b"R",
    b"\x81",
    b"b",
    b"Q",
    b"q\0",
    b"r\xff\xff\xff\x7f",
    b"0",
    b"1",
    b"2",
    b"d",
    b"l",
    b"o",
    b"i",
    b"\x93",
    b"\x94",
    b"\x90",
    b"\x91",
    b"\x95" + b"\xff" * 8,
    b"\x96" + b"\xff" * 8,
    b".",
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
    archives = [saved(model.state_dict()), saved(state), scripted()]
    return [(archive, data_pickle(archive)) for archive in archives]


def mutated_program(program: bytes, draw: random.Random, weights: Sequence[int]) -> bytes:
    """The program with one to four changes to its instructions."""
    parts = list(instructions(program))
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(1, len(parts))
        times = draw.choices(REPEATS, weights)[0]
        kind = draw.choice(
            (
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
        )
        if kind == "insert":
            parts.insert(place, draw.choice(VALUES + ACTIONS))
        elif kind == "insert pair":
            parts[place:place] = [draw.choice(VALUES), draw.choice(VALUES), draw.choice(ACTIONS)]
        elif kind == "double":
            parts[place:place] = parts[place : place + draw.randrange(1, 20)]
        elif kind == "delete":
            del parts[place : place + draw.randrange(1, 4)]
        elif kind == "swap":
            other = draw.randrange(1, len(parts))
            parts[place], parts[other] = parts[other], parts[place]
        elif kind == "deep":  # lists, tuples and dictionaries in each other
            parts.insert(
                place,
                draw.choice(
                    (
                        b"\x85" * times,
                        b"(" * times + b"t" * times,
                        b"]" * times + b"a" * (times - 1),
                        b"}" + b"N}" * times + b"s" * times,
                        b"]" + b"q\0]h\0a0" * times,
                        b"]" * times,
                    )
                ),
            )
        elif kind == "deep key":
            parts.insert(place, b"})" + b"\x85" * times + b"K\1s")
        elif kind == "shared":  # 2 ** times leaves in `times` instructions
            parts.insert(place, b")" + b"q\5h\5\x86" * times + draw.choice((b"", b"q\6}h\6K\1s")))
        elif kind == "repeat":
            parts.insert(place, draw.choice(VALUES) * min(times, 20_000))
        elif kind == "chain":  # calls, items and attributes of what was made before
            parts.insert(place, (draw.choice(VALUES) + draw.choice(ACTIONS)) * min(times, 200_000))
        elif kind == "stretch":
            piece = parts[place : place + draw.randrange(2, 40)]
            parts[place:place] = piece * min(
                times, 5000, LONGEST_PROGRAM // (sum(map(len, piece)) + 1)
            )
        if sum(map(len, parts)) > LONGEST_PROGRAM:
            break
    return b"".join(parts)[:LONGEST_PROGRAM]


def fuzz(folder: str, count: int) -> None:
    """Read `count` mutated programs and print what became of them.

    Runs in a process of its own, which ends where one program takes too much time or memory. The
    program that is being read lies in the folder.
    """
    torch.set_num_threads(1)
    path, outcomes, slowest, largest = Path(folder, "mutated"), Counter(), 0.0, 0
    archives, draw = sound_programs(), random.Random(f"pickles {count}")
    status = Path("/proc/self/status").read_text()
    data = int(status.split("VmData:")[1].split()[0]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (data + MOST_MEMORY, data + MOST_MEMORY))
    for number in range(count):
        archive, program = archives[number % len(archives)]
        content = mutated_program(program, draw, QUICK if count <= 300 else THOROUGH)
        path.write_bytes(with_entries(archive, lambda _, content=content: content))
        signal.setitimer(
            signal.ITIMER_PROF, MOST_SECONDS
        )  # of the processor's time: others may be at work, too
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        before, start = memory("VmRSS"), time.process_time()
        with only_our_error(path):
            outcomes["refused"] += 1
            value = read_torch_file(path) if number % 2 else read_weights(path)
            outcomes["refused"] -= 1
            outcomes["read"] += 1
            del value
        signal.setitimer(signal.ITIMER_PROF, 0)
        slowest = max(slowest, time.process_time() - start)
        largest = max(largest, memory("VmHWM") - before)
    print(json.dumps({**outcomes, "slowest": round(slowest, 2), "largest": largest // MIB}))


def memory(name: str) -> int:
    """Bytes that this process holds (VmRSS), or has held at most (VmHWM)."""
    return int(Path("/proc/self/status").read_text().split(f"{name}:")[1].split()[0]) * 1024


@pytest.mark.parametrize(
    "count",
    [pytest.param(300, id="quick"), pytest.param(10_000, id="thorough", marks=pytest.mark.slow)],
)
def test_mutated_programs_crash_nothing_and_stay_within_bounds(count, tmp_path):
    if not Path("/proc/self/clear_refs").is_file():
        pytest.skip("peaks of memory are measured by Linux's /proc")
    code = f"from tests.test_pickles import fuzz; fuzz({str(tmp_path)!r}, {count})"
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, f"ended with {child.returncode}: {child.stderr[-2000:]}"
    told = json.loads(child.stdout.splitlines()[-1])
    print(told)
    assert told["read"] > count / 50
    assert told["refused"] > count / 3
    assert told["slowest"] < MOST_SECONDS
    assert told["largest"] < MOST_MEMORY // MIB


MOST = 30_000  # instructions, in the place of a million, so that a test is quick


def program(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


def storage(count: int = 4) -> bytes:
    """Instructions that leave a storage of the archive on the stack."""
    return (
        rebuilt((0, (4,), (1,)), count).partition(b"_rebuild_tensor_v2\n(")[2].partition(b"Q")[0]
        + b"Q"
    )


def tensor() -> bytes:
    """Instructions that leave a tensor on the stack."""
    return rebuilt((0, (4,), (1,)))[9:-2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (program(b"})", b"\x85" * 2_000_000, b"K\1s"), "instructions"),
        (program(b"})", b"\x85" * 20_000, b"K\1s"), "a tuple as a key"),
        (program(b"})K\1s"), "a tuple as a key"),
        (program(b"}NK\1s"), "a NoneType as a key"),
        (program(b"}\x88K\1s"), "a bool as a key"),
        (program(b"}G" + bytes(8) + b"K\1s"), "a float as a key"),
        (program(b"}\x8a\x09" + b"\xff" * 8 + b"\0K\1s"), "a int as a key"),
        (program(tensor(), b"K\0K\1s"), "items of a Tensor"),
        (program(tensor(), b"(K\0K\1u"), "items of a Tensor"),
        (program(b"]K\0K\1s"), "items of a list"),
        (program(b"c__torch__\nM\n)\x81K\0K\1s"), "items of a ScriptedModule"),
        (program(tensor(), b"K\1a"), "elements of a Tensor"),
        (program(b"}K\1a"), "elements of a dict"),
        (program(b"}(K\1e"), "elements of a dict"),
        (program(storage(), b"K\1a"), "elements of a Storage"),
        (program(b"ctorch._utils\n_rebuild_parameter\n", tensor(), b"R"), "a call is described"),
        (program(tensor(), b")R"), "a call of a Tensor"),
        (program(b"c__torch__\nM\n)R"), "a call of a type"),
        (program(b"c__torch__\nM\n", tensor(), b"\x81"), "no module"),
        (program(b"ccollections\nOrderedDict\n)\x81"), "no module"),
        (program(tensor(), b"Q"), "a storage is described"),
        (program(b"c__torch__\nM\n)\x81", tensor(), b"b"), "attributes are no dictionary"),
        (
            program(b"(", b"N" * 9, b"tq\0ctorch._utils\n_rebuild_parameter\nh\0R"),
            "a call is described",
        ),
        (
            program(
                b"}(",
                b"".join(b"X\4\0\0\0%04dN" % n for n in range(500)),
                b"uq\0c__torch__\nM\n)\x81",
                b"h\0b" * 30,
            ),
            "more than 10000 attributes",
        ),
        (program(b")", b"\x85" * 20_000), f"more than {MAX_DEPTH} deep"),
        (program(b")", b"q\5h\5\x86" * 200, b"q\6}h\6K\1s"), "a tuple as a key"),
        (program(b")", b"q\5h\5\x86" * 200), f"more than {MAX_DEPTH} deep"),
        (program(b"]q\0h\0a"), "without end"),
        (program(b"]q\0]h\0a]h\0h\0a"), "no state dict|damaged|without end"),
        (program(b"N" * MOST), "instructions"),
        (
            program(
                b"](ctorch._utils\n_rebuild_tensor_v2\nq\0(",
                storage(),
                b"K\0K\0\x85K\1\x85tq\1Re(",
                b"h\0h\1R" * 1000,
                b"e",
            ),
            "more than 1000 tensors",
        ),
        (rebuilt((0, (1,) * 1000, (1,) * 1000)), "no known way|instructions"),
        (rebuilt((0, (2**2000,) * 9, (2**2000,) * 9)), "ends at element"),
    ],
)
def test_programs_that_would_crash_or_take_hours_are_refused(
    content, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("modules.weights.unpickler.MAX_INSTRUCTIONS", MOST)
    monkeypatch.setattr("modules.weights.unpickler.MAX_TENSORS", 1000)
    monkeypatch.setattr("modules.weights.unpickler.MAX_ATTRIBUTES", 10_000)
    path = tmp_path / "weights.bin"
    path.write_bytes(with_entries(saved({"a": torch.arange(4.0)}), lambda _: content))
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"weights\.bin.*({message})"):
        read_weights(path)
    assert time.monotonic() - start < MOST_SECONDS


def test_what_is_deep_and_shared_within_bounds_is_read(tmp_path):
    deep = [[1, 2, {"a": (3,)}]]
    for _ in range(MAX_DEPTH - 5):  # with the outermost dictionary as many as may be
        deep = [deep]
    shared = ({"x": [1]},) * 3
    value = {"deep": deep, "shared": [shared, shared], "model": {1: torch.ones(2), -7: None}}
    (tmp_path / "a").write_bytes(saved(value))
    found = read_torch_file(tmp_path / "a")
    assert found["deep"] == deep
    assert found["shared"] == [shared, shared]
    assert torch.equal(found["model"][1], torch.ones(2))
    (tmp_path / "a").write_bytes(saved({"deeper": [deep]}))
    with pytest.raises(ValueError, match="deep"):
        read_torch_file(tmp_path / "a")


def test_an_older_file_names_its_storages_in_texts(tmp_path):
    parts = b"".join(pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, {}))
    for keys in (b"\x80\x02])" + b"\x85" * 90 + b"a.", b"\x80\x02K\1.", b"\x80\x02]K\1a."):
        (tmp_path / "a").write_bytes(parts + rebuilt((0, (4,), (1,))) + keys + bytes(40))
        with pytest.raises(ValueError, match="named in no known way"):
            read_weights(tmp_path / "a")


def test_a_scripted_modules_long_names_are_not_joined_without_end(tmp_path):
    name = b"X" + struct.pack("<I", 2**20) + b"n" * 2**20
    one = b"c__torch__\nM\n)\x81}" + name + tensor() + b"sb"
    (tmp_path / "a").write_bytes(
        with_entries(saved({"a": torch.arange(4.0)}), lambda _: program(one))
    )
    with pytest.raises(ValueError, match="without end"):
        read_weights(tmp_path / "a")


def test_a_zip_that_lists_millions_of_entries_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.weights.tensor_files.MAX_ENTRIES", 100)
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
        for number in range(101):
            archive.writestr(f"x/{number}", b"")
    with pytest.raises(ValueError, match="more than 100 entries"):
        read_weights(tmp_path / "a")
    monkeypatch.setattr("system.archives.MAX_DIRECTORY_BYTES", 1000)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        read_weights(tmp_path / "a")
