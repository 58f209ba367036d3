"""The argument parser of every command: it forgives hyphens and answers mistakes in one line."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from system.escaping import to_one_line
from system.flags import NUMBER_PARSERS
from system.places import VERSION
from system.streams import prepare_streams
from system.suggestions import find_nearest
from system.urls import remember_secrets, scrub

EXIT_USER_ERROR = 2


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line each, without secrets from URLs.

    Hyphens and underscores in the names of options are the same, values may stand between
    positional arguments, and an unknown option is answered with the nearest one.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        for number_type, parse in NUMBER_PARSERS.items():
            self.register("type", number_type, parse)
        if self.add_help:
            version = f"clip4idc {VERSION}"
            self.add_argument(
                "--version", action="version", version=version, help="print the version and exit"
            )

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As in argparse, but options may stand between positional arguments."""
        found, unknown = self.parse_known_intermixed_args(self._prepare(args), namespace)
        if unknown:
            self.error(self._describe_unknown(unknown))
        return found

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As in argparse. From here on, secrets in URLs given as arguments are hidden in all
        output, and the standard streams take any text."""
        return super().parse_known_args(self._prepare(args), namespace)

    def error(self, message: str) -> NoReturn:
        """Print the message as one line, and exit with 2."""
        line = format_line(message)
        self.exit(EXIT_USER_ERROR, f"{self.prog}: {line} (--help lists the options)\n")

    def _prepare(self, args: Sequence[str] | None) -> list[str]:
        """The arguments, with the names of options as the parser spells them."""
        prepare_streams()
        arguments = sys.argv[1:] if args is None else list(args)
        for argument in arguments:
            value = argument.partition("=")[2] if argument.startswith("-") else argument
            remember_secrets(value)
        end = arguments.index("--") if "--" in arguments else len(arguments)
        return [self._spell(argument) for argument in arguments[:end]] + arguments[end:]

    def _spell(self, argument: str) -> str:
        """An argument, with _ for - in an option's name, or - for _, if only that is known."""
        if not argument.startswith("--"):
            return argument
        name, sign, value = argument.partition("=")
        if name in self._option_string_actions:
            return argument
        for spelled in (name[2:].replace("-", "_"), name[2:].replace("_", "-")):
            if f"--{spelled}" in self._option_string_actions:
                return f"--{spelled}{sign}{value}"
        return argument

    def _describe_unknown(self, unknown: Sequence[str]) -> str:
        options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
        nearest = list(dict.fromkeys(filter(None, map(self._find_nearest, options))))
        question = f" (did you mean {' and '.join(nearest)}?)" if nearest else ""
        return f"unrecognized arguments: {' '.join(unknown)}{question}"

    def _find_nearest(self, option: str) -> str | None:
        """The option whose name is most like this one; None if none is like it."""
        shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
        names = {name.lstrip("-"): name for action in shown for name in action.option_strings}
        nearest = find_nearest(option.lstrip("-"), names)
        return names[nearest] if nearest else None


def format_line(message: str) -> str:
    """A message as one line, without secrets; blanks in names stay as they are."""
    return to_one_line(scrub(" ".join(line.strip() for line in message.splitlines())))


def first_line(docstring: str | None) -> str:
    """The first line of a docstring; empty if there is none, as under `python -OO`."""
    return (docstring or "").partition("\n")[0]


def find_program_name() -> str:
    """The name of this program, as its help texts show it."""
    return OneLineParser().prog
