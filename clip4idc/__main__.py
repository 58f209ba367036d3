"""CLIP4IDC's commands: `clip4idc COMMAND …`, or in a checkout `python -m clip4idc COMMAND …`.

Each command calls a script's `main` with some arguments in front of the user's. Only the script of
the command is imported.
"""

import importlib
import sys
from typing import NamedTuple

from clip4idc import __version__
from system.places import PREFIX


class Command(NamedTuple):
    """What a command is for, the module whose `main` it calls, and its arguments in front."""

    help: str
    module: str
    arguments: tuple[str, ...] = ()


COMMANDS = {
    "predict": Command(
        "caption two images, two folders, or a table of pairs",
        "CLIP4IDCinference",
        ("--do_predict",),
    ),
    "adapt": Command(
        "train stage 1: retrieval between captions and pairs",
        "main_task_retrieval",
        ("--do_train",),
    ),
    "finetune": Command("train stage 2: the captioner", "CLIP4IDCinference", ("--do_train",)),
    "evaluate": Command("score a captioner on a dataset", "CLIP4IDCinference", ("--do_eval",)),
    "evaluate-retrieval": Command(
        "score an adapted CLIP on a dataset", "main_task_retrieval", ("--do_eval",)
    ),
    "score": Command("score files of captions, and compare them", "gt.eval_utils", ("score",)),
    "changes": Command(
        "check whether captions of CLEVR-Change name the right change",
        "gt.eval_utils",
        ("changes",),
    ),
    "ground-truth": Command("write a dataset's captions in COCO's form", "gt.eval_utils"),
    "check": Command("look for mistakes in a dataset", "preprocess.check_dataset"),
    "draw": Command("draw a dataset of scenes", "preprocess.synthesize"),
    "download": Command("download datasets and published weights", "preprocess.download"),
    "convert": Command("convert CLIP weights of another project", "preprocess.convert_weights"),
    "export": Command("pack a finetuned model for publication", "preprocess.export_model"),
    "models": Command("list the models that have a name", "preprocess.list_models"),
    "page": Command("serve a web page that captions two images", "app"),
}


def format_usage() -> str:
    """The help text of `clip4idc`: a line for each command."""
    width = max(map(len, COMMANDS))
    rows = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    title = f"usage: clip4idc COMMAND [options]    (version {__version__})"
    end = "clip4idc COMMAND --help lists the options of a command."
    return "\n".join([title, "", *rows, "", end])


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code. An unknown command prints one line and returns 2."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(format_usage())
        return 0
    name, *rest = arguments
    if name == "--version":
        print(__version__)
        return 0
    command = COMMANDS.get(name)
    if command is None:
        expected = f"expected one of {', '.join(COMMANDS)}"
        print(f"clip4idc: no command {name!r}: {expected}", file=sys.stderr)
        return 2
    sys.argv[0] = f"clip4idc {name}"  # the program's name in help texts and messages
    module = importlib.import_module(PREFIX + command.module)
    return module.main([*command.arguments, *rest])


if __name__ == "__main__":
    sys.exit(main())
