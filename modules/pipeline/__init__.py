"""A run of either entry script, from options to results: the only package that sees all options.

Imports here are late: predictions need no training, and wrong options are refused without torch.
"""

from modules.options import Options, parse_options
from system.command import Advice, run_command
from system.parser import find_program_name


def run_script(argv: list[str] | None, task: str, description: str | None) -> int:
    """The whole command line of a task's script: parse it, then run. Exits as `run_command` does,
    and with 2 for wrong options."""
    options = parse_options(argv, task, description)
    return run_command(find_program_name(), lambda: run(options), choose_advice(options))


def choose_advice(options: Options) -> Advice:
    """What helps against the errors of such a run. Nothing changes the memory of a prediction."""
    if options.run.do_predict:
        return Advice()
    smaller_batches = "use a smaller --batch_size_val"
    if options.run.do_train:
        smaller_batches = (
            "use a smaller --batch_size or --batch_size_val, or more --gradient_accumulation_steps"
        )
    return Advice(
        out_of_memory=smaller_batches,
        worker_killed="use fewer --num_thread_reader (0: none)",
        stopped="the same command with --resume auto continues",
    )


def run(options: Options) -> None:
    """Predict, or train and evaluate.

    Raises ValueError or OSError for what the user can correct, nearly always before anything is
    written.
    """
    if options.run.do_predict:
        from modules.pipeline.predict import predict

        predict(options)
    else:
        from modules.pipeline.train_or_evaluate import train_or_evaluate

        train_or_evaluate(options)
