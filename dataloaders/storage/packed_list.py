"""A read-only list whose items lie in two tensors, so that worker processes share them instead of copying them bit by bit.

Python writes a reference count into every object that it looks at: a forked worker that reads a list of scenes gets its own copy
of each memory page it touches, until all workers hold all annotations.
"""

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch


class PackedList(Sequence):
    """The items as bytes, made anew at each access. A slice is an ordinary list."""

    def __init__(self, items: Iterable[Any]) -> None:
        parts = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        self._ends = torch.tensor([0, *map(len, parts)]).cumsum(0)
        self._bytes = torch.frombuffer(
            bytearray(b"".join(parts)) or bytearray(1), dtype=torch.uint8
        )  # never of no bytes at all

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        start, end = self._ends[index % len(self) :][:2].tolist()
        return pickle.loads(self._bytes[start:end].numpy().tobytes())
