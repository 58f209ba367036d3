"""Files of tensors, read without running code of theirs: what torch.save and TorchScript write, and safetensors.

A file is held for hostile. Nothing that it names is called but what makes dictionaries and tensors, and no memory is taken that its
own size does not warrant. (torch.load with weights_only runs no code either, but makes a `bytearray` of any size it is told to.)
"""

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.files import DAMAGED, is_web_page, short

MOST_PICKLED = 16 << 20  # bytes of the pickle that says how the tensors lie
MOST_INFLATED = 64 << 20  # bytes by which an archive's entries may exceed the file: TorchScript's sources are compressed
MOST_SHARED = 8  # times its size that a file's tensors may have together: tied ones share their bytes
MOST_ATTRIBUTES, LONGEST_NAME = 100_000, 1000  # of a TorchScript archive's modules; letters of a tensor's name
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # what torch.save's older format begins with
DTYPES = {"HalfStorage": torch.float16, "FloatStorage": torch.float32, "DoubleStorage": torch.float64,
          "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32, "ShortStorage": torch.int16,
          "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool}
OPCODES = (pickle.PROTO, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.REDUCE, pickle.NEWOBJ, pickle.BUILD, pickle.BINPERSID,
           pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
           pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINSTRING, pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1,
           pickle.TUPLE2, pickle.TUPLE3, pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM,
           pickle.SETITEMS, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET)
REFUSED = (pickle.UnpicklingError, ValueError)  # whose words are for the user
UNREADABLE = (*REFUSED, zipfile.BadZipFile, *DAMAGED)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a state-dict pickle, a safetensors file or an OpenAI TorchScript archive; no code of the file runs.

    Raises OSError for no file, ValueError naming any other that cannot be read.
    """
    path = Path(path)
    with open(path, "rb") as file:
        head = file.read(64)
    if not head:
        raise ValueError(f"{path} is empty")
    if is_web_page(head):
        raise ValueError(f"{path} is a web page, no weights: the download was refused; get the file again")
    weights = _read_safetensors(path) if _is_safetensors(path, head) else read_saved(path)
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if isinstance(weights, dict) and {"model", "optimizer"} <= weights.keys():
        raise ValueError(f"{path} is a training state, for --resume_model: weights are called pytorch_model.bin.<epoch>")
    if not (isinstance(weights, dict) and weights and all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in weights.items())):
        raise ValueError(f"{path} holds no state dict of tensors")
    for key, value in weights.items():
        if value.dtype not in DTYPES.values():
            raise ValueError(f"{path}: {key} is of the type {str(value.dtype).removeprefix('torch.')}, which is not read here")
    return weights


def format_of(path: Path) -> str:
    """The format of a file that `read_weights` reads, in words."""
    with open(path, "rb") as file:
        head = file.read(64)
    if _is_safetensors(path, head):
        return "safetensors"
    if head[:4] != b"PK\3\4":
        return "saved by torch, older format"
    with zipfile.ZipFile(path) as archive:
        scripted = any("/code/" in name for name in archive.namelist())
    return "TorchScript archive" if scripted else "saved by torch"


def _is_safetensors(path: Path, head: bytes) -> bool:
    return path.suffix == ".safetensors" or head[8:9] == b"{"


def read_saved(path: Path) -> Any:
    """What torch.save wrote: containers, numbers, texts and tensors; of a TorchScript archive, its tensors by name."""
    with open(path, "rb") as file:
        head = file.read(4)
    is_archive = head == b"PK\3\4"
    if not is_archive and head[:1] != pickle.PROTO:
        raise ValueError(f"cannot read weights from {path}: neither torch nor safetensors wrote it")
    try:
        value = (_read_archive if is_archive else _read_older)(path)
        return _tensors_below(value) if isinstance(value, _ScriptedModule) else value
    except (OSError, *UNREADABLE) as error:  # OSError: an archive's directory can name places before the file's beginning
        reason = short(error) if isinstance(error, REFUSED) else f"it is damaged ({type(error).__name__}: {short(error)})"
        raise ValueError(f"cannot read weights from {path}: {reason}") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"cannot read weights from {path}: {short(error)}") from None


@dataclass(frozen=True, eq=False)
class _Storage:
    """A file's bytes of one or more tensors, and the same as a tensor (n,)."""

    content: bytearray
    values: Tensor

    @classmethod
    def of(cls, content: bytearray, dtype: torch.dtype) -> "_Storage":
        return cls(content, torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype))


class _ScriptedModule:
    """Stands for any scripted class while an archive is read: keeps its attributes, has none of its code."""


StorageOpener = Callable[[torch.dtype, str, int], _Storage]  # type, key and number of elements as the pickle tells them


class _Unpickler(pickle._Unpickler):
    """Rebuilds containers, numbers, texts and tensors; knows no class that could run anything.

    Its base is Python's own, not the faster one in C, which takes memory for whatever memo number a file names.
    """

    dispatch = {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}

    def __init__(self, file: io.BytesIO, open_storage: StorageOpener, file_size: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.open_storage, self.room = open_storage, MOST_SHARED * file_size
        self.storages: dict[str, _Storage] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return _ScriptedModule
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self._rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter") or (
                module == "torch.jit._pickle" and name.startswith("build_")):
            return self._first
        if (module, name) == ("collections", "OrderedDict"):
            return self._dictionary
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into weights")

    def load_build(self) -> None:
        """Attributes go to scripted modules alone; an OrderedDict's, which are versions of modules, are passed over."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _ScriptedModule):
            target.__dict__.update(state)
        elif not isinstance(target, dict):
            raise pickle.UnpicklingError(f"a {type(target).__name__} with attributes does not belong into weights")

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, pid: tuple) -> _Storage:
        kind, dtype, key, _, count, *views = pid
        if not (kind == "storage" and isinstance(dtype, torch.dtype) and isinstance(key, str) and type(count) is int
                and count >= 0 and views in ([], [None])):
            raise pickle.UnpicklingError("a storage is described in no known way")
        if key not in self.storages:
            self.storages[key] = self.open_storage(dtype, key, count)
        return self.storages[key]

    def _rebuild(self, storage: _Storage, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
        if not (isinstance(storage, _Storage) and len(size) == len(stride)
                and all(type(n) is int and n >= 0 for n in (offset, *size, *stride))):
            raise pickle.UnpicklingError("a tensor is described in no known way")
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and last >= len(storage.values):
            raise pickle.UnpicklingError(f"a tensor ends at element {last} of a storage of {len(storage.values)}")
        self.room -= count * storage.values.element_size()
        if self.room < 0:
            raise pickle.UnpicklingError(f"its tensors would take more than {MOST_SHARED} times the file's size")
        return torch.as_strided(storage.values, size, stride, offset)

    @staticmethod
    def _first(value: Any, *_: Any) -> Any:
        return value

    @staticmethod
    def _dictionary() -> dict:
        return {}


def _read_archive(path: Path) -> Any:
    """The newer format, a zip: the pickle, and an entry for each storage."""
    size = path.stat().st_size
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        inflated = sum(entry.file_size for entry in entries)
        if inflated > size + MOST_INFLATED:
            raise ValueError(f"its entries would inflate from {size} to {inflated} bytes")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in entries):
            raise ValueError("its entries are compressed in a way that torch does not write")
        pickled = next((entry for entry in entries if entry.filename.endswith("/data.pkl")), None)
        if pickled is None or pickled.file_size > MOST_PICKLED:
            raise ValueError("it has no data.pkl" if pickled is None else f"its data.pkl has {pickled.file_size} bytes")
        folder = pickled.filename.removesuffix("data.pkl")
        if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder") != b"little":
            raise ValueError("its byte order is not little-endian: save it anew on a usual machine")

        def open_storage(dtype: torch.dtype, key: str, _: int) -> _Storage:
            return _Storage.of(bytearray(archive.read(f"{folder}data/{key}")), dtype)

        return _Unpickler(io.BytesIO(archive.read(pickled)), open_storage, size).load()


def _read_older(path: Path) -> Any:
    """The older format: five pickles (magic number, version, system, the value, keys of storages), then the storages' bytes."""
    size = room = path.stat().st_size

    def open_storage(dtype: torch.dtype, _: str, count: int) -> _Storage:
        nonlocal room
        room -= count * dtype.itemsize
        if room < 0:
            raise ValueError("its storages would take more bytes than the file has")
        return _Storage.of(bytearray(count * dtype.itemsize), dtype)

    with open(path, "rb") as file:
        pickles = io.BytesIO(file.read(MOST_PICKLED))
        unpickler = _Unpickler(pickles, open_storage, size)
        if unpickler.load() != MAGIC or unpickler.load() != PROTOCOL:
            raise ValueError("torch.save did not write it")
        _, value, keys = (unpickler.load() for _ in range(3))
        file.seek(pickles.tell())
        for key in keys:
            storage = unpickler.storages.pop(key)
            (count,) = struct.unpack("<q", file.read(8))
            if count != len(storage.values) or file.readinto(storage.content) != len(storage.content):
                raise ValueError("a storage is cut short")
    if unpickler.storages:
        raise ValueError("it lacks the bytes of some storages")
    return value


def _tensors_below(root: _ScriptedModule) -> dict[str, Tensor]:
    """A module's tensors by name, its own before those of modules in it."""
    tensors: dict[str, Tensor] = {}
    modules, room = [("", root)], MOST_ATTRIBUTES
    for prefix, module in modules:  # which grows meanwhile
        room -= len(vars(module))
        if room < 0 or len(prefix) > LONGEST_NAME:
            raise ValueError("its modules lie in each other without end")
        for name, value in vars(module).items():
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, _ScriptedModule):
                modules.append((f"{prefix}{name}.", value))
    return tensors
