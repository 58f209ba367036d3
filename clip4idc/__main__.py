"""CLIP4IDC's commands: `clip4idc COMMAND …`, or in a checkout `python -m clip4idc COMMAND …`.

Each command calls a script's `main` with some arguments in front of the user's. Only the script of
the command is imported.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from system.places import VERSION
from system.requirements import explain_missing
from system.streams import prepare_streams
from system.suggestions import suggest


class Command(NamedTuple):
    """What a command is for, the function that it calls, and the arguments that come first."""

    help: str
    target: str  # module:function
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "predict": Command(
        "caption two images, two folders, or a table of pairs",
        "CLIP4IDCinference:main",
        ("--do_predict",),
    ),
    "page": Command("serve a web page that captions two images", "app:main"),
    "adapt": Command(
        "train stage 1: retrieval between captions and pairs",
        "main_task_retrieval:main",
        ("--do_train",),
    ),
    "finetune": Command(
        "train stage 2: the captioner",
        "CLIP4IDCinference:main",
        ("--do_train",),
    ),
    "evaluate retrieval": Command(
        "score an adapted CLIP on a dataset",
        "main_task_retrieval:main",
        ("--do_eval",),
    ),
    "evaluate captions": Command(
        "score a captioner on a dataset",
        "CLIP4IDCinference:main",
        ("--do_eval",),
    ),
    "score": Command(
        "score files of captions, and compare them",
        "gt.eval_utils:main",
        ("score",),
    ),
    "changes": Command(
        "check whether captions of CLEVR-Change name the right change",
        "gt.eval_utils:main",
        ("changes",),
    ),
    "ground-truth": Command("write a dataset's captions in COCO's form", "gt.eval_utils:main"),
    "check": Command("look for mistakes in a dataset", "preprocess.check_dataset:main"),
    "draw": Command("draw a dataset of scenes", "preprocess.synthesize:main"),
    "download": Command("download datasets and published weights", "preprocess.download:main"),
    "convert": Command(
        "convert CLIP weights of another project",
        "preprocess.convert_weights:main",
    ),
    "export": Command("pack a finetuned model for publication", "preprocess.export_model:main"),
    "models": Command("list the models that have a name", "preprocess.list_models:main"),
    "doctor": Command("say what works here, and what is missing", "clip4idc.doctor:main"),
}
HELP = ("-h", "--help")

# What people type who do not know the names yet.
OTHER_WORDS = {
    "app": "page",
    "caption": "predict",
    "serve": "page",
    "train": "finetune",
}


def format_usage(first_word: str = "") -> str:
    """The help text of `clip4idc`, or of the commands of two words that begin with `first_word`."""
    prefix = f"{first_word} " if first_word else ""
    shown = {name: command for name, command in COMMANDS.items() if name.startswith(prefix)}
    width = max(map(len, shown))
    usage = f"usage: clip4idc {prefix}COMMAND [options]    (version {VERSION})"
    rows = [f"  {name:<{width}}  {command.help}" for name, command in shown.items()]
    end = "clip4idc COMMAND --help lists the options of a command."
    return "\n".join([usage, "", *rows, "", end])


def find_command(words: Sequence[str]) -> tuple[str, list[str]]:
    """The command that `words` begin with, and the other words.

    Raises ValueError, which names the nearest command, if there is none.
    """
    for name in COMMANDS:
        length = len(name.split())
        if name.split() == list(words[:length]):
            return name, list(words[length:])
    first = words[0]
    seconds = _second_words(first)
    if not seconds:
        raise ValueError(f"there is no command {first!r}{_suggest(first, list(COMMANDS))}")
    if len(words) == 1:
        raise ValueError(f"{first} needs a second word, one of {', '.join(seconds)}")
    given = f"{first} {words[1]}"
    raise ValueError(f"there is no command {given!r}{_suggest(words[1], seconds)}")


def _second_words(first: str) -> list[str]:
    return [name.split()[1] for name in COMMANDS if name.startswith(f"{first} ")]


def _suggest(word: str, known: Sequence[str]) -> str:
    meant = OTHER_WORDS.get(word)
    if meant in known:
        return f'; did you mean "{meant}"?'
    return suggest(word, known) or f": expected one of {', '.join(known)}"


def load_function(target: str) -> Callable[[list[str]], int]:
    """The function that `module:function` names."""
    module, _, function = target.partition(":")
    return getattr(importlib.import_module(module), function)


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code. An unknown command prints one line and returns 2."""
    words = sys.argv[1:] if argv is None else argv
    prepare_streams()
    if not words or words[0] in HELP:
        print(format_usage())
        return 0
    if words[0] in ("-V", "--version"):
        print(VERSION)
        return 0
    if len(words) == 2 and words[1] in HELP and _second_words(words[0]):
        print(format_usage(words[0]))
        return 0
    try:
        name, rest = find_command(words)
        run = load_function(COMMANDS[name].target)
    except (ValueError, ImportError) as error:
        message = explain_missing(error) if isinstance(error, ImportError) else str(error)
        if message is None:
            raise
        print(f"clip4idc: {message}", file=sys.stderr)
        return 2
    sys.argv[0] = f"clip4idc {name}"  # the program's name in help texts and messages
    return run([*COMMANDS[name].arguments, *rest])


if __name__ == "__main__":
    sys.exit(main())
