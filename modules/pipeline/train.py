"""TODO."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataloaders.batches import build_loader
from dataloaders.pairs import ImagePair
from dataloaders.samples import ImageReader
from modules.clip4idc import CLIP4IDC
from modules.metrics.cider_d import CiderReward
from modules.options import Options
from modules.pipeline.data import fingerprint
from modules.pipeline.evaluate import build_evaluator, report_best
from modules.report.tensorboard import TensorBoardWriter
from modules.training.loop import fit
from modules.training.objectives import SAMPLES
from modules.training.objectives.self_critical import SelfCritical
from modules.training.output import RunFiles
from modules.training.progress import Progress
from modules.training.states import ResumePoint, weights_path
from modules.training.trainer import Trainer, build_trainer
from modules.weights.model_info import MODEL_INFO_FILE, describe_model, write_model_info
from system.run_folder import open_run_folder
from system.runtime import Runtime
from system.signals import StopSignals

log = logging.getLogger(__name__)


def train(
    model: CLIP4IDC,
    splits: dict[str, Sequence[ImagePair]],
    images: ImageReader,
    options: Options,
    runtime: Runtime,
    stop: StopSignals,
    point: ResumePoint | None,
    tensors: dict[str, Any] | None,
) -> None:
    data, select_on = options.data, options.data.select_on
    samples = SAMPLES[options.task](splits["train"], images, data.max_words, options.run.seed)
    per_process = (
        data.batch_size // options.training.gradient_accumulation_steps // runtime.world_size
    )
    loader = build_loader(
        samples,
        per_process,
        True,
        data.num_thread_reader,
        runtime.rank,
        runtime.world_size,
        options.run.seed,
    )
    chooser = build_evaluator(splits, images, select_on, options, runtime)
    reporter = (
        chooser
        if data.eval_split == select_on
        else build_evaluator(splits, images, data.eval_split, options, runtime)
    )
    step = _self_critical_step(model, splits["train"], options) if options.training.scst else None
    trainer = build_trainer(model, loader, options, runtime, step, stop)
    if point:
        trainer.restore(tensors, point.path)
    progress = point.progress if point else Progress()
    with open_run_folder(Path(options.run.output_dir), runtime) as folder:
        if runtime.is_main:
            _open_files(trainer, folder, progress, fingerprint(options, splits), point)
        log.info(
            "epochs are chosen on the %s split%s",
            select_on,
            ", as in the paper" if select_on == "test" else "",
        )
        fit(trainer, folder, progress, chooser)
        report_best(model, progress, reporter, folder, options, runtime)


def _open_files(
    trainer: Trainer, folder: Path, progress: Progress, data: str, point: ResumePoint | None
) -> None:
    """Everything that the main process writes into."""
    options = trainer.options
    card = describe_model(trainer.model, options.data.max_words)
    trainer.files = RunFiles(
        folder,
        options.training.keep_checkpoints,
        dict(options.items()),
        data,
        card,
        afresh=point is None,
    )
    if point:
        trainer.files.import_state(point)
    elif weights_path(folder, "best").exists():
        log.warning(
            "%s holds an earlier run, whose files go as soon as this one saves its own; until then it can be stopped, and "
            "--resume auto continues the earlier one",
            folder,
        )
    write_model_info(folder / MODEL_INFO_FILE, card)
    done = (
        progress.trained_epochs * trainer.steps_per_epoch
        + progress.batches // options.training.gradient_accumulation_steps
    )
    trainer.board = TensorBoardWriter(folder, done)


def _self_critical_step(
    model: CLIP4IDC, scenes: Sequence[ImagePair], options: Options
) -> SelfCritical:
    captions = {scene.id: scene.captions for scene in scenes}
    captions |= {
        scene.distractor_id: scene.distractor_captions for scene in scenes if scene.distractor
    }
    names = [
        [scene.id, scene.distractor_id] if scene.distractor else [scene.id] for scene in scenes
    ]
    return SelfCritical(
        model, CiderReward(captions, options.data.num_thread_reader), names, options.data.max_words
    )
