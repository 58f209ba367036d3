"""A model with everything that trains it: objective, optimizer, gradient scaler, data."""

import contextlib
import logging
import math
import os
import shutil
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dataloaders.batches import Batches
from modules.clip4idc import CLIP4IDC
from modules.optimization import BertAdam, parameter_groups
from modules.options.groups import TrainingOptions
from modules.training.freezing import freeze, freeze_unused
from modules.training.objectives import Objective, Recipe
from modules.training.states import ResumePoint
from system.escaping import summarize_error
from system.files import READ_ERRORS
from system.runtime import Runtime
from system.signals import StopSignals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trainer:
    """Takes the steps of a training; `build` makes it, `loop.fit` runs it."""

    model: CLIP4IDC
    objective: nn.Module  # wrapped for several processes
    recipe: Recipe
    optimizer: BertAdam
    scaler: torch.amp.GradScaler
    loader: Batches
    options: TrainingOptions
    seed: int
    runtime: Runtime
    stop: StopSignals

    @classmethod
    def build(
        cls,
        model: CLIP4IDC,
        objective: Objective,
        loader: Batches,
        options: TrainingOptions,
        seed: int,
        runtime: Runtime,
        stop: StopSignals,
        train_token_embedding: bool = False,
    ) -> "Trainer":
        """Freeze, move to the device, make the optimizer, compile, wrap for several processes.

        With `train_token_embedding` the token embedding learns even if early parts are frozen.
        Raises ValueError if an epoch has no step, or if the options do not fit the model.
        """
        _freeze(model, options, train_token_embedding)
        model.to(runtime.device)
        optimizer = _build_optimizer(model, objective.recipe, options, loader)
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        if options.compile:
            compile_blocks(model)
        trainer = cls(
            model=model,
            objective=_wrap(objective, runtime),
            recipe=objective.recipe,
            optimizer=optimizer,
            scaler=scaler,
            loader=loader,
            options=options,
            seed=seed,
            runtime=runtime,
            stop=stop,
        )
        trainer._log_sizes()
        return trainer

    @property
    def steps_per_epoch(self) -> int:
        """Steps of a whole epoch; an incomplete accumulation at its end does not count."""
        return _count_steps_per_epoch(self.loader, self.options)

    @property
    def num_steps(self) -> int:
        """Steps of the whole training: --epochs, or fewer with --max_steps."""
        return _count_steps(self.loader, self.options)

    @property
    def num_epochs(self) -> int:
        """Epochs of the whole training; --max_steps may cut the last one short."""
        return math.ceil(self.num_steps / self.steps_per_epoch)

    @property
    def patience(self) -> int:
        """Epochs in a row without a better score that end the training; 0: never."""
        if self.options.patience is not None:
            return self.options.patience
        return self.recipe.patience or 0

    def name_epoch(self, epoch: int) -> str:
        """An epoch's name in the log: people count from 1, files from 0."""
        return f"epoch {epoch + 1}/{self.num_epochs}"

    def count_steps_in(self, epoch: int) -> int:
        """Steps of an epoch of this training."""
        return min(self.steps_per_epoch, self.num_steps - epoch * self.steps_per_epoch)

    def backward(self, batch: dict[str, Any], is_last_micro_batch: bool) -> Tensor:
        """Add a batch's gradients to those of the step; returns its scalar loss, detached.

        Processes exchange gradients only at the last micro-batch of a step.
        """
        tensors = {
            name: value.to(self.runtime.device, non_blocking=True)
            for name, value in batch.items()
            if isinstance(value, Tensor)
        }
        with self._gradient_exchange(is_last_micro_batch):
            with self.runtime.autocast():
                loss = self.objective(tensors)
            scaled_loss = loss / self.options.gradient_accumulation_steps
            self.scaler.scale(scaled_loss).backward()
        return loss.detach()

    def _gradient_exchange(self, is_due: bool) -> contextlib.AbstractContextManager:
        """A context in which backward exchanges gradients between processes only if due."""
        if self.runtime.world_size == 1 or is_due:
            return contextlib.nullcontext()
        return self.objective.no_sync()

    def step(self) -> bool:
        """Take one optimizer step; False if gradients are not finite and nothing was updated."""
        scale = self.scaler.get_scale()
        skipped = self.optimizer.skipped_steps
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.discard_gradients()
        if self.scaler.get_scale() < scale or self.optimizer.skipped_steps > skipped:
            return False
        self.model.clamp_logit_scale()
        return True

    def discard_gradients(self) -> None:
        """Discard the gradients of a step, or of an incomplete accumulation."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Any]:
        """Everything that training changes, as `restore` expects it."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, resume: ResumePoint) -> None:
        """Continue from a state. Raises ValueError if it does not fit these options."""
        tensors = resume.tensors()
        try:
            self.model.load_state_dict(tensors["model"])
            self.optimizer.load_state_dict(tensors["optimizer"])
            self.scaler.load_state_dict(tensors["scaler"])
        except READ_ERRORS as error:
            raise ValueError(
                f"cannot continue from {resume.path} with these options: {summarize_error(error)}"
            ) from None

    def _log_sizes(self) -> None:
        all_parameters = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for group in self.optimizer.param_groups for p in group["params"])
        log.info(
            "%.1f M parameters, %.1f M of them trained; %d steps in %d epochs",
            all_parameters / 1e6,
            trained / 1e6,
            self.num_steps,
            self.num_epochs,
        )


def _freeze(model: CLIP4IDC, options: TrainingOptions, train_token_embedding: bool) -> None:
    freeze(model, options.freeze_layer_num, train_token_embedding)
    freeze_unused(model)
    if options.freeze_vision:
        model.backbone.vision_tower().requires_grad_(False)


def _build_optimizer(
    model: CLIP4IDC, recipe: Recipe, options: TrainingOptions, loader: Batches
) -> BertAdam:
    """The recipe's BertAdam, or AdamW; the schedule counts the steps that really happen."""
    groups = parameter_groups(model, options.lr, options.coef_lr, recipe.weight_decay)
    num_steps = _count_steps(loader, options)
    if num_steps == 0:
        raise ValueError(
            f"an epoch has {len(loader)} batches, fewer than --gradient_accumulation_steps "
            f"{options.gradient_accumulation_steps}: no step would ever be taken"
        )
    adamw = {}
    if options.optimizer == "adamw":
        adamw = {"bias_correction": True, "max_grad_norm": 0.0}
    return BertAdam(
        groups,
        lr=options.lr,
        warmup=options.warmup_proportion,
        t_total=num_steps,
        max_global_norm=1.0,
        schedule=recipe.schedule,
        betas=recipe.betas,
        eps=recipe.eps,
        **adamw,
    )


def _count_steps_per_epoch(loader: Batches, options: TrainingOptions) -> int:
    return len(loader) // options.gradient_accumulation_steps


def _count_steps(loader: Batches, options: TrainingOptions) -> int:
    steps = _count_steps_per_epoch(loader, options) * options.epochs
    return steps if options.max_steps is None else min(steps, options.max_steps)


def _wrap(objective: Objective, runtime: Runtime) -> nn.Module:
    if runtime.world_size == 1:
        return objective
    devices = [runtime.device] if runtime.device.type == "cuda" else None
    return DistributedDataParallel(objective, device_ids=devices)


def compile_blocks(model: CLIP4IDC) -> None:
    """torch.compile the model's `compilable_blocks`; the names of parameters do not change.

    Raises ValueError if there is no C++ compiler.
    """
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++", "cl")
    if not any(shutil.which(compiler) for compiler in compilers):
        raise ValueError(
            "--compile needs a C++ compiler (g++, clang++ or cl), and none was found on the PATH"
        )
    for block in model.compilable_blocks():
        block.compile()
