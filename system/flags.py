"""Flags of a command line as fields of dataclasses.

A registered entry, such as a dataset, can bring flags of its own. It can have `Settings`, a frozen
dataclass of `flag` fields, and `defaults`, values for flags that exist anyway. Both apply once the
command line names the entry.
"""

import argparse
import numbers
import re
import sys
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from dataclasses import Field, field, fields, is_dataclass
from typing import Any, NamedTuple

from system.escaping import shorten
from system.registry import Registry

# The most that a whole number may be, where a flag does not say: larger ones overflow somewhere.
MAX_WHOLE_NUMBER = 10**9
# The type of a flag → what its values are, and how a message calls them.
NUMBERS = {int: (numbers.Integral, "a whole number"), float: (numbers.Real, "a number")}
MAX_SEED = 2**63 - 1  # torch's
MAX_WORKERS = 256  # processes besides a run's own

DEVICE_NAME = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")


def device_name(text: str) -> str:
    """The type of a flag that names a device. Raises ArgumentTypeError for other texts."""
    if DEVICE_NAME.fullmatch(text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no device, expected auto, cpu, cuda, cuda:NUMBER or mps"
        )
    return text


class Bounds(NamedTuple):
    """The range of a flag's number. Infinities and NaN are in none, and huge whole numbers only
    where `at_most` says so."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None

    def hold(self, value: float) -> bool:
        """Whether a number is in the range."""
        widest = MAX_WHOLE_NUMBER if isinstance(value, int) else sys.float_info.max
        least = -widest if self.at_least is None else self.at_least
        most = widest if self.at_most is None else self.at_most
        return least <= value <= most and (self.above is None or value > self.above)

    def describe(self, value: float) -> str:
        """What was expected instead of `value`, which is outside."""
        least, most, above = self
        if most is None and isinstance(value, int) and value > MAX_WHOLE_NUMBER:
            most = MAX_WHOLE_NUMBER
        if above is not None and most is not None:
            return f"a number in ({above}, {most}]"
        if above is not None:
            return f"a number above {above}"
        if least is not None and most is not None:
            return f"{least} to {most}"
        if least is None and most is None:
            return "a finite number"
        return f"at most {most}" if least is None else f"at least {least}"


def parse_whole_number(text: str) -> int:
    """The type of an argument. Raises ArgumentTypeError for what is no whole number."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a whole number") from None


def parse_number(text: str) -> float:
    """The type of an argument. Raises ArgumentTypeError for what is no number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{shorten(text)!r} is not a number") from None


# Parsers of command lines use them for arguments of these types.
NUMBER_PARSERS = {int: parse_whole_number, float: parse_number}


def bounded(
    value_type: type[float],
    at_least: float | None = None,
    at_most: float | None = None,
) -> Callable[[str], float]:
    """The type of an argparse argument: a number in a range."""
    bounds = Bounds(at_least, at_most)

    def parse(text: str) -> float:
        value = NUMBER_PARSERS[value_type](text)
        if not bounds.hold(value):
            raise argparse.ArgumentTypeError(
                f"{shorten(text)} is out of range, expected {bounds.describe(value)}"
            )
        return value

    return parse


def flag(
    default: Any,
    text: str,
    value_type: Callable[[str], Any] = str,
    task: str | None = None,
    choices: Container[str] | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    above: float | None = None,
    aliases: Sequence[str] = (),
) -> Any:
    """A dataclass field that is also a flag.

    `text` is its help and `value_type` the type of its value; a bool flag takes no value. `task`
    limits it to one of the scripts. `choices` may be a Registry. The bounds hold for values other
    than None; `Bounds` says what else holds for numbers.
    """
    declared = {
        "help": text,
        "type": value_type,
        "task": task,
        "choices": choices,
        "bounds": Bounds(at_least, at_most, above),
        "aliases": aliases,
    }
    return field(default=default, metadata=declared)


class FlagGroup:
    """A group of flags: the base of a frozen dataclass that knows what is wrong with its values.

    A group that names a registered entry can hold that entry's `Settings` in a field `settings`.
    """

    def find_problems(self) -> list[str]:
        """What is wrong with the values, a sentence each. Groups can add checks of their own."""
        settings = getattr(self, "settings", None)
        if settings is None:
            return find_range_problems(self)
        if isinstance(settings, FlagGroup):
            return find_range_problems(self) + settings.find_problems()
        return find_range_problems(self) + find_range_problems(settings)


def list_flags(group: Any, task: str | None = None) -> list[Field]:
    """The fields of a dataclass that are flags: all, or those of one task."""
    found = [option for option in fields(group) if "help" in option.metadata]
    if task is None:
        return found
    return [option for option in found if option.metadata["task"] in (None, task)]


def find_range_problems(group: Any) -> list[str]:
    """For each number of a dataclass of flags that is none, or out of its bounds, a sentence."""
    problems = []
    for option in list_flags(group):
        value = getattr(group, option.name)
        number_type = option.metadata["type"]
        if number_type in NUMBERS and not (value is None and option.default is None):
            bounds = option.metadata["bounds"]
            problems.append(find_number_problem(option.name, value, number_type, bounds))
    return list(filter(None, problems))


def find_number_problem(name: str, value: Any, number_type: type, bounds: Bounds) -> str | None:
    """A sentence about the value of a flag that is no such number, or out of its bounds."""
    wanted, expected = NUMBERS[number_type]
    if isinstance(value, wanted) and not isinstance(value, bool):
        if bounds.hold(value):
            return None
        expected = bounds.describe(value)
    return f"--{name} is {shorten(str(value))}, expected {expected}"


def add_flags(parser: argparse._ActionsContainer, chosen: Iterable[Field]) -> None:
    """Add each field as a flag of its name to a parser or to one of its argument groups."""
    for option in chosen:
        arguments = {"help": _format_help(option), "default": option.default}
        if option.metadata["type"] is bool:
            arguments["action"] = "store_true"
        else:
            arguments["type"] = option.metadata["type"]
            arguments["choices"] = option.metadata["choices"]
            arguments["metavar"] = _choose_placeholder(option)
        parser.add_argument(f"--{option.name}", *option.metadata["aliases"], **arguments)


def _format_help(option: Field) -> str:
    """A flag's help, with its default if that says something."""
    text = option.metadata["help"]
    if option.default is None or option.default is False:
        return text
    return f"{text} (default: %(default)s)"


def _choose_placeholder(option: Field) -> str | None:
    """The placeholder for a flag's value in the help: argparse's default, or NAME for a registered
    entry.

    By default argparse lists the choices in every run, and to list a registry means to look through
    all installed packages. A help text can list them with `%(choices)s`.
    """
    return "NAME" if isinstance(option.metadata["choices"], Registry) else None


def add_entry_flags(
    parser: argparse.ArgumentParser,
    registry: Registry,
    name: str,
    argv: Sequence[str] | None,
    without_settings: Collection[str] = (),
) -> Any:
    """Prepare a parser for the entry that the command line names after `--name`; returns the entry.

    Its settings become flags and its defaults replace the parser's. Returns None if the command
    line names no entry, or an unknown one, which the parser refuses by itself, or one of
    `without_settings`, which need not be loaded. Exits with 2 and one line for an entry that cannot
    be used.
    """
    key = _find_value(parser, name, argv)
    if key is None or key in without_settings or key not in registry:
        return None
    try:
        entry = registry[key]
        group = parser.add_argument_group(f"settings of {registry.kind} {key}")
        add_flags(group, list_settings(entry))
    except (ValueError, argparse.ArgumentError) as error:
        parser.error(f"--{name} {key}: {error}")
    _replace_defaults(parser, getattr(entry, "defaults", {}))
    return entry


def _find_value(
    parser: argparse.ArgumentParser, name: str, argv: Sequence[str] | None
) -> str | None:
    """The value that the command line gives to `--name`, before the parser knows all flags."""
    scout = type(parser)(prog=parser.prog, add_help=False, allow_abbrev=parser.allow_abbrev)
    scout.add_argument(f"--{name}", default=parser.get_default(name))
    values, _ = scout.parse_known_args(argv)
    return getattr(values, name)


def _replace_defaults(parser: argparse.ArgumentParser, defaults: Mapping[str, Any]) -> None:
    """Replace the defaults of a parser's flags; others, of the other task's flags, are left out."""
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{flag: value for flag, value in defaults.items() if flag in known})


def list_settings(entry: Any) -> list[Field]:
    """The flags of an entry's `Settings`; none if it has no settings, or is None.

    Raises ValueError if `Settings` is no dataclass.
    """
    settings = getattr(entry, "Settings", None)
    if settings is None:
        return []
    if not is_dataclass(settings):
        raise ValueError(f"its Settings is {settings!r}, expected a dataclass of flags")
    return list_flags(settings)


def read_settings(entry: Any, values: Mapping[str, Any]) -> Any:
    """An entry's `Settings` with the parsed values; None if it has no settings."""
    names = [option.name for option in list_settings(entry)]
    if not names:
        return None
    return entry.Settings(**{name: values[name] for name in names if name in values})
