"""Hostile pickle programs: what would crash a reader or take hours is refused in one line."""

import struct
import zipfile

import pytest
import torch

from modules.weights.pickle_values import MAX_DEPTH
from modules.weights.tensor_files import read_torch_file, read_weights
from tests.hostile import FOUR_NUMBERS, OLDER_HEAD, pickle_of_tensor, torch_save_bytes, with_entries

MAX_INSTRUCTIONS = 30_000  # instead of a million, so that a test is quick

# Programs whose length or depth is the point.
DEEP_TUPLES = b"\x85" * 20_000
SHARED_TUPLES = b"q\5h\5\x86" * 200


def program(*parts: bytes) -> bytes:
    """A pickle of these instructions."""
    return b"\x80\x02" + b"".join(parts) + b"."


def storage(count: int = 4) -> bytes:
    """Instructions that leave a storage of the archive on the stack."""
    _, _, after = pickle_of_tensor((0, (4,), (1,)), count).partition(b"_rebuild_tensor_v2\n(")
    described, call, _ = after.partition(b"Q")
    return described + call


def tensor() -> bytes:
    """Instructions that leave a tensor on the stack."""
    return pickle_of_tensor((0, (4,), (1,)))[9:-2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (program(b"})", b"\x85" * 2_000_000, b"K\1s"), "instructions"),
        (program(b"})", DEEP_TUPLES, b"K\1s"), "a key of type tuple"),
        (program(b"})K\1s"), "a key of type tuple"),
        (program(b"}NK\1s"), "a key of type NoneType"),
        (program(b"}\x88K\1s"), "a key of type bool"),
        (program(b"}G" + bytes(8) + b"K\1s"), "a key of type float"),
        (program(b"}\x8a\x09" + b"\xff" * 8 + b"\0K\1s"), "a key of type int"),
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
        (program(b"c__torch__\nM\n", tensor(), b"\x81"), "not a module"),
        (program(b"ccollections\nOrderedDict\n)\x81"), "not a module"),
        (program(tensor(), b"Q"), "a storage is described"),
        (program(b"c__torch__\nM\n)\x81", tensor(), b"b"), "attributes are not a dictionary"),
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
        (program(b")", DEEP_TUPLES), f"more than {MAX_DEPTH} deep"),
        (program(b")", SHARED_TUPLES, b"q\6}h\6K\1s"), "a key of type tuple"),
        (program(b")", SHARED_TUPLES), f"more than {MAX_DEPTH} deep"),
        (program(b"]q\0h\0a"), "contain themselves"),
        (program(b"]q\0]h\0a]h\0h\0a"), "not hold a state dict|corrupt|contain themselves"),
        (program(b"N" * MAX_INSTRUCTIONS), "instructions"),
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
        (pickle_of_tensor((0, (1,) * 1000, (1,) * 1000)), "an unknown way|instructions"),
        (pickle_of_tensor((0, (2**2000,) * 9, (2**2000,) * 9)), "ends at element"),
    ],
)
def test_programs_that_would_crash_or_take_hours_are_refused(
    content, message, tmp_path, monkeypatch
):
    monkeypatch.setattr("modules.weights.unpickler.MAX_INSTRUCTIONS", MAX_INSTRUCTIONS)
    monkeypatch.setattr("modules.weights.unpickler.MAX_TENSORS", 1000)
    monkeypatch.setattr("modules.weights.unpickler.MAX_ATTRIBUTES", 10_000)
    path = tmp_path / "weights.bin"
    path.write_bytes(with_entries(torch_save_bytes({"a": torch.arange(4.0)}), lambda _: content))
    with pytest.raises(ValueError, match=rf"weights\.bin.*({message})"):
        read_weights(path)


def test_what_is_deep_or_shared_within_bounds_is_read(tmp_path):
    deep = [[1, 2, {"a": (3,)}]]
    for _ in range(MAX_DEPTH - 5):  # with the outermost dictionary this is the limit
        deep = [deep]
    shared = ({"x": [1]},) * 3
    value = {"deep": deep, "shared": [shared, shared], "model": {1: torch.ones(2), -7: None}}
    (tmp_path / "a").write_bytes(torch_save_bytes(value))
    found = read_torch_file(tmp_path / "a")
    assert found["deep"] == deep
    assert found["shared"] == [shared, shared]
    assert torch.equal(found["model"][1], torch.ones(2))
    (tmp_path / "a").write_bytes(torch_save_bytes({"deeper": [deep]}))
    with pytest.raises(ValueError, match="deep"):
        read_torch_file(tmp_path / "a")


def test_the_limits_of_storages_and_tensors_are_separate(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.weights.unpickler.MAX_TENSORS", 6)
    weights = {str(number): torch.ones(1) for number in range(6)}
    (tmp_path / "a").write_bytes(torch_save_bytes(weights))
    assert read_weights(tmp_path / "a").keys() == weights.keys()
    (tmp_path / "a").write_bytes(torch_save_bytes({**weights, "one more": torch.ones(1)}))
    with pytest.raises(ValueError, match="more than 6 storages"):
        read_weights(tmp_path / "a")


def test_storages_of_an_older_file_are_named_by_texts(tmp_path):
    for keys in (b"])" + b"\x85" * 90 + b"a", b"K\1", b"]K\1a"):
        (tmp_path / "a").write_bytes(OLDER_HEAD + FOUR_NUMBERS + program(keys) + bytes(40))
        with pytest.raises(ValueError, match="named in an unknown way"):
            read_weights(tmp_path / "a")


def test_long_names_of_scripted_modules_are_refused(tmp_path):
    name = b"X" + struct.pack("<I", 2**20) + b"n" * 2**20
    one = b"c__torch__\nM\n)\x81}" + name + tensor() + b"sb"
    archive = torch_save_bytes({"a": torch.arange(4.0)})
    (tmp_path / "a").write_bytes(with_entries(archive, lambda _: program(one)))
    with pytest.raises(ValueError, match="nested too deeply"):
        read_weights(tmp_path / "a")


def test_many_attributes_of_scripted_modules_are_refused_for_their_number(tmp_path, monkeypatch):
    monkeypatch.setattr("modules.weights.tensor_files.MAX_MODULE_ATTRIBUTES", 1)
    one = b"c__torch__\nM\n)\x81}(X\1\0\0\0aNX\1\0\0\0bNub"
    archive = torch_save_bytes({"a": torch.arange(4.0)})
    (tmp_path / "a").write_bytes(with_entries(archive, lambda _: program(one)))
    with pytest.raises(ValueError, match="modules have more than 1 attributes"):
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
