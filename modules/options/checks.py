"""Checks that involve several groups of options, before any data are read."""

import os
from pathlib import Path

from modules.options.groups import DataOptions
from modules.options.options import Options


def find_conflicts(options: Options, num_processes: int) -> list[str]:
    """What is wrong with the options together, one sentence each, which names its flags."""
    problems = _find_action_problems(options)
    if _count_actions(options) == 0:
        return problems  # what else is missing depends on the action
    if options.run.do_predict:
        return problems + _find_prediction_problems(options, num_processes)
    problems += _find_prediction_flag_problems(options)
    problems += _find_run_problems(options)
    problems += _find_resume_problems(options)
    return problems + _find_batch_size_problems(options, num_processes)


def _count_actions(options: Options) -> int:
    return options.run.do_train + options.run.do_eval + options.run.do_predict


def _find_action_problems(options: Options) -> list[str]:
    num_actions = _count_actions(options)
    if num_actions == 1:
        return []
    if options.task == "retrieval":
        return ["give exactly one of --do_train and --do_eval"]
    instead = "" if num_actions else "two images, or "
    return [f"give {instead}exactly one of --do_train, --do_eval and --do_predict"]


def _find_prediction_problems(options: Options, num_processes: int) -> list[str]:
    problems = []
    predict = options.predict
    if predict.pairs and predict.before:
        problems.append("give either --before or --pairs")
    elif not (predict.pairs or predict.before):
        problems.append("give two images, or a folder after --before, or a table after --pairs")
    if num_processes > 1 and not predict.predictions:
        problems.append("with several processes, --predictions must name a file to write to")
    if options.model.resume_model or options.model.resume:
        problems.append(
            "--resume and --resume_model continue training; "
            "to caption with given weights, use --init_model"
        )
    return problems


def _find_prediction_flag_problems(options: Options) -> list[str]:
    """Problems of a training or evaluation run: flags that only --do_predict reads."""
    given = [name for name, value in vars(options.predict).items() if value is not None]
    problems = [f"--{name} works only with --do_predict" for name in given]
    num_captions = options.decoding.num_captions
    if num_captions > 1:
        problems.append(
            f"--num_captions {num_captions} works only with --do_predict: an evaluation scores one "
            "caption per pair. To sample that caption, use --decoding sampling"
        )
    return problems


def _find_run_problems(options: Options) -> list[str]:
    """Problems of a training or evaluation run: missing options, wrong task or folder."""
    run = options.run
    data = options.data
    required = {
        "output_dir": run.output_dir,
        "datatype": data.datatype,
        "data_path": data.data_path,
    }
    problems = [f"--{name} is required" for name, value in required.items() if not value]
    if data.datatype:
        problems += _find_dataset_problems(data)
    if run.task_type not in (None, options.task):
        problems.append(f"--task_type is {run.task_type}, but this script's task is {options.task}")
    if run.output_dir and os.path.isfile(run.output_dir):
        problems.append(f"--output_dir {run.output_dir} is a file, expected a folder")
    return problems


def _find_dataset_problems(data: DataOptions) -> list[str]:
    try:
        return data.open_dataset().find_problems()
    except ValueError as error:
        return [f"--datatype {data.datatype}: {error}"]


def _find_resume_problems(options: Options) -> list[str]:
    run = options.run
    model = options.model
    if run.do_eval and (model.resume_model or model.resume):
        return [
            "--resume and --resume_model continue training; "
            "to evaluate given weights, use --init_model"
        ]
    if not model.resume_model or not run.output_dir or model.resume_model.is_remote:
        return []
    state = Path(model.resume_model.reveal())
    if not os.path.isfile(state):
        return [f"--resume_model: no file {model.resume_model}"]
    if state.parent.resolve() != Path(run.output_dir).resolve():
        return [
            f"--resume_model {model.resume_model} continues the run in the folder of that file: "
            f"set --output_dir to {state.parent}"
        ]
    return []


def _find_batch_size_problems(options: Options, num_processes: int) -> list[str]:
    batch_size = options.data.batch_size
    steps = options.training.gradient_accumulation_steps
    if batch_size < 1 or steps < 1 or batch_size % (steps * num_processes) == 0:
        return []
    return [
        f"--batch_size {batch_size} is not divisible by --gradient_accumulation_steps {steps} "
        f"times {num_processes} process(es)"
    ]
