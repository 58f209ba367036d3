"""Files of tensors: each format is read whole, and any other file is refused by its name."""

import json
import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save, save_file

from modules.weights.tensor_files import file_format, read_weights
from system.files import is_html
from tests.conftest import tiny_weights
from tests.hostile import Tower, make_script_archive


def same(ours: dict, theirs: dict) -> bool:
    """Whether both have the same tensors of the same types."""
    return ours.keys() == theirs.keys() and all(
        torch.equal(ours[key], value) and ours[key].dtype == value.dtype
        for key, value in theirs.items()
    )


def test_pickle_and_safetensors_give_the_same(tmp_path):
    weights = tiny_weights()
    torch.save(weights, tmp_path / "a.bin")
    save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "a.safetensors")
    assert same(read_weights(tmp_path / "a.bin"), weights)
    assert same(read_weights(tmp_path / "a.safetensors"), weights)


def test_a_torchscript_archive_is_read_without_running_it(tmp_path):
    tower = Tower()
    tower.register_buffer("context_length", torch.tensor(77))
    path = tmp_path / "clip.pt"
    torch.jit.save(torch.jit.trace(tower, torch.randn(1, 3)), str(path))
    assert same(read_weights(path), tower.state_dict())


def test_formats_have_names(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "zip")
    torch.save({"a": torch.ones(1)}, tmp_path / "old", _use_new_zipfile_serialization=False)
    (tmp_path / "scripted").write_bytes(make_script_archive())
    save_file({"a": torch.ones(1)}, tmp_path / "named so or not")
    assert file_format(tmp_path / "zip") == "saved by torch"
    assert file_format(tmp_path / "old") == "saved by torch, older format"
    assert file_format(tmp_path / "scripted") == "TorchScript archive"
    assert file_format(tmp_path / "named so or not") == "safetensors"


class Payload:
    """In a pickle, a call that makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_run_code_is_refused_before_it_runs(tmp_path):
    trap = tmp_path / "ran"
    payload = Payload(str(trap))
    torch.save({"clip.x": payload}, tmp_path / "in_a_zip.bin")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(payload))
    with zipfile.ZipFile(tmp_path / "scripted.pt", "w") as archive:
        archive.writestr("evil/data.pkl", pickle.dumps(payload))
        archive.writestr("evil/constants.pkl", b"")
    for name in ("in_a_zip.bin", "plain.bin", "scripted.pt"):
        with pytest.raises(ValueError, match=f"cannot read weights from .*{name}"):
            read_weights(tmp_path / name)
        assert not trap.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.bin", b"", "is empty"),
        ("page.bin", b"<!DOCTYPE html><html>quota</html>", "is a web page, not weights"),
        ("noise.safetensors", b"\x08\0\0\0\0\0\0\0{}garbage!", ""),
        ("text.bin", b"hello", "not a PyTorch or safetensors file"),
        ("README.md", b"# words", "not a PyTorch or safetensors file"),
    ],
)
def test_files_of_other_kinds_are_refused_by_name(name, content, reason, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}.*{reason}"):
        read_weights(tmp_path / name)


def test_half_a_file_is_refused_by_name(tmp_path):
    torch.save(tiny_weights(), tmp_path / "whole.bin")
    whole = (tmp_path / "whole.bin").read_bytes()
    (tmp_path / "half.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"half\.bin: it is corrupt"):
        read_weights(tmp_path / "half.bin")


def test_values_that_are_no_tensors_are_no_state_dict(tmp_path):
    torch.save({"epoch": 3}, tmp_path / "other.bin")
    with pytest.raises(ValueError, match=r"other\.bin does not hold a state dict"):
        read_weights(tmp_path / "other.bin")


def test_types_that_are_not_read_are_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"clip.x": torch.ones(2, dtype=torch.complex64)}, path)
    with pytest.raises(ValueError, match="clip.x is of the type complex64"):
        read_weights(path)


def test_a_safetensors_file_that_begins_like_a_page_is_read(tmp_path):
    """The length of its header reads " <"."""
    header = {"note": ""}
    while save({"clip.x": torch.ones(2)}, header)[:2] != b" <":
        header["note"] += "x" * 8
    (tmp_path / "x.safetensors").write_bytes(save({"clip.x": torch.ones(2)}, header))
    assert read_weights(tmp_path / "x.safetensors").keys() == {"clip.x"}


@pytest.mark.parametrize(
    "page", [b"<!DOCTYPE html>", b"\n  <html lang='en'>", b"\xef\xbb\xbf<?xml version='1.0'?>"]
)
def test_pages_are_recognized(page):
    assert is_html(page)
    assert not is_html(json.dumps({"clip": 1}).encode())
