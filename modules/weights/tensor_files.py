"""Files of tensors: torch.save's, TorchScript's and safetensors', read without running their code.

A file is untrusted. Of everything it names, only the constructors of dictionaries and tensors can
be called, and it gets no more memory than its own size justifies. (torch.load with weights_only
does not run code either, but it makes a `bytearray` of any size that a file asks for.)
"""

import hashlib
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from modules.weights.pickle_values import ScriptedModule, Storage
from modules.weights.unpickler import DTYPES, CountedReader, RestrictedUnpickler
from modules.weights.wrappings import TRAINING_STATE, find_state_dict
from system.archives import open_zip, read_entry
from system.escaping import name_as_text, summarize_error
from system.files import READ_ERRORS, atomic_write, compute_sha256, is_html, is_safe_file_name
from system.json_files import read_json

MAX_PICKLE_BYTES = 16 << 20  # of the pickle that describes the tensors, or a safetensors header
# How much larger than its file an archive's entries may be: TorchScript's sources are compressed.
MAX_INFLATED_BYTES = 64 << 20
MAX_ENTRIES = 100_000  # of an archive
MAX_MODULE_ATTRIBUTES = 100_000  # of a TorchScript archive's modules
MAX_NAME_LENGTH = 1000  # characters of a tensor's name
MAX_SHOWN_LENGTH = 100  # characters of a tensor's name in a message
HEAD_BYTES = 64  # at a file's beginning, which show its format
INDEX_ENDING = ".index.json"  # of the file that lists in which file each tensor is
ZIP_HEAD = b"PK\3\4"
# What torch.save's older format begins with.
MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001
REFUSED = (pickle.UnpicklingError, ValueError)  # raised with a message for the user
UNREADABLE = (*REFUSED, zipfile.BadZipFile, *READ_ERRORS)


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, a TorchScript archive, or what torch.save wrote.

    That is a state dict, or a checkpoint that holds one, in torch's newer or older format; or the
    index of weights in several files. Raises OSError if there is no file, and ValueError naming a
    file that cannot be read.
    """
    path = Path(path)
    if path.name.endswith(INDEX_ENDING):
        return _read_parts(path)
    head = _read_head(path)
    if not head:
        raise ValueError(f"{path} is empty")
    if is_html(head):
        raise ValueError(
            f"{path} is a web page, not weights: the server refused the download. "
            "Download it again."
        )
    is_safetensors = _is_safetensors(path, head)
    content = _read_safetensors(path) if is_safetensors else read_torch_file(path)
    weights = find_state_dict(content)
    _check_state_dict(path, weights)
    return weights


def list_parts(index: Path) -> list[str]:
    """The names of the files that an index of weights in several files lists.

    Raises ValueError for a broken index, or one that names files elsewhere.
    """
    places = read_json(index, dict).get("weight_map")
    names = places.values() if isinstance(places, dict) else [None]
    if not all(map(_is_part, names)):
        raise ValueError(f"{index} is no index of weights: its weight_map names no files beside it")
    return sorted(set(names))


def hash_weights(path: Path) -> str:
    """The SHA-256 of a file of weights; of an index, that of its own and its parts' together."""
    own = compute_sha256(path)
    if not path.name.endswith(INDEX_ENDING):
        return own
    parts = [compute_sha256(path.with_name(name)) for name in list_parts(path)]
    return hashlib.sha256(" ".join([own, *parts]).encode()).hexdigest()


def _is_part(name: Any) -> bool:
    """Whether a name is that of a file beside the index, and no other index."""
    is_beside = isinstance(name, str) and is_safe_file_name(name)
    return is_beside and not name.endswith(INDEX_ENDING)


def _read_parts(index: Path) -> dict[str, Tensor]:
    """The tensors of all files that an index lists. Raises OSError that names a missing one."""
    weights: dict[str, Tensor] = {}
    for name in list_parts(index):
        part = index.with_name(name)
        if not part.is_file():
            raise FileNotFoundError(f"{part} is missing, one of the files that {index.name} lists")
        weights |= read_weights(part)
    _check_state_dict(index, weights)
    return weights


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, which appears complete or not at all."""
    from safetensors.torch import save_file

    separate = {key: value.clone().contiguous() for key, value in tensors.items()}
    with atomic_write(path) as temporary:
        save_file(separate, temporary, {"format": "pt"})


def file_format(path: Path) -> str:
    """The format of a file that `read_weights` can read, in words."""
    if path.name.endswith(INDEX_ENDING):
        return f"an index of {len(list_parts(path))} files"
    head = _read_head(path)
    if _is_safetensors(path, head):
        return "safetensors"
    if head[: len(ZIP_HEAD)] != ZIP_HEAD:
        return "saved by torch, older format"
    with open_zip(path, MAX_ENTRIES) as archive:
        is_scripted = any("/code/" in name for name in archive.namelist())
    return "TorchScript archive" if is_scripted else "saved by torch"


def read_torch_file(path: Path) -> Any:
    """What torch.save wrote: containers, numbers, strings, tensors. For TorchScript, named tensors.

    Raises OSError if there is no file, and ValueError naming a file that cannot be read.
    """
    head = _read_head(path)
    is_archive = head[: len(ZIP_HEAD)] == ZIP_HEAD
    if not is_archive and head[:1] != pickle.PROTO:
        raise ValueError(f"cannot read weights from {path}: not a PyTorch or safetensors file")
    try:
        value = _read_archive(path) if is_archive else _read_legacy(path)
        return _named_tensors(value) if isinstance(value, ScriptedModule) else value
    except REFUSED as error:
        raise ValueError(f"cannot read weights from {path}: {summarize_error(error)}") from None
    # OSError: an archive's directory can point to a place before the file's beginning.
    except (OSError, *UNREADABLE) as error:
        raise ValueError(
            f"cannot read weights from {path}: it is corrupt "
            f"({type(error).__name__}: {summarize_error(error)})"
        ) from None


def _read_head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_BYTES)


def _is_safetensors(path: Path, head: bytes) -> bool:
    is_torch = head.startswith(ZIP_HEAD) or head[:1] == pickle.PROTO
    return head[8:9] == b"{" or (path.suffix.lower() == ".safetensors" and not is_torch)


def _check_state_dict(path: Path, weights: Any) -> None:
    """Raises ValueError for anything but named tensors, or for a number type that is not read."""
    if isinstance(weights, dict) and weights.keys() >= TRAINING_STATE:
        raise ValueError(
            f"{path} is a training state, for --resume_model: "
            "weights are called pytorch_model.bin.<epoch>"
        )
    if not (isinstance(weights, dict) and weights):
        raise ValueError(f"{path} does not hold a state dict of tensors")
    for key, value in weights.items():
        if not (isinstance(key, str) and isinstance(value, Tensor)):
            raise ValueError(f"{path} does not hold a state dict of tensors")
        if value.dtype not in DTYPES.values():
            name = key[:MAX_SHOWN_LENGTH]
            kind = str(value.dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name} is of the type {kind}, which is not read here")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file

    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > MAX_PICKLE_BYTES:
            raise ValueError(f"its header has {length} bytes")
        if name_as_text(path) != str(path):  # the library wants UTF-8
            return load(path.read_bytes())
        try:
            return load_file(path)
        except OSError:  # not every file system can map files into memory
            return load(path.read_bytes())
    except (SafetensorError, *UNREADABLE) as error:
        raise ValueError(f"cannot read weights from {path}: {summarize_error(error)}") from None


def _read_archive(path: Path) -> Any:
    """torch.save's newer format, a zip: the pickle, and an entry for each storage."""
    size = path.stat().st_size
    with open_zip(path, MAX_ENTRIES) as archive:
        pickled = _pickle_entry(archive, size)
        folder = pickled.filename.removesuffix("data.pkl")
        _check_byte_order(archive, f"{folder}byteorder")

        def open_storage(dtype: torch.dtype, key: str, _: int) -> Storage:
            return Storage.of(read_entry(archive, f"{folder}data/{key}"), dtype)

        reader = CountedReader(archive.read(pickled))
        return RestrictedUnpickler(reader, open_storage, size).load()


def _pickle_entry(archive: zipfile.ZipFile, size: int) -> zipfile.ZipInfo:
    """The entry data.pkl of an archive of `size` bytes. Raises ValueError if it is too large."""
    entries = archive.infolist()
    inflated = sum(entry.file_size for entry in entries)
    if inflated > size + MAX_INFLATED_BYTES:
        raise ValueError(f"its entries would inflate from {size} to {inflated} bytes")
    found = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
    if not found:
        raise ValueError("it has no data.pkl")
    if found[0].file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"its data.pkl has {found[0].file_size} bytes")
    return found[0]


def _check_byte_order(archive: zipfile.ZipFile, name: str) -> None:
    """Raises ValueError unless the entry says "little"; older archives have no such entry."""
    entry = next((entry for entry in archive.infolist() if entry.filename == name), None)
    if entry is None:
        return
    is_long = entry.file_size > len(b"little")
    if is_long or archive.read(entry) != b"little":
        raise ValueError("its byte order is not little-endian: save it again on a machine that is")


class _LegacyStorages:
    """Storages of the older format: the pickle names them first, and their bytes come after it."""

    def __init__(self, file_size: int) -> None:
        self.budget = file_size

    def open(self, dtype: torch.dtype, _: str, count: int) -> Storage:
        """A storage of zeros. Raises ValueError if all together exceed the file's size."""
        size = count * dtype.itemsize
        self.budget -= size
        if self.budget < 0:
            raise ValueError("its storages would take more bytes than the file has")
        return Storage.of(bytearray(size), dtype)


def _read_legacy(path: Path) -> Any:
    """The older format: five pickles, then the storages' bytes.

    The pickles are a magic number, a version, the system, the value, and the storages' keys.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        pickles = CountedReader(file.read(MAX_PICKLE_BYTES))
        unpickler = RestrictedUnpickler(pickles, _LegacyStorages(size).open, size)
        if unpickler.load() != MAGIC or unpickler.load() != PROTOCOL:
            raise ValueError("torch.save did not write it")
        unpickler.load()  # facts about the system
        value = unpickler.load()
        keys = unpickler.load()
        if not (isinstance(keys, list) and all(type(key) is str for key in keys)):
            raise ValueError("its storages are named in an unknown way")
        file.seek(pickles.tell())
        for key in keys:
            _fill_storage(unpickler.storages.pop(key), file)
    if unpickler.storages:
        raise ValueError("it lacks the bytes of some storages")
    return value


def _fill_storage(storage: Storage, file: IO[bytes]) -> None:
    """Read a storage's number of elements and its bytes from the file."""
    (count,) = struct.unpack("<q", file.read(8))
    is_whole = count == len(storage.values)
    if not is_whole or file.readinto(storage.content) != len(storage.content):
        raise ValueError("a storage is cut short")


def _named_tensors(root: ScriptedModule) -> dict[str, Tensor]:
    """A module's named tensors, its own before those of the modules inside it."""
    tensors: dict[str, Tensor] = {}
    modules = [("", root)]
    budget = MAX_MODULE_ATTRIBUTES
    for prefix, module in modules:  # the list grows in the loop
        budget -= len(vars(module))
        if budget < 0:
            raise ValueError(f"its modules have more than {MAX_MODULE_ATTRIBUTES} attributes")
        for name, value in vars(module).items():
            if len(prefix) + len(name) > MAX_NAME_LENGTH:
                raise ValueError("its modules are nested too deeply, or have too long names")
            if isinstance(value, Tensor):
                tensors[prefix + name] = value
            elif isinstance(value, ScriptedModule):
                modules.append((f"{prefix}{name}.", value))
    return tensors
