"""Training of either stage: steps, epochs, evaluation after each, the best one kept (SPEC §5, §6)."""

import contextlib
import logging
import math
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataloaders.pairs import Batches
from modules.checkpoint import HISTORY, Progress, RunFiles, weights_path
from modules.clip import MAX_LOG_SCALE
from modules.clip4idc import CLIP4IDC
from modules.decoder import CaptionEncoderLayer
from modules.evaluation import Evaluator
from modules.files import DAMAGED, short, written_at_once
from modules.layers import ResidualAttentionBlock
from modules.optimization import BertAdam, freeze, freeze_unused, parameter_groups
from modules.options import Options
from modules.runtime import Runtime
from modules.stages import OPTIMIZER, PATIENCE, WEIGHT_DECAY, AdaptationStep, FinetuningStep
from modules.stopping import StopRequested, StopSignals
from modules.tensorboard import Board

log = logging.getLogger(__name__)

MAX_SKIPPED = 25  # steps in a row without finite gradients, after which training ends
IDS_SHOWN = 8  # of a batch in such a step's line


@dataclass
class Trainer:
    """A model with all that moves it: build with `build_trainer`."""

    model: CLIP4IDC
    step: nn.Module  # the stage's loss, wrapped for several processes
    optimizer: BertAdam
    scaler: torch.amp.GradScaler
    loader: Batches
    runtime: Runtime
    options: Options
    stop: StopSignals = field(default_factory=StopSignals)
    files: RunFiles | None = None  # on the main process, once the run has a folder, like the board
    board: Board | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps; an incomplete accumulation is none."""
        return len(self.loader) // self.options.training.gradient_accumulation_steps

    def tensors(self) -> dict[str, Any]:
        """All that training moves."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: Mapping[str, Any], source: Path) -> None:
        """Take over what `tensors` gave. ValueError where it does not fit these options."""
        try:
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(tensors["optimizer"])
            self.scaler.load_state_dict(tensors["scaler"])
        except DAMAGED as error:
            raise ValueError(
                f"cannot continue from {source} with these options: {short(error)}"
            ) from None


def build_trainer(
    model: CLIP4IDC,
    loader: Batches,
    options: Options,
    runtime: Runtime,
    step: nn.Module | None = None,
    stop: StopSignals | None = None,
) -> Trainer:
    """Freeze, group, wrap. t_total counts the optimizer steps that really happen. `step`: another loss than the stage's own."""
    training, stage = options.training, options.stage
    freeze(
        model,
        training.freeze_layer_num,
        train_token_embedding=stage == "caption" and options.data.datatype != "clevr",
    )
    freeze_unused(model)
    if training.freeze_vision:
        model.clip.visual.requires_grad_(False)
    model.to(runtime.device)
    groups = parameter_groups(model, training.lr, training.coef_lr, WEIGHT_DECAY[stage])
    t_total = len(loader) // training.gradient_accumulation_steps * training.epochs
    if t_total == 0:
        raise ValueError(
            f"an epoch has {len(loader)} batches, fewer than --gradient_accumulation_steps "
            f"{training.gradient_accumulation_steps}: no step would ever be taken"
        )
    adamw = {"bias_correction": True, "max_grad_norm": 0.0} if training.optimizer == "adamw" else {}
    optimizer = BertAdam(
        groups,
        lr=training.lr,
        warmup=training.warmup_proportion,
        t_total=t_total,
        max_total_norm=1.0,
        **OPTIMIZER[stage],
        **adamw,
    )
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
    if training.compile:
        compile_blocks(model)
    if step is None:
        step = AdaptationStep(model) if stage == "retrieval" else FinetuningStep(model)
    if runtime.world_size > 1:
        step = DistributedDataParallel(
            step, device_ids=[runtime.device] if runtime.device.type == "cuda" else None
        )
    learning = sum(p.numel() for group in groups for p in group["params"])
    log.info(
        "%.1f M parameters, %.1f M of them learn; %d steps in %d epochs",
        sum(p.numel() for p in model.parameters()) / 1e6,
        learning / 1e6,
        t_total,
        training.epochs,
    )
    return Trainer(model, step, optimizer, scaler, loader, runtime, options, stop or StopSignals())


def compile_blocks(model: CLIP4IDC) -> None:
    """torch.compile CLIP's blocks and the captioner's encoder layers, each kind once; all names stay. The decoder's layers are
    left as they are: they are small, and captioning calls them at another length for each word. Raises ValueError without a
    C++ compiler."""
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++", "cl"))):
        raise ValueError(
            "--compile needs a C++ compiler (g++, clang++ or cl), and none is found on the PATH"
        )
    for part in model.modules():
        if isinstance(part, ResidualAttentionBlock | CaptionEncoderLayer):
            part.compile()


def fit(trainer: Trainer, folder: Path, progress: Progress, evaluator: Evaluator) -> None:
    """Train to the last epoch or until the patience ends; every epoch is saved, evaluated and judged. `progress` moves on.

    Raises StopRequested once all is saved that a signal asked to save.
    """
    options, runtime = trainer.options, trainer.runtime
    patience = PATIENCE[options.stage]
    for epoch in range(progress.epoch, options.training.epochs):
        if patience is not None and progress.epochs_without >= patience:
            log.info("stopping: %d epochs in a row brought nothing better", patience)
            break
        if progress.unjudged_loss is None:
            with trainer.stop.finishing():
                progress.end_epoch(train_epoch(trainer, progress))
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
        with trainer.stop.finishing():
            is_best = progress.judge(epoch, score)
            if runtime.is_main:
                _append_history(
                    folder / HISTORY, {"epoch": epoch, "loss": loss, **scores}, fresh=epoch == 0
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
    meter, watch = _Meter(trainer, progress.epoch), _NumbersWatch(progress, runtime)
    losses = torch.tensor(
        progress.losses_of(runtime.rank, runtime.world_size), device=runtime.device
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
            watch.after_step(_update(trainer), loss)
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
    total, count = runtime.total(losses).tolist()
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


def _update(trainer: Trainer) -> bool:
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


class _NumbersWatch:
    """Counts steps that were skipped since their gradients were not finite, and ends a training that has no others."""

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        self.progress, self.runtime, self.in_a_row = progress, runtime, 0
        self.ids: list[str] = []  # of the step's batches, on this process

    def after_step(self, taken: bool, loss: Tensor) -> None:
        """ValueError after MAX_SKIPPED in a row."""
        own, self.ids = self.ids, []
        if taken:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        self.progress.skipped += 1
        ids = sum(self.runtime.gather_objects(own), [])
        more = f" and {len(ids) - IDS_SHOWN} more" if len(ids) > IDS_SHOWN else ""
        log.warning(
            "epoch %d: a step is skipped, its gradients are not finite (loss %s; %d in a row, %d in all): %s%s",
            self.progress.epoch,
            loss.item(),
            self.in_a_row,
            self.progress.skipped,
            ", ".join(ids[:IDS_SHOWN]),
            more,
        )
        if self.in_a_row >= MAX_SKIPPED:
            raise ValueError(
                f"{MAX_SKIPPED} steps in a row had no finite gradients; the weights stand as they were before: look "
                "at the pairs named above, or try a lower --lr, or --precision fp32"
            )


class _Meter:
    """A log line every n_display steps: loss, rate, seconds a step, pairs a second."""

    def __init__(self, trainer: Trainer, epoch: int) -> None:
        self.trainer, self.epoch = trainer, epoch
        self.since, self.batches, self.losses = time.perf_counter(), 0, 0.0

    def after_batch(self, number: int, loss: Tensor, complete: bool) -> None:
        self.batches += 1
        self.losses = self.losses + loss
        accumulation = self.trainer.options.training.gradient_accumulation_steps
        steps = (number + 1) // accumulation
        if not complete or steps % self.trainer.options.run.n_display:
            return
        runtime = self.trainer.runtime
        mean = (runtime.total(self.losses) / runtime.world_size / self.batches).item()
        seconds = time.perf_counter() - self.since
        pairs = self.batches * self.trainer.loader.loader.batch_size * runtime.world_size
        rate = self.trainer.optimizer.learning_rate()
        log.info(
            "epoch %d step %d/%d  loss %.4f  lr %.3e  %.3f s/step  %.1f pairs/s",
            self.epoch,
            steps,
            self.trainer.steps_per_epoch,
            mean,
            rate,
            seconds * accumulation / self.batches,
            pairs / seconds,
        )
        if self.trainer.board:
            done = self.epoch * self.trainer.steps_per_epoch + steps
            self.trainer.board.scalars(
                "step",
                {"loss": mean, "learning_rate": rate, "pairs_per_second": pairs / seconds},
                done,
            )
        self.since, self.batches, self.losses = time.perf_counter(), 0, 0.0


def _append_history(path: Path, row: dict[str, float], fresh: bool) -> None:
    rows = [] if fresh or not path.is_file() else pd.read_csv(path).to_dict("records")
    rows = [old for old in rows if old["epoch"] < row["epoch"]] + [row]
    with written_at_once(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
