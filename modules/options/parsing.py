"""parse_options: the command line of both scripts, read and checked as a whole.

Nothing here imports torch, so that `--help` and wrong options answer at once.
"""

import argparse
from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

from dataloaders.datasets import DATASETS
from modules.options.checks import find_conflicts
from modules.options.decoding import BUILT_IN_METHODS
from modules.options.help import format_examples, list_needed_first
from modules.options.options import GROUPS, Options
from modules.registries import DECODING_METHODS
from system.flags import add_entry_flags, add_flags, list_flags, read_settings
from system.launcher import read_place
from system.parser import OneLineParser, first_line
from system.registry import Registry

# Flags of the published code that had no effect there and have none here.
IGNORED_FLAGS = (
    "do_pretrain",
    "do_lower_case",
    "lr_decay",
    "margin",
    "hard_negative_rate",
    "negative_weighting",
    "n_pair",
    "use_mil",
    "sampled_use_mil",
    "feature_framerate",
    "fp16_opt_level",
    "n_gpu",
    "world_size",
    "rank",
    "text_num_hidden_layers",
    "visual_num_hidden_layers",
)


class EntryFlag(NamedTuple):
    """A flag that names a registered entry, whose settings become flags too."""

    flag: str
    registry: Registry
    without_settings: Collection[str] = ()


# Group → the flag in it whose entry can have settings; they go into the group's field `settings`.
ENTRY_FLAGS = {
    "data": EntryFlag("datatype", DATASETS),
    "decoding": EntryFlag("decoding", DECODING_METHODS, BUILT_IN_METHODS),
}


def parse_options(
    argv: list[str] | None, task: str, description: str | None, num_processes: int | None = None
) -> Options:
    """The checked options of a task's script.

    For wrong options, prints one line that names all of them, and exits with 2. `num_processes`
    defaults to what the launcher says in WORLD_SIZE.
    """
    parser = OneLineParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.usage = "%(prog)s [BEFORE AFTER] [options]" if task == "caption" else None
    parser.epilog = format_examples(parser.prog, task, argv)
    add_all_flags(parser, task, list_needed_first(argv))
    entries = add_all_entry_flags(parser, task, argv)
    values = vars(parser.parse_args(argv))
    if task == "caption":
        _read_bare_paths(parser, values)
    try:
        options = build_options(values, task, entries)
    except ValueError as error:
        parser.error(str(error))
    if num_processes is None:
        try:
            num_processes = read_place().world_size
        except ValueError as error:
            parser.error(str(error))
    problems = [problem for group in options.groups() for problem in group.find_problems()]
    problems += find_conflicts(options, num_processes)
    if problems:
        parser.error("; ".join(dict.fromkeys(problems)))  # two groups know the seed
    return options


def _read_bare_paths(parser: argparse.ArgumentParser, values: dict[str, Any]) -> None:
    """Let two bare paths stand for --do_predict, --before and --after."""
    paths = values.pop("images")
    if not paths:
        return
    if values["do_train"] or values["do_eval"]:
        parser.error(f"unrecognized arguments: {' '.join(paths)}")
    if values["before"] or values["after"] or values["pairs"]:
        parser.error(f"give the images only once: {' '.join(paths)} stand without an option")
    if len(paths) != 2:
        parser.error(
            f"expected two images, before and after, found {len(paths)}: {' '.join(paths)} "
            "(a folder goes after --before, a table after --pairs)"
        )
    values["before"], values["after"] = paths
    values["do_predict"] = True


def add_all_flags(
    parser: argparse.ArgumentParser, task: str, needed_first: Collection[str]
) -> None:
    """Add a task's flags to a parser, group by group, and those that have no effect.

    The flags named in `needed_first` come before all others.
    """
    if task == "caption":
        parser.add_argument(
            "images",
            nargs="*",
            metavar="BEFORE AFTER",
            help="two images to caption: the same as --do_predict --before BEFORE --after AFTER",
        )
    known = [option for group in GROUPS.values() for option in list_flags(group, task)]
    by_name = {option.name: option for option in known}
    first = [by_name[name] for name in needed_first]
    add_flags(parser.add_argument_group("What most people need"), first)
    for group in GROUPS.values():
        flags = [flag for flag in list_flags(group, task) if flag not in first]
        if flags:
            title = first_line(group.__doc__).rstrip(".")
            add_flags(parser.add_argument_group(title), flags)
    for name in IGNORED_FLAGS:
        parser.add_argument(f"--{name}", nargs="?", const=True, help=argparse.SUPPRESS)


def add_all_entry_flags(
    parser: argparse.ArgumentParser, task: str, argv: list[str] | None
) -> dict[str, Any]:
    """Add the settings of the entries that the command line names; returns them by group."""
    entries = {}
    for group_name, (name, registry, without_settings) in ENTRY_FLAGS.items():
        if name not in [flag.name for flag in list_flags(GROUPS[group_name], task)]:
            continue
        entry = add_entry_flags(parser, registry, name, argv, without_settings)
        unknown = _find_unknown_defaults(entry)
        if unknown:
            parser.error(f"--{name}: its defaults name {unknown[0]}, which is not a flag")
        entries[group_name] = entry
    return entries


def _find_unknown_defaults(entry: Any) -> list[str]:
    """The names in an entry's `defaults` that are flags of neither task."""
    known = {flag.name for group in GROUPS.values() for flag in list_flags(group)}
    return [name for name in getattr(entry, "defaults", {}) if name not in known]


def build_options(values: Mapping[str, Any], task: str, entries: Mapping[str, Any]) -> Options:
    """The options that parsed values make, not checked yet.

    Raises ValueError if an entry's settings reject their values.
    """
    groups = {}
    for group_name, group in GROUPS.items():
        names = [field.name for field in fields(group)]
        own_values = {name: values[name] for name in names if name in values}
        if group_name in entries:
            own_values["settings"] = read_settings(entries[group_name], values)
        groups[group_name] = group(**own_values)
    ignored = [f"--{name}" for name in IGNORED_FLAGS if values[name] is not None]
    return Options(task, **groups, ignored=tuple(ignored))
