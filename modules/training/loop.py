"""Training of either stage: steps, epochs, evaluation after each, the best one kept (SPEC §5, §6)."""

import contextlib
import logging
import math
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from modules.clip4idc import CLIP4IDC
from modules.model.clip import MAX_LOG_SCALE
from modules.training.monitors import NonFiniteGuard, StepLogger
from modules.training.objectives import PATIENCE
from modules.training.output import append_history
from modules.training.progress import Progress
from modules.training.states import HISTORY_FILE, weights_path
from modules.training.trainer import Trainer
from system.signals import StopRequested

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Evaluates one split, epoch after epoch. What it tells of the latest evaluation is the main process' alone."""

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        """The score that chooses epochs, and all scores; `label` names the epoch in files."""

    def samples(self) -> Image.Image:
        """Some pairs of the latest evaluation, the same in every epoch, with what the model made of them."""

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        """Write report.html of the latest evaluation."""


def fit(trainer: Trainer, folder: Path, progress: Progress, evaluator: Evaluator) -> None:
    """Train to the last epoch or until the patience ends; every epoch is saved, evaluated and judged. `progress` moves on.

    Raises StopRequested once all is saved that a signal asked to save.
    """
    options, runtime = trainer.options, trainer.runtime
    patience = PATIENCE[options.task]
    for epoch in range(progress.epoch, options.training.epochs):
        if patience is not None and progress.epochs_without >= patience:
            log.info("stopping: %d epochs in a row brought nothing better", patience)
            break
        if progress.unjudged_loss is None:
            with trainer.stop.deferred():
                progress.finish_epoch(train_epoch(trainer, progress))
                if runtime.is_main:
                    trainer.files.save_weights(trainer.model, epoch)
                    trainer.files.save_state(trainer.tensors(), progress)
                    log.info(
                        "epoch %d: mean loss %.4f, at most %s of memory, saved %s",
                        epoch,
                        progress.unjudged_loss,
                        runtime.peak_memory(),
                        weights_path(folder, epoch),
                    )
        loss = progress.unjudged_loss
        trainer.model.eval()
        score, scores = evaluator(trainer.model, str(epoch), folder)
        with trainer.stop.deferred():
            is_best = progress.judge(epoch, score)
            if runtime.is_main:
                append_history(
                    folder / HISTORY_FILE,
                    {"epoch": epoch, "loss": loss, **scores},
                    fresh=epoch == 0,
                )
                trainer.files.save_progress(progress)
                trainer.board.epoch(
                    {"loss": loss, **scores},
                    evaluator.samples(),
                    (epoch + 1) * trainer.steps_per_epoch,
                )
                log.info(
                    "epoch %d: %s",
                    epoch,
                    f"the best so far, {score:.4f}"
                    if is_best
                    else "not judged, the score that chooses is missing"
                    if math.isnan(score)
                    else f"{progress.epochs_without} epoch(s) in a row without a better score than {progress.best_score:.4f}",
                )


def train_epoch(trainer: Trainer, progress: Progress) -> float:
    """What is left of `progress.epoch`; returns the mean of its finite losses, over all batches and processes."""
    runtime, training = trainer.runtime, trainer.options.training
    accumulation, every = training.gradient_accumulation_steps, training.save_every_steps
    trainer.step.train()
    trainer.loader.set_epoch(progress.epoch, progress.batches)
    meter, watch = StepLogger(trainer, progress.epoch), NonFiniteGuard(progress, runtime)
    losses = torch.tensor(
        progress.losses_for_rank(runtime.rank, runtime.world_size), device=runtime.device
    )  # sum and count
    for number, batch in enumerate(
        runtime.progress(trainer.loader, f"epoch {progress.epoch}"), progress.batches
    ):
        runtime.seed(
            trainer.options.run.seed, progress.epoch, number
        )  # dropout depends on the place in the run alone
        watch.ids += batch["id"]
        batch = {
            name: value.to(runtime.device, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        complete = (number + 1) % accumulation == 0
        loss = _backward(trainer, batch, accumulation, complete)
        losses += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()])
        if complete:
            watch.check(_optimizer_step(trainer), loss)
        meter.after_batch(number, loss, complete)
        steps = (number + 1) // accumulation
        if complete and steps < trainer.steps_per_epoch:
            stop = runtime.any(trainer.stop.requested)
            if stop or (every and steps % every == 0):
                progress.batches = number + 1
                progress.losses = runtime.gather_objects(losses.tolist())
                if runtime.is_main:
                    log.info(
                        "saved %s", trainer.files.save_state(trainer.tensors(), progress, steps)
                    )
            if stop:
                raise StopRequested
    trainer.optimizer.zero_grad(set_to_none=True)  # an incomplete accumulation is discarded
    total, count = runtime.all_sum(losses).tolist()
    if not count:
        raise ValueError(
            f"no batch of epoch {progress.epoch} had a finite loss: try a lower --lr, or --precision fp32"
        )
    return total / count


def _backward(
    trainer: Trainer, batch: dict[str, Tensor], accumulation: int, complete: bool
) -> Tensor:
    waiting = trainer.runtime.world_size > 1 and not complete
    with trainer.step.no_sync() if waiting else contextlib.nullcontext():
        with trainer.runtime.autocast():
            loss = trainer.step(batch)
        trainer.scaler.scale(loss / accumulation).backward()
    return loss.detach()


def _optimizer_step(trainer: Trainer) -> bool:
    """One step; False where the gradients are not finite and nothing has moved."""
    scale, skipped = trainer.scaler.get_scale(), trainer.optimizer.skipped
    trainer.scaler.step(trainer.optimizer)
    trainer.scaler.update()
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.scaler.get_scale() < scale or trainer.optimizer.skipped > skipped:
        return False
    with torch.no_grad():
        trainer.model.clip.logit_scale.clamp_(max=MAX_LOG_SCALE)
    return True
