"""Registries: objects that users choose by name, such as datasets, loaded when first used."""

import importlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
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
        if isinstance(target, EntryPoint):
            target = target.value
        if not isinstance(target, str):
            return target
        module, _, attribute = target.partition(":")
        try:
            return getattr(importlib.import_module(module, self.package), attribute)
        except (ImportError, AttributeError) as error:
            raise ValueError(
                f"{self.kind} {name!r} cannot be loaded from {target}: {error}"
            ) from None

    def _find_installed(self) -> dict[str, EntryPoint]:
        """Entries of installed packages, which cannot replace those registered here."""
        found = entry_points(group=self.group)
        return {entry.name: entry for entry in found if entry.name not in self.targets}
