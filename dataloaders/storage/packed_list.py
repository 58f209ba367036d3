"""A read-only list in two tensors, so that worker processes share its memory instead of copying it.

Python updates the reference count of every object it touches. A forked worker that reads an
ordinary list therefore ends up with its own copy of every memory page.
"""

import pickle
from collections.abc import Iterable, Sequence
from typing import Any

import torch


class PackedList(Sequence):
    """The items as bytes, turned back into objects at each access. A slice is an ordinary list."""

    def __init__(self, items: Iterable[Any]) -> None:
        parts = [pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL) for item in items]
        content = bytearray(b"".join(parts)) or bytearray(1)  # torch refuses an empty buffer
        self._offsets = torch.tensor([0, *map(len, parts)]).cumsum(0)
        self._bytes = torch.frombuffer(content, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        position = index % len(self)
        start, end = self._offsets[position : position + 2].tolist()
        return pickle.loads(self._bytes[start:end].numpy().tobytes())
