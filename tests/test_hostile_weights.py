"""Hostile files of tensors: no code runs, no memory is taken that the file does not justify."""

import json
import os
import pickle
import random
import struct
import zipfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_of

from modules.training.progress import Progress
from modules.training.states import named_state
from modules.training.trainer import Trainer
from modules.weights.tensor_files import read_weights
from modules.weights.unpickler import RestrictedUnpickler
from system.files import compute_sha256
from tests.hostile import (
    FOUR_NUMBERS,
    MAX_EXTRA_BYTES,
    MIB,
    OLDER_HEAD,
    WEIGHTS,
    Source,
    audited,
    make_script_archive,
    mutate,
    peak_memory,
    pickle_of_tensor,
    pickles,
    stays_inside,
    torch_save_bytes,
    with_entries,
)
from tests.hostile_json import as_json


def weight_sources() -> dict[str, Source]:
    """Mutated files of weights of each format; of archives also ones with only the pickle wrong."""
    archives = {"zip": torch_save_bytes(WEIGHTS), "TorchScript": make_script_archive()}
    others = {
        "older": torch_save_bytes(WEIGHTS, _use_new_zipfile_serialization=False),
        "safetensors": safetensors_of(WEIGHTS),
    }
    sources: dict[str, Source] = {}
    for name, content in {**archives, **others}.items():
        sources[name] = partial(mutate, content)
    for name, content in archives.items():
        sources[f"{name}, intact except for its pickle"] = partial(mutated_pickle, content)
    return sources


def mutated_pickle(archive: bytes, draw: random.Random) -> bytes:
    """The archive with its pickle mutated."""
    return with_entries(archive, lambda content: mutate(content, draw))


def read_all_weights(path: Path) -> None:
    """Read the weights, and then each of their elements."""
    for tensor in read_weights(path).values():
        tensor.float().sum()


class Payload:
    """In a pickle, a call: here one that makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


def with_length(text: bytes) -> bytes:
    """A text as the opcode BINUNICODE takes it."""
    return struct.pack("<I", len(text)) + text


def hostile_pickles(trap: Path) -> dict[str, bytes]:
    """Pickles that call something: as Python writes them, and by each opcode that can."""
    text = str(trap).encode()
    call = b"__import__('os').mkdir('" + text + b"')"
    written_by_python = {
        f"protocol {protocol}": pickle.dumps({"a": Payload(trap)}, protocol)
        for protocol in range(6)
    }
    return {
        **written_by_python,
        "state dict": pickle.dumps({"state_dict": {"a": Payload(trap)}}, 2),
        "INST": b"(S'" + text + b"'\nios\nmkdir\n.",
        "OBJ": b"(cos\nmkdir\nV" + text + b"\no.",
        "NEWOBJ": b"\x80\x02cos\nmkdir\nX" + with_length(text) + b"\x85\x81.",
        "named torch": b"\x80\x02c__torch__\nos.mkdir\nX" + with_length(text) + b"\x85R.",
        "eval": b"\x80\x02cbuiltins\neval\nX" + with_length(call) + b"\x85R.",
    }


@pytest.mark.parametrize("kind", ["plain", "zip", "TorchScript", "older"])
def test_no_pickle_runs_code(kind, tmp_path):
    trap = tmp_path / "ran"
    path = tmp_path / "weights.bin"
    archives = {"zip": torch_save_bytes(WEIGHTS), "TorchScript": make_script_archive()}
    for name, hostile in hostile_pickles(trap).items():
        if kind == "plain":
            content = hostile
        elif kind == "older":
            content = OLDER_HEAD + hostile + pickles([])
        else:
            content = with_entries(archives[kind], lambda _, hostile=hostile: hostile)
        path.write_bytes(content)
        expected = "cannot read weights from .*weights.bin"
        with audited() as events, pytest.raises(ValueError, match=expected) as error:
            read_weights(path)
        assert "\n" not in str(error.value), name
        assert stays_inside(events, tmp_path), name
        assert not trap.exists(), name


@pytest.mark.parametrize("kind", ["zip", "older"])
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((0, (5,), (1,)), "ends at element 4"),
        ((1, (4,), (1,)), "ends at element 4"),
        ((0, (2, 2), (3, 1)), "ends at element 4"),
        ((0, (2,), (2**62,)), "ends at element"),
        ((0, (2**40, 2**40), (1, 1)), "ends at element"),
        ((-1, (2,), (1,)), "an unknown way"),
        ((3, (2,), (-1,)), "an unknown way"),
        ((0, (2,), (1, 1)), "an unknown way"),
        ((0, (10**9,), (0,)), "times the file's size"),
        ((0, (10**9, 10**9), (0, 0)), "times the file's size"),
        ((0, (2**70, 2**70), (0, 0)), "times the file's size"),
        ((10**30, (1,), (1,)), "ends at element"),
        ((0, (1.5,), (1,)), "an unknown way"),
    ],
)
def test_no_tensor_reaches_beyond_its_storage_or_takes_more_memory_than_the_file(
    kind, numbers, message, tmp_path
):
    path = tmp_path / "weights.bin"
    storage = np.arange(4, dtype=np.float32).tobytes()

    def write(content: bytes) -> None:
        if kind == "older":
            path.write_bytes(OLDER_HEAD + content + pickles(["0"]) + struct.pack("<q", 4) + storage)
        else:
            path.write_bytes(
                with_entries(torch_save_bytes({"a": torch.arange(4.0)}), lambda _: content)
            )

    write(pickle_of_tensor((1, (3,), (1,))))
    assert read_weights(path)["a"].tolist() == [1, 2, 3]
    write(pickle_of_tensor(numbers))
    before = peak_memory()
    with pytest.raises(ValueError, match=rf"weights\.bin.*{message}"):
        read_weights(path)
    assert peak_memory() - before < MAX_EXTRA_BYTES


@pytest.mark.parametrize(
    ("rest", "message"),
    [
        (
            pickle_of_tensor((0, (4,), (1,)), storage=10**11) + pickles(["0"]),
            "more bytes than the file",
        ),
        (FOUR_NUMBERS + pickles([]) + bytes(24), "lacks the bytes"),
        (FOUR_NUMBERS + pickles(["0"]) + struct.pack("<q", 4) + bytes(15), "cut short"),
        (FOUR_NUMBERS + pickles(["0"]) + struct.pack("<q", 3) + bytes(16), "cut short"),
        (FOUR_NUMBERS + pickles(["0", "0"]) + struct.pack("<q", 4) + bytes(40), "corrupt"),
    ],
)
def test_storages_of_older_files_that_are_not_whole_are_refused(rest, message, tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(OLDER_HEAD + rest)
    with pytest.raises(ValueError, match=rf"weights\.bin.*{message}"):
        read_weights(path)


def nested_modules(depth: int) -> bytes:
    """The pickle of scripted modules, each with the next one twice, under two names."""
    new = b"c__torch__\nM\n)\x81"
    levels = [new + b"}b" + b"q\0"]
    for level in range(depth):
        below = b"h" + bytes([level])
        attributes = b"}(X\1\0\0\0a" + below + b"X\1\0\0\0b" + below + b"u"
        levels.append(new + attributes + b"bq" + bytes([level + 1]))
    return b"\x80\x02" + b"".join(levels) + b"."


MODULE_IN_ITSELF = b"\x80\x02c__torch__\nM\n)\x81q\0}X\1\0\0\0ah\0sb."
SET_DEFAULTS = b"N}X\x0c\0\0\0__defaults__)s\x86b."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (nested_modules(60), "modules have more than 100000 attributes"),
        (MODULE_IN_ITSELF, "contain themselves"),
        (
            b"\x80\x02cbuiltins\nbytearray\nJ" + struct.pack("<i", 2**31 - 1) + b"\x85R.",
            "is not allowed",
        ),
        (b"\x80\x05\x96" + struct.pack("<Q", 2**31) + b".", "150 is not allowed"),
        (b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b".", "not hold a state dict"),
        (b"\x80\x02" + b"]" * 100, "corrupt"),
        (b"\x80\x02(" * 5000 + b"t" * 4000 + b".", "more than 100 deep"),
        (pickle.dumps({1: 2}, 2), "not hold a state dict"),
        (b"\x80\x02]N}b.", "corrupt|attributes"),
        (
            b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n" + SET_DEFAULTS,
            "attributes is not allowed",
        ),
        (b"\x80\x02ccollections\nOrderedDict\n" + SET_DEFAULTS, "attributes is not allowed"),
    ],
)
def test_no_pickle_takes_the_memory_or_changes_the_program(content, message, tmp_path):
    path = tmp_path / "weights.bin"
    before = peak_memory()
    path.write_bytes(with_entries(make_script_archive(), lambda _: content))
    with pytest.raises(ValueError, match=rf"weights\.bin.*({message})"):
        read_weights(path)
    assert peak_memory() - before < MAX_EXTRA_BYTES
    assert RestrictedUnpickler._rebuild_tensor.__defaults__ is None


def test_an_archive_that_inflates_is_refused_before_it_does(tmp_path):
    path = tmp_path / "weights.bin"
    before = peak_memory()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", FOUR_NUMBERS)
        with archive.open("a/data/0", "w") as entry:
            for _ in range(300):
                entry.write(bytes(MIB))
    expected = r"weights\.bin: its entries would inflate from \d+ to \d+ bytes"
    with pytest.raises(ValueError, match=expected):
        read_weights(path)
    assert peak_memory() - before < MAX_EXTRA_BYTES


@pytest.mark.parametrize(
    ("compression", "name", "message"),
    [
        (zipfile.ZIP_LZMA, "a/data.pkl", "compressed in a way"),
        (zipfile.ZIP_STORED, "data", "no data.pkl"),
    ],
)
def test_archives_that_torch_does_not_write_are_refused(compression, name, message, tmp_path):
    path = tmp_path / "weights.bin"
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(name, b"x")
    with pytest.raises(ValueError, match=rf"weights\.bin: .*{message}"):
        read_weights(path)


def test_archives_of_another_byte_order_are_refused(tmp_path):
    path = tmp_path / "weights.bin"
    path.write_bytes(with_entries(torch_save_bytes(WEIGHTS), lambda _: b"big", "/byteorder"))
    with pytest.raises(ValueError, match="little-endian"):
        read_weights(path)


def test_a_directory_that_points_before_the_files_beginning_is_refused(tmp_path):
    path = tmp_path / "weights.bin"
    content = bytearray(with_entries(torch_save_bytes(WEIGHTS), bytes))
    offset = int.from_bytes(content[-6:-2], "little") + 10**6
    content[-6:-2] = offset.to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"weights\.bin: it is corrupt"):
        read_weights(path)


@pytest.mark.parametrize(
    "header",
    [
        {"a": {"dtype": "F32", "shape": [10**9, 10**9], "data_offsets": [0, 16]}},
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}},
        {"a": {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]}},
        {"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}},
        {
            "a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
            "b": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
        },
        {"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}},
        {"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}},
        {"a": 1},
        [],
        {},
        None,
    ],
)
def test_headers_of_safetensors_that_lie_are_refused(header, tmp_path):
    path = tmp_path / "a.safetensors"
    text = as_json(header)
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_weights(path)
    for length in (2**63, 10**12, 10**8, len(text) + 17):
        path.write_bytes(struct.pack("<Q", length) + text + bytes(16))
        with pytest.raises(ValueError, match=r"a\.safetensors"):
            read_weights(path)
    path.write_bytes(struct.pack("<Q", 200_000) + b"[" * 200_000)
    with pytest.raises(ValueError, match=r"a\.safetensors"):
        read_weights(path)


def values_to_save() -> list[dict[str, Any]]:
    """State dicts with tied, transposed, narrow and empty tensors, and one inside other values."""
    tied = {
        **WEIGHTS,
        "d": WEIGHTS["a.weight"].T,
        "e": torch.nn.Parameter(torch.randn(2, 2).bfloat16()),
        "f": torch.empty(0, 3),
    }
    ordered = torch.nn.Linear(2, 3).state_dict()
    options = [1, 2.5, None, True, ("x", 2**70)]
    return [tied, ordered, {"state_dict": tied, "epoch": 3, "options": options}]


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("value", values_to_save(), ids=["tied", "ordered", "inside"])
def test_what_is_read_is_what_was_saved(value, is_zip, tmp_path):
    (tmp_path / "a.bin").write_bytes(torch_save_bytes(value, _use_new_zipfile_serialization=is_zip))
    read = read_weights(tmp_path / "a.bin")
    expected = value.get("state_dict", value)
    assert read.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(read[key], tensor)
        assert read[key].dtype == tensor.dtype


def test_tensors_under_numbers_are_no_state_dict(tmp_path):
    (tmp_path / "a.bin").write_bytes(torch_save_bytes({1: torch.ones(2)}))
    with pytest.raises(ValueError, match=r"a\.bin does not hold a state dict"):
        read_weights(tmp_path / "a.bin")


LINEAR = torch.nn.Linear(2, 3).state_dict()
OTHER_LINEAR = torch.nn.Linear(3, 2).state_dict()


@pytest.mark.parametrize(
    "state",
    [
        b"",
        b"garbage",
        torch_save_bytes([1]),
        torch_save_bytes({"model": None}),
        torch_save_bytes({"model": {1: 2}}),
        torch_save_bytes({"model": {}}),
        torch_save_bytes({"model": LINEAR}),
        torch_save_bytes({"model": OTHER_LINEAR, "optimizer": [], "scaler": {}}),
        torch_save_bytes({"model": LINEAR, "optimizer": [], "scaler": {}}),
        b"\x80\x02cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.",
    ],
)
def test_a_training_state_that_is_none_is_refused(state, tmp_path):
    model = torch.nn.Linear(2, 3)
    trainer = SimpleNamespace(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        scaler=torch.amp.GradScaler("cpu"),
    )
    path = tmp_path / "training_state.bin.0"
    path.write_bytes(state)
    sidecar = {
        "sha256": compute_sha256(path),
        "progress": asdict(Progress(epoch=1)),
        "options": {},
        "data": "",
        "card": {},
    }
    path.with_name("training_state.bin.0.json").write_text(json.dumps(sidecar))
    resume = named_state(str(tmp_path / "pytorch_model.bin.0"))
    with pytest.raises(ValueError, match=r"training_state\.bin\.0"):
        Trainer.restore(trainer, resume)
