"""What a pickle of weights may hold besides plain values, and how deep its containers may be."""

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MAX_DEPTH = 100  # of containers inside each other
TOO_DEEP = f"its containers are nested more than {MAX_DEPTH} deep"
ENDLESS = "its containers contain themselves"


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of one or more tensors of a file, and the same bytes as a tensor (n,)."""

    content: bytearray
    values: Tensor

    @classmethod
    def of(cls, content: bytearray, dtype: torch.dtype) -> "Storage":
        """The bytes as numbers. Raises ValueError if the last element is incomplete."""
        values = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
        return cls(content, values)


class ScriptedModule:
    """Represents any scripted class: it has the attributes, but none of the code."""


def refuse_unless(condition: bool, reason: str) -> None:
    """Raise UnpicklingError with the reason unless the condition holds."""
    if not condition:
        raise pickle.UnpicklingError(reason)


def refuse_deep(root: Any) -> None:
    """Raises UnpicklingError if containers are nested deeper than MAX_DEPTH, or in a circle."""
    if _is_container(root):
        _DepthWalk().check(root)


class _DepthWalk:
    """Visits each container once, however often it is shared, without recursion.

    `heights` has the containers entered so far: 1 for one without containers inside. `path` leads
    from the root to the current container, each with the rest of its children.
    """

    def __init__(self) -> None:
        self.heights: dict[int, int] = {}
        self.path: list[tuple[Any, Iterator]] = []
        self.on_path: set[int] = set()

    def check(self, root: Any) -> None:
        """Raises UnpicklingError if the root is nested too deeply, or contains itself."""
        self._enter(root)
        while self.path:
            container, children = self.path[-1]
            child = next(children, None)
            if child is None:
                self._leave(container)
            elif id(child) in self.heights and id(child) not in self.on_path:
                height = self.heights[id(child)] + 1
                self.heights[id(container)] = max(self.heights[id(container)], height)
                refuse_unless(len(self.path) + height - 1 <= MAX_DEPTH, TOO_DEEP)
            else:
                self._enter(child)

    def _enter(self, container: Any) -> None:
        refuse_unless(id(container) not in self.on_path, ENDLESS)
        self.heights[id(container)] = 1
        self.path.append((container, _containers_in(container)))
        self.on_path.add(id(container))
        refuse_unless(len(self.path) <= MAX_DEPTH, TOO_DEEP)

    def _leave(self, container: Any) -> None:
        self.path.pop()
        self.on_path.discard(id(container))
        if self.path:
            parent = id(self.path[-1][0])
            height = self.heights[id(container)] + 1
            self.heights[parent] = max(self.heights[parent], height)


def _containers_in(container: Any) -> Iterator[Any]:
    """The containers directly inside a container."""
    if isinstance(container, ScriptedModule):
        container = vars(container)
    values = container.values() if isinstance(container, dict) else container
    return filter(_is_container, values)


def _is_container(value: Any) -> bool:
    return isinstance(value, dict | list | tuple | ScriptedModule)
