"""Files of tensors, read without running code of theirs: what torch.save and TorchScript write, and safetensors.

A file is held for hostile. Nothing that it names is called but what makes dictionaries and tensors, and no memory is taken that its
own size does not warrant. (torch.load with weights_only runs no code either, but makes a `bytearray` of any size it is told to.)
"""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.weights.unpickler import (
    DTYPES,
    CountedReader,
    RestrictedUnpickler,
    ScriptedModule,
    Storage,
)
from system.archives import open_zip, read_entry
from system.files import READ_ERRORS, error_line
from system.urls import is_html

MAX_PICKLE_BYTES = 16 << 20  # bytes of the pickle that says how the tensors lie


MAX_INFLATED_BYTES = (
    64 << 20
)  # bytes by which an archive's entries may exceed the file: TorchScript's sources are compressed


MAX_ENTRIES = 100_000  # of an archive


MAX_ATTRIBUTES, MAX_NAME_LENGTH = (
    100_000,
    1000,
)  # of a TorchScript archive's modules; letters of a tensor's name


MAX_SHOWN_LENGTH = 100  # letters of a tensor's name in a message


MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch.save's older format begins with


REFUSED = (pickle.UnpicklingError, ValueError)  # whose words are for the user


UNREADABLE = (*REFUSED, zipfile.BadZipFile, *READ_ERRORS)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state-dict pickle, a safetensors file or an OpenAI TorchScript archive; no code of the file runs.

    Raises OSError for no file, ValueError naming any other that cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if is_html(head):
        raise ValueError(
            f"{path} is a web page, no weights: the download was refused; get the file again"
        )
    weights = _read_safetensors(path) if _is_safetensors(path, head) else read_torch_file(path)
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if isinstance(weights, dict) and {"model", "optimizer"} <= weights.keys():
        raise ValueError(
            f"{path} is a training state, for --resume_model: weights are called pytorch_model.bin.<epoch>"
        )
    if not (
        isinstance(weights, dict)
        and weights
        and all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items()
        )
    ):
        raise ValueError(f"{path} holds no state dict of tensors")
    for key, value in weights.items():
        if value.dtype not in DTYPES.values():
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: {key[:MAX_SHOWN_LENGTH]} is of the type {kind}, which is not read here"
            )
    return weights


def file_format(path: Path) -> str:
    """The format of a file that `read_weights` reads, in words."""
    with open(path, "rb") as file:
        head = file.read(64)
    if _is_safetensors(path, head):
        return "safetensors"
    if head[:4] != b"PK\3\4":
        return "saved by torch, older format"
    with open_zip(path, MAX_ENTRIES) as archive:
        scripted = any("/code/" in name for name in archive.namelist())
    return "TorchScript archive" if scripted else "saved by torch"


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == ".safetensors" or head[8:9] == b"{"


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote: containers, numbers, texts and tensors; of a TorchScript archive, its tensors by name."""
    with open(path, "rb") as file:
        head = file.read(4)
    is_archive = head == b"PK\3\4"
    if not is_archive and head[:1] != pickle.PROTO:
        raise ValueError(f"cannot read weights from {path}: neither torch nor safetensors wrote it")
    try:
        value = (_read_archive if is_archive else _read_legacy)(path)
        return _named_tensors(value) if isinstance(value, ScriptedModule) else value
    except (
        OSError,
        *UNREADABLE,
    ) as error:  # OSError: an archive's directory can name places before the file's beginning
        reason = (
            error_line(error)
            if isinstance(error, REFUSED)
            else f"it is damaged ({type(error).__name__}: {error_line(error)})"
        )
        raise ValueError(f"cannot read weights from {path}: {reason}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_PICKLE_BYTES:
            raise ValueError(f"its header has {length} bytes")
        return load_file(path)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"cannot read weights from {path}: {error_line(error)}") from None


def _read_archive(path: Path) -> Any:
    """The newer format, a zip: the pickle, and an entry for each storage."""
    size = path.stat().st_size
    with open_zip(path, MAX_ENTRIES) as archive:
        entries = archive.infolist()
        inflated = sum(entry.file_size for entry in entries)
        if inflated > size + MAX_INFLATED_BYTES:
            raise ValueError(f"its entries would inflate from {size} to {inflated} bytes")
        pickled = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if pickled is None or pickled.file_size > MAX_PICKLE_BYTES:
            raise ValueError(
                "it has no data.pkl"
                if pickled is None
                else f"its data.pkl has {pickled.file_size} bytes"
            )
        folder = pickled.filename.removesuffix("data.pkl")
        order = next((entry for entry in entries if entry.filename == f"{folder}byteorder"), None)
        if order is not None and (
            order.file_size > len(b"little") or archive.read(order) != b"little"
        ):
            raise ValueError("its byte order is not little-endian: save it anew on a usual machine")

        def open_storage(dtype: torch.dtype, key: str, _: int) -> Storage:
            return Storage.of(read_entry(archive, f"{folder}data/{key}"), dtype)

        return RestrictedUnpickler(CountedReader(archive.read(pickled)), open_storage, size).load()


def _read_legacy(path: Path) -> Any:
    """The older format: five pickles (magic number, version, system, the value, keys of storages), then the storages' bytes."""
    size = room = path.stat().st_size

    def open_storage(dtype: torch.dtype, _: str, count: int) -> Storage:
        nonlocal room
        room -= count * dtype.itemsize
        if room < 0:
            raise ValueError("its storages would take more bytes than the file has")
        return Storage.of(bytearray(count * dtype.itemsize), dtype)

    with open(path, "rb") as file:
        pickles = CountedReader(file.read(MAX_PICKLE_BYTES))
        unpickler = RestrictedUnpickler(pickles, open_storage, size)
        if unpickler.load() != MAGIC or unpickler.load() != PROTOCOL:
            raise ValueError("torch.save did not write it")
        _, value, keys = (unpickler.load() for _ in range(3))
        file.seek(pickles.tell())
        if not (isinstance(keys, list) and all(type(key) is str for key in keys)):
            raise ValueError("its storages are named in no known way")
        for key in keys:
            storage = unpickler.storages.pop(key)
            (count,) = struct.unpack("<q", file.read(8))
            if count != len(storage.values) or file.readinto(storage.content) != len(
                storage.content
            ):
                raise ValueError("a storage is cut short")
    if unpickler.storages:
        raise ValueError("it lacks the bytes of some storages")
    return value


def _named_tensors(root: ScriptedModule) -> dict[str, Tensor]:
    """A module's tensors by name, its own before those of modules in it."""
    tensors: dict[str, Tensor] = {}
    modules, room = [("", root)], MAX_ATTRIBUTES
    for prefix, module in modules:  # which grows meanwhile
        room -= len(vars(module))
        if room < 0:
            raise ValueError("its modules lie in each other without end")
        for name, value in vars(module).items():
            if len(prefix) + len(name) > MAX_NAME_LENGTH:
                raise ValueError("its modules lie in each other without end")
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, ScriptedModule):
                modules.append((f"{prefix}{name}.", value))
    return tensors
