"""Reads pickles of weights without running their code, within limits.

A pickle is a program for a small machine. Here it may only build dictionaries, lists, tuples,
strings, numbers and tensors, add items to dictionaries and lists, and set attributes of scripted
modules. Keys are strings or whole numbers. Instructions, tensors, attributes and nesting are
limited.
"""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from modules.weights.pickle_values import ScriptedModule, Storage, refuse_deep, refuse_unless

MAX_INSTRUCTIONS = 1_000_000  # of a file; a training state of ViT-L/14 has about 150,000
MAX_TENSORS = 100_000  # of a file, and as many storages, which tensors may share
MAX_DIMENSIONS = 16  # of a tensor
MAX_ARGUMENTS = 8  # of a call; torch's own has seven
# Attributes set on all scripted modules together. One that is set twice counts twice.
MAX_ATTRIBUTES = 1_000_000
WIDE_ELEMENT_BYTES = 4  # of an element in use: smaller types are widened to float32
MAX_SHARING = 8  # its tensors may take this many times the file's size: tied ones share bytes
# Whole numbers as keys stay below this: larger ones can be chosen so that all hash alike.
MAX_INTEGER_KEY = 2**31
FRAME_LENGTH_BYTES = 8
STRANGE_STORAGE = "a storage is described in an unknown way"
STRANGE_TENSOR = "a tensor is described in an unknown way"
DTYPES = {
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

# The allowed instructions. Left out: other ways to import, byte strings of arbitrary size, and
# instructions that wait for more data.
OPCODES = (
    pickle.PROTO,
    pickle.STOP,
    pickle.MARK,
    pickle.GLOBAL,
    pickle.REDUCE,
    pickle.NEWOBJ,
    pickle.BUILD,
    pickle.BINPERSID,
    pickle.NONE,
    pickle.NEWTRUE,
    pickle.NEWFALSE,
    pickle.BININT,
    pickle.BININT1,
    pickle.BININT2,
    pickle.LONG1,
    pickle.BINFLOAT,
    pickle.BINUNICODE,
    pickle.SHORT_BINSTRING,
    pickle.EMPTY_TUPLE,
    pickle.TUPLE,
    pickle.TUPLE1,
    pickle.TUPLE2,
    pickle.TUPLE3,
    pickle.EMPTY_LIST,
    pickle.APPEND,
    pickle.APPENDS,
    pickle.EMPTY_DICT,
    pickle.SETITEM,
    pickle.SETITEMS,
    pickle.BINPUT,
    pickle.LONG_BINPUT,
    pickle.BINGET,
    pickle.LONG_BINGET,
    # Protocol 4's.
    pickle.FRAME,
    pickle.SHORT_BINUNICODE,
    pickle.MEMOIZE,
    pickle.STACK_GLOBAL,
)


# Called with a storage's type, key and number of elements, as the pickle gives them.
StorageOpener = Callable[[torch.dtype, str, int], Storage]


class CountedReader(io.BytesIO):
    """A pickle's bytes. Each instruction reads at least once, so the reads are counted."""

    def __init__(self, content: bytes) -> None:
        super().__init__(content)
        self._left = MAX_INSTRUCTIONS

    def read(self, size: int | None = -1) -> bytes:
        """As in BytesIO. Raises UnpicklingError after MAX_INSTRUCTIONS reads."""
        self._left -= 1
        if self._left < 0:
            raise pickle.UnpicklingError(
                f"its pickle has more than {MAX_INSTRUCTIONS} instructions"
            )
        return super().read(size)


# What trainers keep beside weights: schedulers' counters, sizes, devices, paths.
STAND_FOR_THEIR_ARGUMENT = {
    ("collections", "Counter"),
    ("torch", "Size"),
    ("torch", "device"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib", "PureWindowsPath"),
}


class AllowedInstructions(dict[int, Callable]):
    """Instruction → what it does. Raises UnpicklingError for one that is not allowed."""

    def __missing__(self, opcode: int) -> Callable:
        raise pickle.UnpicklingError(
            f"the pickle instruction {opcode} is not allowed in a weights file"
        )


class RestrictedUnpickler(pickle._Unpickler):
    """Rebuilds containers, numbers, strings and tensors; knows no class that could run anything.

    Its base is Python's own unpickler, not the faster one in C, which takes memory for any memo
    number that a file names. `load` raises UnpicklingError with a message for the user, or one of
    `system.files.READ_ERRORS`.
    """

    dispatch = AllowedInstructions(
        {opcode[0]: pickle._Unpickler.dispatch[opcode[0]] for opcode in OPCODES}
    )

    def __init__(self, file: CountedReader, open_storage: StorageOpener, file_size: int) -> None:
        super().__init__(file, encoding="utf-8")
        self.open_storage = open_storage
        self.budget = MAX_SHARING * file_size
        self.num_tensors = 0
        self.num_attributes = 0
        self.storages: dict[str, Storage] = {}
        # A bound method is a new object each time: keep one, to recognize it when it is called.
        self._rebuild_tensor_method = self._rebuild_tensor

    def load(self) -> Any:
        """The next pickle's value. Raises UnpicklingError if it is nested deeper than MAX_DEPTH."""
        self.memo.clear()  # from protocol 4 on, a value's number is how many there are before it
        value = super().load()
        refuse_deep(value)
        return value

    def find_class(self, module: str, name: str) -> Any:
        """Our replacement for a name; no module is imported."""
        if module.startswith("__torch__"):
            return ScriptedModule
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        if module == "torch._utils" and name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            return self._rebuild_tensor_method
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _first_argument
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return _first_argument
        if (module, name) == ("collections", "OrderedDict"):
            return _empty_dict
        if (module, name) in STAND_FOR_THEIR_ARGUMENT:
            return _first_argument
        if (module, name) == ("argparse", "Namespace"):
            return ScriptedModule
        raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a weights file")

    def persistent_load(self, pid: Any) -> Storage:
        """The storage that a pickle describes as torch.save does."""
        refuse_unless(type(pid) is tuple and 5 <= len(pid) <= 6, STRANGE_STORAGE)
        kind, dtype, key, _, count, *views = pid
        refuse_unless(type(kind) is str and kind == "storage", STRANGE_STORAGE)
        refuse_unless(isinstance(dtype, torch.dtype), STRANGE_STORAGE)
        refuse_unless(type(key) is str, STRANGE_STORAGE)
        refuse_unless(type(count) is int and count >= 0, STRANGE_STORAGE)
        refuse_unless(all(view is None for view in views), STRANGE_STORAGE)
        if key not in self.storages:
            refuse_unless(
                len(self.storages) < MAX_TENSORS, f"it has more than {MAX_TENSORS} storages"
            )
            self.storages[key] = self.open_storage(dtype, key, count)
        return self.storages[key]

    def load_frame(self) -> None:
        """Skip the length of a frame.

        It only helps to read ahead, and what is read ahead would not be counted.
        """
        self.read(FRAME_LENGTH_BYTES)

    def load_setitem(self) -> None:
        """One item of a dictionary."""
        value = self.stack.pop()
        key = self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        """Items of a dictionary."""
        self._set_items(self.pop_mark())

    def load_append(self) -> None:
        """One element of a list."""
        value = self.stack.pop()
        self._extend([value])

    def load_appends(self) -> None:
        """Elements of a list."""
        self._extend(self.pop_mark())

    def load_reduce(self) -> None:
        """A call of one of the few functions that `find_class` gives."""
        arguments = self.stack.pop()
        function = self.stack[-1]
        allowed = (self._rebuild_tensor_method, _first_argument, _empty_dict)
        is_ours = any(function is one for one in allowed)
        refuse_unless(
            is_ours, f"a call of a {type(function).__name__} is not allowed in a weights file"
        )
        is_known = type(arguments) is tuple and len(arguments) <= MAX_ARGUMENTS
        refuse_unless(is_known, "a call is described in an unknown way")
        self.stack[-1] = function(*arguments)

    def load_newobj(self) -> None:
        """A scripted module, still without attributes."""
        arguments = self.stack.pop()
        is_module = self.stack[-1] is ScriptedModule and type(arguments) is tuple and not arguments
        refuse_unless(is_module, "an object that is not a module is not allowed in a weights file")
        self.stack[-1] = ScriptedModule()

    def load_build(self) -> None:
        """Set attributes of a scripted module.

        Those of an OrderedDict are ignored: they are version numbers of modules.
        """
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, ScriptedModule):
            refuse_unless(type(state) is dict, "a module's attributes are not a dictionary")
            self.num_attributes += len(state)
            is_within_limit = self.num_attributes <= MAX_ATTRIBUTES
            refuse_unless(
                is_within_limit, f"its modules have more than {MAX_ATTRIBUTES} attributes"
            )
            target.__dict__.update(state)
            return
        name = type(target).__name__
        refuse_unless(
            isinstance(target, dict), f"a {name} with attributes is not allowed in a weights file"
        )

    dispatch[pickle.FRAME[0]] = load_frame
    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.APPEND[0]] = load_append
    dispatch[pickle.APPENDS[0]] = load_appends
    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build

    def _set_items(self, items: list) -> None:
        target = self.stack[-1]
        refuse_unless(
            type(target) is dict,
            f"items of a {type(target).__name__} are not allowed in a weights file",
        )
        for key, value in zip(items[::2], items[1::2], strict=True):
            is_small_number = type(key) is int and abs(key) < MAX_INTEGER_KEY
            refuse_unless(
                type(key) is str or is_small_number,
                f"a key of type {type(key).__name__} is not allowed in a weights file",
            )
            target[key] = value

    def _extend(self, values: list) -> None:
        target = self.stack[-1]
        refuse_unless(
            type(target) is list,
            f"elements of a {type(target).__name__} are not allowed in a weights file",
        )
        target.extend(values)

    def _rebuild_tensor(
        self, storage: Storage, offset: int, size: tuple, stride: tuple, *_: Any
    ) -> Tensor:
        refuse_unless(isinstance(storage, Storage), STRANGE_TENSOR)
        refuse_unless(type(size) is tuple and type(stride) is tuple, STRANGE_TENSOR)
        refuse_unless(len(size) == len(stride) <= MAX_DIMENSIONS, STRANGE_TENSOR)
        numbers = (offset, *size, *stride)
        refuse_unless(all(type(n) is int and n >= 0 for n in numbers), STRANGE_TENSOR)
        count = math.prod(size)
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if count and last >= len(storage.values):
            raise pickle.UnpicklingError(
                f"a tensor ends at element {last} of a storage of {len(storage.values)}"
            )
        self.budget -= count * max(storage.values.element_size(), WIDE_ELEMENT_BYTES)
        refuse_unless(
            self.budget >= 0,
            f"its tensors would take more than {MAX_SHARING} times the file's size",
        )
        self.num_tensors += 1
        refuse_unless(self.num_tensors <= MAX_TENSORS, f"it has more than {MAX_TENSORS} tensors")
        return torch.as_strided(storage.values, size, stride, offset)


def _first_argument(value: Any, *_: Any) -> Any:
    return value


def _empty_dict() -> dict:
    return {}
