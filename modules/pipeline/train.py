"""Training within a run: build → restore → open the folder → fit → evaluate the best epoch."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from dataloaders.batches import Batches, build_batches
from dataloaders.pairs import ImagePair
from dataloaders.samples import ImageReader, PairSamples
from modules.options import Options
from modules.pipeline.data import Splits
from modules.pipeline.evaluate import build_evaluator, evaluate_best_epoch
from modules.pipeline.model import BuiltModel
from modules.pipeline.start import write_options
from modules.registries import OBJECTIVES
from modules.report.tensorboard import TensorBoardWriter
from modules.tokenizer import tokenize_caption
from modules.training.checkpoints import Checkpoints, import_state
from modules.training.history import read_history
from modules.training.loop import fit
from modules.training.objectives import Objective, TrainingData
from modules.training.output import NoOutput, RunFiles, RunOutput
from modules.training.progress import Progress
from modules.training.states import ResumePoint, list_complete_states, saved_epochs
from modules.training.trainer import Trainer
from modules.weights.model_info import MODEL_INFO_FILE, write_model_info
from system.run_folder import open_run_folder
from system.runtime import Runtime
from system.signals import StopSignals

log = logging.getLogger(__name__)

# The options that make a model what it is, for those who use it.
RECIPE = (
    "datatype",
    "objective",
    "epochs",
    "batch_size",
    "lr",
    "coef_lr",
    "warmup_proportion",
    "freeze_layer_num",
    "freeze_vision",
    "optimizer",
    "image_resolution",
    "seed",
)


def choose_objective(options: Options) -> type[Objective]:
    """The objective that --objective names, or --scst and the task imply.

    Raises ValueError for one that is unknown, incomplete, or of the other task.
    """
    objective = OBJECTIVES[options.objective]
    if objective.task != options.task:
        raise ValueError(
            f"--objective {options.objective} is for the {objective.task} task; "
            f"this script trains the {options.task} task"
        )
    return objective


def train(
    built: BuiltModel,
    objective_class: type[Objective],
    splits: Splits,
    data_fingerprint: str,
    images: ImageReader,
    options: Options,
    runtime: Runtime,
    stop: StopSignals,
    resume: ResumePoint | None,
) -> None:
    """Train to the last epoch, then evaluate the best one on --eval_split.

    Nothing is written into the output folder before everything is built and the state to resume
    fits.
    """
    model = built.model
    select_on = options.data.select_on
    eval_split = options.data.eval_split
    loader = _build_loader(objective_class, splits["train"], images, options, runtime)
    selector = build_evaluator(splits, images, select_on, options, runtime)
    final_evaluator = selector
    if eval_split != select_on:
        final_evaluator = build_evaluator(splits, images, eval_split, options, runtime)
    data = TrainingData(splits["train"], options.data.max_words, options.data.num_thread_reader)
    trainer = Trainer.build(
        model,
        objective_class(model, data),
        loader,
        options.training,
        options.run.seed,
        runtime,
        stop,
        train_token_embedding=_trains_token_embedding(options),
    )
    progress = Progress()
    if resume:
        trainer.restore(resume)
        progress = resume.progress
    with open_run_folder(Path(options.run.output_dir), runtime) as folder:
        if runtime.is_main:
            write_options(folder, options)
        info = {
            **model.info(options.data.max_words),
            **_describe_training(options, built.started_from),
        }
        output = _open_output(trainer, folder, data_fingerprint, info, options, runtime, resume)
        as_published = ", as in the paper" if select_on == "test" else ""
        log.info("epochs are chosen on the %s split%s", select_on, as_published)
        fit(trainer, output, progress, selector, options.run.n_display)
        evaluate_best_epoch(model, progress, final_evaluator, options, runtime)


def _build_loader(
    objective_class: type[Objective],
    pairs: Sequence[ImagePair],
    images: ImageReader,
    options: Options,
    runtime: Runtime,
) -> Batches:
    data = options.data
    micro_batches = options.training.gradient_accumulation_steps * runtime.world_size
    return build_batches(
        _build_samples(objective_class, pairs, images, options),
        data.batch_size // micro_batches,
        training=True,
        num_workers=data.num_thread_reader,
        rank=runtime.rank,
        world_size=runtime.world_size,
        seed=options.run.seed,
        for_gpu=runtime.device.type == "cuda",
    )


def _build_samples(
    objective_class: type[Objective],
    pairs: Sequence[ImagePair],
    images: ImageReader,
    options: Options,
) -> PairSamples:
    tokenize = partial(tokenize_caption, max_words=options.data.max_words)
    return objective_class.samples(pairs, images, tokenize, options.run.seed)


def check_batch_size(
    objective_class: type[Objective],
    pairs: Sequence[ImagePair],
    options: Options,
    num_processes: int,
) -> None:
    """Raise ValueError if the training pairs fill no batch, or if a batch is too small to learn.

    No image is read.
    """
    batch_size = options.data.batch_size
    steps = options.training.gradient_accumulation_steps
    fewest = objective_class.fewest_pairs
    if batch_size // steps < fewest:
        parts = f" in {steps} parts" if steps > 1 else ""
        raise ValueError(
            f"--batch_size {batch_size}{parts}: nothing can be learned from batches of fewer than "
            f"{fewest} pairs, which this objective compares with one another: use at least "
            f"--batch_size {fewest * steps}"
        )
    num_samples = len(_build_samples(objective_class, pairs, _refuse_to_read, options))
    if num_samples >= batch_size:
        return
    largest = num_samples - num_samples % (steps * num_processes)
    advice = f"use --batch_size {largest} or less"
    if largest < fewest * steps:
        advice = "that is too few to train on"
    raise ValueError(
        f"the training split has {num_samples} samples, fewer than one batch of {batch_size}: "
        f"{advice}"
    )


def _refuse_to_read(paths: Sequence[str]) -> NoReturn:
    raise AssertionError(f"images read too early: {paths}")


def _trains_token_embedding(options: Options) -> bool:
    """As published, finetuning does, except on datasets that say otherwise."""
    return options.task == "caption" and options.data.open_dataset().trains_token_embedding


def _describe_training(options: Options, started_from: str) -> dict[str, str]:
    """What model.json says of how the model came about; without paths, since it is published."""
    words = []
    for name, value in options.items():
        if name in RECIPE and value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    training = {"trained_with": " ".join(words)}
    return {"started_from": started_from, **training} if started_from else training


def _open_output(
    trainer: Trainer,
    folder: Path,
    data_fingerprint: str,
    info: Mapping[str, Any],
    options: Options,
    runtime: Runtime,
    resume: ResumePoint | None,
) -> RunOutput:
    """What this process writes into the run's folder; `info` goes into model.json."""
    if not runtime.is_main:
        return NoOutput()
    checkpoints = Checkpoints(
        folder,
        options.training.keep_checkpoints,
        dict(options.items()),
        data_fingerprint,
        info,
        is_new_run=resume is None,
    )
    done_steps = 0
    if resume:
        _continue_in(folder, resume, checkpoints)
        done_steps = _steps_before(resume.progress, trainer)
    else:
        warn_of_earlier_run(folder)
    write_model_info(folder / MODEL_INFO_FILE, info)
    return RunFiles(checkpoints, TensorBoardWriter(folder, done_steps))


def _continue_in(folder: Path, resume: ResumePoint, checkpoints: Checkpoints) -> None:
    import_state(resume, folder)
    read_history(folder)  # what is wrong with it is told now, and not after an epoch's work
    if resume.progress.epoch > 0:
        # The link may be missing, if the run was killed just before.
        checkpoints.link_best(resume.progress)


def warn_of_earlier_run(folder: Path) -> None:
    """Say what happens to an earlier run's files; model.json is replaced at once."""
    if list_complete_states(folder) or saved_epochs(folder):
        log.warning(
            "%s holds an earlier run. Its states are deleted when this run first saves, and its "
            "weights are replaced one by one; stop before that if you meant --resume auto",
            folder,
        )


def _steps_before(progress: Progress, trainer: Trainer) -> int:
    """The optimizer steps that were taken before this point of the training."""
    within_epoch = progress.batches // trainer.options.gradient_accumulation_steps
    steps = progress.trained_epochs * trainer.steps_per_epoch + within_epoch
    return min(steps, trainer.num_steps)
