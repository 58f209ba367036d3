"""The help of both scripts: what stands first, and the examples at its end."""

import sys
from collections.abc import Sequence

from system.command import wrap_command

ACTIONS = ("--do_train", "--do_eval", "--do_predict")

NEEDED_FOR_RUNS = ("do_train", "datatype", "data_path", "output_dir", "init_model")
NEEDED_FOR_PREDICTIONS = ("before", "after", "pairs", "predictions", "init_model")

# Task → its examples: the action of each, and how the command goes on.
EXAMPLES = {
    "retrieval": (
        ("--do_train", "--datatype pairs --data_path pairs.csv --output_dir runs/stage1"),
        (
            "--do_eval",
            "--datatype pairs --data_path pairs.csv --output_dir runs/score "
            "--init_model runs/stage1",
        ),
    ),
    "caption": (
        ("--do_predict", "before.png after.png"),
        ("--do_predict", "--before photos --predictions captions.csv --init_model runs/stage2"),
        (
            "--do_train",
            "--datatype pairs --data_path pairs.csv --output_dir runs/stage2 "
            "--init_model runs/stage1",
        ),
        (
            "--do_eval",
            "--datatype pairs --data_path pairs.csv --output_dir runs/score "
            "--init_model runs/stage2",
        ),
    ),
}


def list_needed_first(argv: Sequence[str] | None) -> tuple[str, ...]:
    """The flags that are shown first: what most people need for the action in the command line."""
    words = sys.argv[1:] if argv is None else argv
    return NEEDED_FOR_PREDICTIONS if "--do_predict" in words else NEEDED_FOR_RUNS


def format_examples(program: str, task: str, argv: Sequence[str] | None) -> str:
    """The end of a task's help: complete commands.

    `clip4idc` puts the action in front of the user's words: then only its examples are shown, as
    they are typed there.
    """
    words = sys.argv[1:] if argv is None else argv
    given = [action for action in ACTIONS if action in words]
    if program.endswith(".py"):
        program = f"python {program}"
    lines = ["examples:"]
    for action, rest in EXAMPLES[task]:
        if given and action not in given:
            continue
        implied = given or not rest.startswith("--")  # bare paths imply --do_predict
        lines += wrap_command(f"{program} {rest}" if implied else f"{program} {action} {rest}")
    return "\n".join(lines)
