"""The command line of both scripts: one table of flags, checked all at once, as frozen dataclasses (SPEC §2).

Imports nothing heavy, so that `--help` and wrong options answer at once. Each dataclass field is a flag of the same name.
"""

import argparse
import os
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from modules.escaping import one_line
from modules.files import short
from modules.stopping import TRY_AGAIN, StopRequested
from modules.urls import Address, redact, scrub

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
CONTEXT_LENGTH = 77
MAX_AT_ONCE = 100  # beams, or captions drawn, of a pair: memory grows with them
STAGES = ("retrieval", "caption")
# Of what torch raises as RuntimeError, what is no bug of ours: a pattern, the exit code and what to say.
FAILURES = (
    (
        re.compile(r"out of memory|can't allocate memory"),
        2,
        "out of memory: a smaller --batch_size or --batch_size_val, or more "
        "--gradient_accumulation_steps, need less",
    ),
    (
        re.compile(r"DataLoader worker .* (?:killed|exited)"),
        1,
        "a worker that reads images was ended from outside, mostly for want "
        "of memory: fewer --num_thread_reader need less",
    ),
    (
        re.compile(
            r"Connection closed by peer|Connection reset by peer|Timed out waiting|Broken pipe|Socket closed|NCCL"
        ),
        1,
        "another process is gone or hangs; its own lines say why",
    ),
)


def flag(default: Any, text: str, kind: type = str, stage: str | None = None, **more: Any) -> Any:
    """A dataclass field that is also a flag; `stage` limits it to one of the scripts."""
    return field(default=default, metadata={"help": text, "type": kind, "stage": stage, **more})


@dataclass(frozen=True)
class RunOptions:
    """What to do, where, and how exactly."""

    do_train: bool = flag(False, "train, evaluating after every epoch", bool)
    do_eval: bool = flag(False, "evaluate --init_model", bool)
    do_predict: bool = flag(False, "caption your own images", bool, stage="caption")
    output_dir: str | None = flag(None, "folder for checkpoints, log.txt and results")
    task_type: str | None = flag(None, "the script's own stage, when given at all", choices=STAGES)
    seed: int = flag(42, "seed of every random draw", int)
    precision: str = flag(
        "auto",
        "auto: bf16 or fp16 on a GPU, whichever it has, fp32 elsewhere",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    fp16: bool = flag(False, "old name of --precision fp16", bool)
    local_rank: int | None = flag(
        None, "set by old launchers; torchrun sets the environment instead", int
    )
    n_display: int = flag(100, "steps between two lines of the log", int)
    deterministic: bool = flag(
        False,
        "refuse computations that come out a little differently each time (GPUs have such)",
        bool,
    )


@dataclass(frozen=True)
class DataOptions:
    """Which pairs, and how they are read."""

    datatype: str | None = flag(
        None, "dataset; pairs: a table of your own", choices=("spot", "clevr", "pairs")
    )
    data_path: str | None = flag(
        None,
        "folder of the annotations (CLEVR-Change's images lie below it), or the table of pairs",
    )
    features_path: str | None = flag(None, "folder of Spot-the-Diff's images")
    max_words: int = flag(20, "tokens of a caption, special ones included", int)
    image_cache: str | None = flag(
        None,
        "folder that keeps the resized images, so that they are decoded once and not every epoch",
    )
    on_bad_image: str = flag(
        "error",
        "an image that is missing or cannot be decoded ends the run, or its pair is left out",
        choices=("error", "skip"),
    )
    num_thread_reader: int = flag(
        1, "worker processes that read images, and with --scst as many that score", int
    )
    batch_size: int = flag(256, "global training batch, divided over the processes", int)
    batch_size_val: int = flag(3500, "evaluation batch of each process", int)
    eval_split: str = flag("test", "split that results are reported on", choices=("test", "val"))
    select_on: str = flag(
        "test",
        "split that chooses the best epoch; the paper used test, val is the sound choice",
        choices=("test", "val"),
    )


@dataclass(frozen=True)
class ModelOptions:
    """Where the weights come from, and what their shapes cannot say."""

    init_model: Address | None = flag(
        None,
        "weights to start from: a file or folder, as given or below ckpts/, an address "
        "(https://, s3://), or owner/name on the Hugging Face hub",
        Address,
    )
    resume: str | None = flag(
        None,
        "auto: continue the run in --output_dir from its newest sound state, or begin it",
        choices=("auto",),
    )
    resume_model: Address | None = flag(
        None,
        "continue from this pytorch_model.bin.<epoch> or "
        "training_state.bin.<epoch>[.<steps>]: a file in --output_dir, or an address",
        Address,
    )
    resume_force: bool = flag(
        False, "continue although options have changed that change what comes out", bool
    )
    pretrained_clip_name: Address = flag(
        Address("ViT-B/32"),
        "CLIP: a name of OpenAI's, whatever --init_model takes, or a .json "
        "of sizes for random weights",
        Address,
    )
    quick_gelu: bool = flag(
        False,
        "vouch for CLIP weights that do not say it: they were trained with the quick GELU",
        bool,
    )
    image_resolution: int | None = flag(
        None, "side of the images, where not the weights': position embeddings are resized", int
    )
    cache_dir: str | None = flag(None, "folder for downloads (default: the user's cache folder)")
    intra_num_hidden_layers: int = flag(9, "vision blocks that see each image alone", int)
    linear_patch: str = flag(
        "2d", "patches from each image (2d) or from both as two frames (3d)", choices=("2d", "3d")
    )
    decoder_model: str = flag(
        "decoder-base", "captioner's config: a name below modules/, a folder or a file"
    )
    decoder_num_hidden_layers: int | None = flag(
        None, "captioner's layers, instead of the config's", int
    )
    cross_model: str = flag(
        "cross-base", "cross encoder's config: a name below modules/, a folder or a file"
    )
    cross_num_hidden_layers: int | None = flag(
        None, "cross encoder's layers, instead of the config's", int
    )
    sim_header: str = flag(
        "loose",
        "similarity: cosine (loose) or cross encoder (tight)",
        stage="retrieval",
        choices=("loose", "tight"),
    )


@dataclass(frozen=True)
class TrainingOptions:
    """Optimisation."""

    epochs: int = flag(20, "passes over the training split", int)
    lr: float = flag(1e-4, "peak learning rate", float)
    coef_lr: float = flag(1.0, "factor on the learning rate inside CLIP", float)
    warmup_proportion: float = flag(0.1, "share of the steps that warm up; -1 for none", float)
    gradient_accumulation_steps: int = flag(1, "parts that a batch is worked off in", int)
    freeze_layer_num: int = flag(0, "freeze CLIP below this block; -1 freezes nothing", int)
    freeze_vision: bool = flag(
        False, "leave the whole vision tower as the adaptation made it", bool, stage="caption"
    )
    optimizer: str = flag(
        "bertadam",
        "bertadam, as published, or adamw: bias correction, and no clip of each parameter's gradient",
        choices=("bertadam", "adamw"),
    )
    scst: bool = flag(
        False,
        "self-critical training: raise the CIDEr of a captioner that has learned already",
        bool,
        stage="caption",
    )
    save_every_steps: int = flag(
        0, "steps after which to save also within an epoch; 0: at its end alone", int
    )
    keep_checkpoints: int = flag(
        2, "newest states and weights kept, beside the best weights; -1 keeps all", int
    )
    compile: bool = flag(
        False,
        "torch.compile the transformer blocks; gains little on CPUs (benchmarks/README.md)",
        bool,
    )


@dataclass(frozen=True)
class CaptionOptions:
    """Decoding and scoring."""

    gt_dir: str = flag(
        "gt", "folder of <datatype>_total_change_captions_reformat.json", stage="caption"
    )
    beam_size: int = flag(1, "beams of the decoding; 1 is greedy", int, stage="caption")
    length_penalty: float = flag(
        0.0, "beams compare log-probability / length ** this", float, stage="caption"
    )


@dataclass(frozen=True)
class PredictOptions:
    """Your own images, with --do_predict."""

    before: str | None = flag(None, "an image, or a folder of them", stage="caption")
    after: str | None = flag(
        None,
        "an image, or a folder; without it --before is a folder of x.png and x_2.png",
        stage="caption",
    )
    pairs: str | None = flag(
        None, "table of pairs, .csv or .jsonl: before, after, optional id", stage="caption"
    )
    predictions: str | None = flag(
        None, "file to write, .csv or .jsonl; a broken run goes on with it", stage="caption"
    )
    num_captions: int = flag(
        1, "captions of each pair; above 1 they are drawn", int, stage="caption"
    )
    temperature: float | None = flag(
        None, "draw words, logits divided by this", float, stage="caption"
    )
    top_p: float | None = flag(
        None,
        "draw words, of the likeliest that together reach this probability",
        float,
        stage="caption",
    )
    save_attention: str | None = flag(
        None, "folder for pictures of where the model looked", stage="caption"
    )


@dataclass(frozen=True)
class Options:
    """Every option of a run, checked."""

    stage: str
    run: RunOptions
    data: DataOptions
    model: ModelOptions
    training: TrainingOptions
    caption: CaptionOptions
    predict: PredictOptions
    ignored: tuple[str, ...] = ()

    def items(self, changed: bool | None = None) -> list[tuple[str, Any]]:
        """Name and value of every option of this stage and task; of those alone that are changed, or are not, from the default.

        They are for people and files: addresses are without what may be secret in them.
        """
        parts = (getattr(self, name) for name in GROUPS if name != "predict" or self.run.do_predict)
        found = [
            (f, getattr(part, f.name))
            for part in parts
            for f in fields(part)
            if _belongs(f, self.stage)
        ]
        return [
            (f.name, _as_shown(value))
            for f, value in found
            if changed is None or (value != f.default) == changed
        ]


def _as_shown(value: Any) -> Any:
    """An option's value for people and files."""
    if isinstance(value, Address):
        return str(value)
    return redact(value) if isinstance(value, str) else value


GROUPS: dict[str, type] = {
    "run": RunOptions,
    "data": DataOptions,
    "model": ModelOptions,
    "training": TrainingOptions,
    "caption": CaptionOptions,
    "predict": PredictOptions,
}


class OneLineParser(argparse.ArgumentParser):
    """argparse whose complaints are one line, in which no secret of an address stands, whatever option it was given to."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> Any:
        """As argparse's; what looks like an address in any word is known as one from here on."""
        words = sys.argv[1:] if args is None else args
        for word in words:
            Address(word.partition("=")[2] if word.startswith("-") else word)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        line = one_line(scrub(" ".join(message.split())))
        self.exit(2, f"{self.prog}: {line} (--help lists the options)\n")


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
        _add_flags(parser.add_argument_group((group.__doc__ or "").rstrip(".")), group, stage)
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


def _belongs(f: Any, stage: str) -> bool:
    return f.metadata["stage"] in (None, stage)


def _add_flags(parser: argparse._ArgumentGroup, group: type, stage: str) -> None:
    for f in fields(group):
        if not _belongs(f, stage):
            continue
        settings = {"help": f.metadata["help"], "default": f.default}
        if f.metadata["type"] is bool:
            settings["action"] = "store_true"
        else:
            settings.update(type=f.metadata["type"], choices=f.metadata.get("choices"))
        names = ["--local_rank", "--local-rank"] if f.name == "local_rank" else [f"--{f.name}"]
        parser.add_argument(*names, **settings)


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
        f"{name} is {value}, expected 1 to {MAX_AT_ONCE}"
        for name, value in (("beam_size", beam_size), ("num_captions", num_captions))
        if not 1 <= value <= MAX_AT_ONCE
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


def run_and_report(script: str, job: Any) -> int:
    """Run `job()`; what a user can cause (ValueError, OSError, want of memory) becomes one line on stderr and exit code 2, Ctrl-C
    130, a training that was asked to stop 75, and the loss of another process 1. The traceback of a bug has no secrets in it."""
    sys.excepthook = _print_scrubbed
    try:
        job()
    except StopRequested:
        print(
            f"{script}: stopped as asked; the same command with --resume auto goes on",
            file=sys.stderr,
        )
        raise SystemExit(TRY_AGAIN) from None
    except KeyboardInterrupt:
        print(f"{script}: interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # who reads our output has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except (ValueError, OSError) as error:
        _complain(script, str(error))
        raise SystemExit(2) from None
    except MemoryError:
        _complain(script, FAILURES[0][2])
        raise SystemExit(2) from None
    except RuntimeError as error:
        for pattern, code, text in FAILURES:
            if pattern.search(str(error)):
                _complain(script, f"{text} ({short(error)})")
                raise SystemExit(code) from None
        raise
    return 0


def _print_scrubbed(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    print(scrub("".join(traceback.format_exception(kind, error, trace))), file=sys.stderr, end="")


def _complain(script: str, text: str) -> None:
    rank = os.environ.get("RANK", "0")
    who = script if rank == "0" else f"{script} (process {rank})"
    print(f"{who}: {one_line(scrub(' '.join(text.split())))}", file=sys.stderr)
