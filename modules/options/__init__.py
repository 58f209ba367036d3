"""The command line of both scripts: one table of flags, checked all at once, as frozen dataclasses (SPEC §2).

Imports nothing heavy, so that `--help` and wrong options answer at once. Each dataclass field is a flag of the same name.
"""

import argparse
import os
from dataclasses import fields

from modules.options.checks import check_options
from modules.options.groups import GROUPS, IGNORED_FLAGS, Options, belongs_to
from system.command import OneLineParser
from system.flags import add_flags


def parse_options(
    argv: list[str] | None, stage: str, description: str, num_processes: int | None = None
) -> Options:
    """The checked options of a stage's script. Wrong ones print one line that names them all, and exit with 2.

    num_processes defaults to the launcher's WORLD_SIZE.
    """
    parser = OneLineParser(
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    for group in GROUPS.values():
        title = (group.__doc__ or "").rstrip(".")
        add_flags(
            parser.add_argument_group(title), (f for f in fields(group) if belongs_to(f, stage))
        )
    for name in IGNORED_FLAGS:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)
    values = vars(parser.parse_args(argv))
    parts = {
        name: group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
        for name, group in GROUPS.items()
    }
    options = Options(
        stage,
        **parts,
        ignored=tuple(f"--{name}" for name in IGNORED_FLAGS if values[name] is not None),
    )
    if num_processes is None:
        num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    problems = check_options(options, num_processes)
    if problems:
        parser.error("; ".join(problems))
    return options
