"""Registries: objects that users choose by name, such as datasets, loaded when first used."""

import functools
import importlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any


class Registry:
    """Objects by name. An entry is the object, or a text `package.module:name` to import it from.

    A text that begins with a dot is relative to `package`. Installed packages add entries by entry
    points of `group`. Listing names and looking for one imports nothing, so that `--help` is quick.
    """

    def __init__(
        self,
        kind: str,
        targets: Mapping[str, Any],
        package: str,
        group: str,
        members: Sequence[str] = (),
    ) -> None:
        """`kind` is the word in messages, such as "dataset". `members` are attributes that every
        entry must have."""
        self.kind = kind
        self.targets = dict(targets)
        self.package = package
        self.group = group
        self.members = tuple(members)

    def register(self, name: str, target: Any) -> None:
        """Add an entry. Raises ValueError if the name is taken."""
        if name in self:
            raise ValueError(f"{self.kind} {name!r} is registered already")
        self.targets[name] = target

    def __contains__(self, name: object) -> bool:
        return name in self.targets or name in self._find_installed()

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys([*self.targets, *self._find_installed()]))

    def __getitem__(self, name: str) -> Any:
        """The object of a name.

        Raises ValueError for an unknown name, or an entry that cannot be loaded or lacks members.
        """
        target = self.targets[name] if name in self.targets else self._find_installed().get(name)
        if target is None:
            raise ValueError(f"unknown {self.kind} {name!r}: {self._describe_names()}")
        found = self._load(name, target)
        missing = [member for member in self.members if not hasattr(found, member)]
        missing += sorted(getattr(found, "__abstractmethods__", ()))
        if missing:
            raise ValueError(
                f"{self.kind} {name!r} lacks {', '.join(missing)}: {self._describe_names()}"
            )
        return found

    def _describe_names(self) -> str:
        return f"expected one of {', '.join(self)}"

    def _load(self, name: str, target: Any) -> Any:
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module, self.package), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.kind} {name!r} cannot be loaded from {target}: {error}"
            ) from None

    def _find_installed(self) -> dict[str, str]:
        """Entries of installed packages, which cannot replace those registered here."""
        installed = _read_entry_points(self.group, tuple(sys.path))
        return {name: target for name, target in installed.items() if name not in self.targets}


@functools.cache
def _read_entry_points(group: str, folders: tuple[str, ...]) -> dict[str, str]:
    """The entry points of a group, by name, as `package.module:name`.

    `importlib.metadata` is imported only if a package in `folders` names the group: its import
    alone takes as long as the rest of `--help`.
    """
    if not any(f"[{group}]" in text for text in _read_metadata(folders)):
        return {}
    from importlib.metadata import entry_points

    return {entry.name: entry.value for entry in entry_points(group=group)}


@functools.cache
def _read_metadata(folders: tuple[str, ...]) -> list[str]:
    """What installed packages in `folders` say about entry points."""
    texts = []
    for folder in folders:
        with suppress(OSError):  # no folder, such as the zip file of Python's own modules
            names = os.listdir(folder or ".")
            packages = [name for name in names if name.endswith((".dist-info", ".egg-info"))]
            texts += [_read_entry_points_file(os.path.join(folder, name)) for name in packages]
    return texts


def _read_entry_points_file(package: str) -> str:
    """A package's entry_points.txt; empty if it has none."""
    with suppress(OSError), open(f"{package}/entry_points.txt", encoding="utf-8") as file:
        return file.read()
    return ""
