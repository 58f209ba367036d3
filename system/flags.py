"""Flags of a command line as fields of dataclasses, also those of a registered entry such as a dataset.

An entry can have `Settings`, a frozen dataclass of `flag` fields, and `defaults`, values for flags
that exist anyway. Both apply once the command line names the entry.
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, field, fields
from typing import Any

from system.registry import Registry


def flag(default: Any, text: str, kind: type = str, stage: str | None = None, **more: Any) -> Any:
    """A dataclass field that is also a flag; `stage` limits it to one of the scripts.

    `more` is metadata, of which `choices`, `metavar` and `aliases` reach the command line.
    """
    return field(default=default, metadata={"help": text, "type": kind, "stage": stage, **more})


def add_flags(parser: argparse._ActionsContainer, chosen: Iterable[Field]) -> None:
    """Add each field as a flag of its name to a parser or to a group of one."""
    for one in chosen:
        arguments = {"help": one.metadata["help"], "default": one.default}
        if one.metadata["type"] is bool:
            arguments["action"] = "store_true"
        else:
            more = {name: one.metadata.get(name) for name in ("type", "choices", "metavar")}
            arguments.update(more)
        parser.add_argument(f"--{one.name}", *one.metadata.get("aliases", ()), **arguments)


def add_entry_flags(
    parser: argparse.ArgumentParser, registry: Registry, name: str, argv: Sequence[str] | None
) -> Any:
    """Prepare a parser for the entry that the command line names after `--name`; returns the entry.

    Its settings become flags and its defaults replace the parser's. Returns None where the command
    line names no entry, or an unknown one, which the parser refuses by itself. Exits with 2 and one
    line for an entry that cannot be used.
    """
    scout = type(parser)(prog=parser.prog, add_help=False, allow_abbrev=parser.allow_abbrev)
    scout.add_argument(f"--{name}", default=parser.get_default(name))
    key = getattr(scout.parse_known_args(argv)[0], name)
    if key is None or key not in registry:
        return None
    try:
        entry = registry[key]
        group = parser.add_argument_group(f"settings of {registry.kind} {key}")
        add_flags(group, settings_fields(entry))
    except (ValueError, argparse.ArgumentError) as error:
        parser.error(f"--{name} {key}: {error}")
    known = {action.dest for action in parser._actions}
    defaults = getattr(entry, "defaults", {})
    parser.set_defaults(**{key: value for key, value in defaults.items() if key in known})
    return entry


def settings_fields(entry: Any) -> tuple[Field, ...]:
    """The fields of an entry's `Settings`; none where it has no settings, or where it is None."""
    settings = getattr(entry, "Settings", None)
    return fields(settings) if settings else ()


def read_settings(entry: Any, values: Mapping[str, Any]) -> Any:
    """An entry's `Settings` with the parsed values; None where it has no settings."""
    names = [one.name for one in settings_fields(entry)]
    if not names:
        return None
    return entry.Settings(**{name: values[name] for name in names if name in values})
