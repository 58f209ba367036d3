"""TODO."""

from pathlib import Path

from modules.options.groups import (
    CONTEXT_LENGTH,
    MAX_CAPTIONS,
    DataOptions,
    Options,
    TrainingOptions,
)
from system.urls import Address


def check_options(options: Options, num_processes: int) -> list[str]:
    """Everything wrong with the options that can be known before any file is opened."""
    run, data, model, training = options.run, options.data, options.model, options.training
    sources = "init_model", "resume_model", "pretrained_clip_name"
    problems = [f"--{name} is empty" for name in sources if getattr(model, name) == Address("")]
    if run.do_train + run.do_eval + run.do_predict != 1:
        tasks = (
            "--do_train, --do_eval and --do_predict"
            if options.stage == "caption"
            else "--do_train and --do_eval"
        )
        problems.append(f"give exactly one of {tasks}")
    if run.do_predict:
        return problems + _check_predict(options, num_processes) + _check_ranges(options)
    problems += [
        f"--{name} belongs to --do_predict"
        for name, value in vars(options.predict).items()
        if value not in (None, 1)
    ]
    problems += [
        f"--{name} is required"
        for name, value in (
            ("output_dir", run.output_dir),
            ("datatype", data.datatype),
            ("data_path", data.data_path),
        )
        if not value
    ]
    if data.datatype == "spot" and not data.features_path:
        problems.append("--features_path is required: the folder of Spot-the-Diff's images")
    if run.task_type not in (None, options.stage):
        problems.append(
            f"--task_type is {run.task_type}, but this script's stage is {options.stage}"
        )
    if run.fp16 and run.precision not in ("auto", "fp16"):
        problems.append(f"--fp16 contradicts --precision {run.precision}")
    problems += [
        f"--{name} {value} is a file, expected a folder"
        for name, value in (("output_dir", run.output_dir), ("image_cache", data.image_cache))
        if value and Path(value).is_file()
    ]
    if run.do_eval and (model.resume_model or model.resume):
        problems.append(
            "--resume and --resume_model continue training; to evaluate a file give --init_model"
        )
    if model.resume_model and model.resume:
        problems.append("give either --resume auto or --resume_model")
    if model.resume_force and not (model.resume_model or model.resume):
        problems.append("--resume_force belongs to --resume auto or --resume_model")
    if model.resume_model and run.output_dir and not model.resume_model.is_remote:
        folder = Path(model.resume_model.reveal()).parent
        if not Path(model.resume_model.reveal()).is_file():
            problems.append(f"--resume_model: no file {model.resume_model}")
        elif folder.resolve() != Path(run.output_dir).resolve():
            problems.append(
                f"--resume_model {model.resume_model} continues the run in its folder: give --output_dir {folder}"
            )
    return problems + _check_ranges(options) + _check_batch(data, training, num_processes)


def _check_predict(options: Options, num_processes: int) -> list[str]:
    wanted, problems = options.predict, []
    if bool(wanted.pairs) == bool(wanted.before):
        problems.append("give either --before (with --after, or a folder) or --pairs")
    if wanted.pairs and wanted.after:
        problems.append("--after goes with --before, not with --pairs")
    if wanted.predictions and Path(wanted.predictions).suffix not in (".csv", ".jsonl"):
        problems.append(
            f"--predictions {wanted.predictions}: expected a name that ends in .csv or .jsonl"
        )
    if num_processes > 1 and not wanted.predictions:
        problems.append("several processes need --predictions, a file to write into")
    if wanted.save_attention and Path(wanted.save_attention).is_file():
        problems.append(f"--save_attention {wanted.save_attention} is a file, expected a folder")
    if options.model.resume_model or options.model.resume:
        problems.append(
            "--resume and --resume_model continue training; to caption with a file give --init_model"
        )
    return problems


def decoding_problems(
    beam_size: int, num_captions: int, temperature: float | None, top_p: float | None
) -> list[str]:
    """What is wrong with the settings of decoding, each problem beginning with the setting's name."""
    problems = [
        f"{name} is {value}, expected 1 to {MAX_CAPTIONS}"
        for name, value in (("beam_size", beam_size), ("num_captions", num_captions))
        if not 1 <= value <= MAX_CAPTIONS
    ]
    if temperature is not None and not 0 < temperature < float("inf"):
        problems.append(f"temperature is {temperature}, expected a number above 0")
    if top_p is not None and not 0 < top_p <= 1:
        problems.append(f"top_p is {top_p}, expected a number in (0, 1]")
    if beam_size > 1 and (num_captions > 1 or temperature is not None or top_p is not None):
        problems.append(
            "beam_size above 1 searches, while num_captions, temperature and top_p draw: give one kind"
        )
    return problems


def _check_ranges(options: Options) -> list[str]:
    at_least_one = (
        "n_display",
        "batch_size",
        "batch_size_val",
        "epochs",
        "gradient_accumulation_steps",
        "decoder_num_hidden_layers",
        "cross_num_hidden_layers",
        "image_resolution",
    )
    at_least_zero = (
        "seed",
        "num_thread_reader",
        "intra_num_hidden_layers",
        "coef_lr",
        "length_penalty",
        "save_every_steps",
    )
    problems = []
    for name, value in options.items():
        if name in at_least_one and value is not None and value < 1:
            problems.append(f"--{name} is {value}, expected at least 1")
        if name in at_least_zero and not value >= 0:
            problems.append(f"--{name} is {value}, expected at least 0")
    training, data = options.training, options.data
    if not 3 <= data.max_words <= CONTEXT_LENGTH:
        problems.append(
            f"--max_words is {data.max_words}, expected 3 to {CONTEXT_LENGTH}, CLIP's context length"
        )
    if not 0 < training.lr < float("inf"):
        problems.append(f"--lr is {training.lr}, expected a number above 0")
    if training.warmup_proportion != -1 and not 0 <= training.warmup_proportion < 1:
        problems.append(
            f"--warmup_proportion is {training.warmup_proportion}, expected a share in [0, 1), or -1 for none"
        )
    wanted = options.predict
    problems += [
        f"--{problem}"
        for problem in decoding_problems(
            options.caption.beam_size, wanted.num_captions, wanted.temperature, wanted.top_p
        )
    ]
    if training.keep_checkpoints < -1 or training.keep_checkpoints == 0:
        problems.append(
            f"--keep_checkpoints is {training.keep_checkpoints}, expected at least 1, or -1 for all"
        )
    if training.freeze_layer_num < -1:
        problems.append(f"--freeze_layer_num is {training.freeze_layer_num}, expected -1 or more")
    return problems


def _check_batch(data: DataOptions, training: TrainingOptions, num_processes: int) -> list[str]:
    parts = training.gradient_accumulation_steps * num_processes
    if (
        data.batch_size >= 1
        and training.gradient_accumulation_steps >= 1
        and data.batch_size % parts
    ):
        return [
            f"--batch_size {data.batch_size} is not divisible by {training.gradient_accumulation_steps} accumulation step(s) "
            f"times {num_processes} process(es)"
        ]
    return []
