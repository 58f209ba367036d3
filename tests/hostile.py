"""For tests of hostile input: what a process opens and starts, mutated bytes, files of tensors."""

import io
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.weights.tensor_files import MAGIC, PROTOCOL
from tests.conftest import ROOT

# Examples of each property, and mutated files of each kind, in the default and the slow tier.
QUICK = 20
THOROUGH = 2000
at_both_sizes = pytest.mark.parametrize(
    "count",
    [
        pytest.param(QUICK, id="quick"),
        pytest.param(THOROUGH, id="thorough", marks=pytest.mark.slow),
    ],
)
MIB = 1 << 20
MAX_EXTRA_BYTES = 64 * MIB  # that reading one small file of weights may take for a moment
TOUCHES = ("open", "os.mkdir")
RUNS_CODE = (
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "ctypes.dlopen",
)

Source = Callable[[random.Random], bytes]  # draws a mutated file
Event = tuple[str, tuple]  # of Python's audit hook: its name and details

_events: list[Event] | None = None  # what the audit hook sees, while `audited` is entered


def _record(event: str, details: tuple) -> None:
    if _events is not None and event in (*TOUCHES, *RUNS_CODE):
        _events.append((event, details))


sys.addaudithook(_record)


@contextmanager
def audited() -> Iterator[list[Event]]:
    """The files that are opened inside, and the programs that are started."""
    global _events
    before = _events
    _events = []
    try:
        yield _events
    finally:
        _events = before


def stays_inside(events: list[Event], *folders: Path) -> bool:
    """Whether no program started, and nothing was opened or made outside these folders.

    Python's own modules and ours are allowed.
    """
    places = (*folders, ROOT, Path(sys.prefix), Path(sys.base_prefix))
    allowed = [folder.resolve() for folder in places]
    for event, details in events:
        if event not in TOUCHES:
            return False
        if isinstance(details[0], int):  # an open file's number
            continue
        path = Path(os.fsdecode(details[0])).resolve()
        if not any(path.is_relative_to(folder) for folder in allowed):
            return False
    return True


@contextmanager
def only_our_error(path: Path) -> Iterator[None]:
    """Inside, the only failure is a ValueError or OSError that names the file.

    Nothing outside its folder is opened.
    """
    message = str(path)
    with audited() as events:
        try:
            yield
        except (ValueError, OSError) as error:
            message = str(error)
    assert str(path) in message
    assert stays_inside(events, path.parent)


def mutate(content: bytes, draw: random.Random) -> bytes:
    """One to eight changes: bits flipped, ends cut off, bytes inserted, repeated, overwritten."""
    changed = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        start = draw.randrange(len(changed) + 1)
        end = start + draw.randrange(1, 40)
        kind = draw.choice(("flip", "flip", "cut", "insert", "repeat", "overwrite", "byte"))
        if kind == "flip" and start < len(changed):
            changed[start] ^= 1 << draw.randrange(8)
        elif kind == "cut" and draw.random() < 0.3:
            del changed[start:]
        elif kind == "insert":
            changed[start:start] = draw.randbytes(end - start)
        elif kind == "repeat":
            changed[start:start] = changed[start:end]
        elif kind == "overwrite":
            value = draw.choice((0, 127, 255))
            changed[start:end] = bytes([value]) * len(changed[start:end])
        elif kind == "byte" and start < len(changed):
            changed[start] = draw.randrange(256)
    return bytes(changed)


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


WEIGHTS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "b": torch.ones(5, dtype=torch.float16),
    "c": torch.zeros((), dtype=torch.int64),
}


class Tower(torch.nn.Module):
    """A module for TorchScript archives."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 2).half()
        self.scale = torch.nn.Parameter(torch.tensor(2.5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.half()).float() * self.scale


def torch_save_bytes(value: Any, **options: Any) -> bytes:
    """The bytes that torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def make_script_archive() -> bytes:
    """A TorchScript archive."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(Tower(), torch.randn(1, 3)), buffer)
    return buffer.getvalue()


def with_entries(
    archive: bytes, change: Callable[[bytes], bytes], ending: str = "/data.pkl"
) -> bytes:
    """A zip like `archive`, the entries of this ending changed, with valid checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(ending) else content)
    return buffer.getvalue()


def pickle_of_tensor(numbers: tuple, storage: int = 4) -> bytes:
    """The pickle {"a": a tensor of (offset, size, stride)} on a storage of so many float32."""

    def instructions_of(value: Any) -> bytes:
        """Without the protocol before them and the stop behind them."""
        return pickle.dumps(value, 2)[2:-1]

    head = b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n(("
    kind = b"X\7\0\0\0storagectorch\nFloatStorage\n"
    place = b"X\1\0\0\0" + b"0" + b"X\3\0\0\0cpu"
    count = instructions_of(storage)
    arguments = b"".join(instructions_of(value) for value in numbers)
    return head + kind + place + count + b"tQ" + arguments + b"\x89}tRs."


def pickles(*values: Any) -> bytes:
    """Each value's pickle, one after another."""
    return b"".join(pickle.dumps(value, 2) for value in values)


OLDER_HEAD = pickles(MAGIC, PROTOCOL, {})
FOUR_NUMBERS = pickle_of_tensor((0, (4,), (1,)))


def run_in_child(code: str) -> dict[str, Any]:
    """Run Python code in a process of its own; returns the JSON object of its last output line."""
    child = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert child.returncode == 0, f"ended with {child.returncode}: {child.stderr[-3000:]}"
    return json.loads(child.stdout.splitlines()[-1])
