"""TODO."""

import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dataloaders.batches import Batches
from modules.clip4idc import CLIP4IDC
from modules.model.decoder import CaptionEncoderLayer
from modules.model.layers import ResidualAttentionBlock
from modules.optimization import BertAdam, parameter_groups
from modules.options import Options
from modules.report.tensorboard import TensorBoardWriter
from modules.training.freezing import freeze, freeze_unused
from modules.training.objectives import OPTIMIZER, WEIGHT_DECAY
from modules.training.objectives.contrastive import Contrastive
from modules.training.objectives.cross_entropy import CrossEntropy
from modules.training.output import RunFiles
from system.files import READ_ERRORS, error_line
from system.runtime import Runtime
from system.signals import StopSignals

log = logging.getLogger(__name__)


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
    board: TensorBoardWriter | None = None

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
        except READ_ERRORS as error:
            raise ValueError(
                f"cannot continue from {source} with these options: {error_line(error)}"
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
    training, stage = options.training, options.task
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
        step = Contrastive(model) if stage == "retrieval" else CrossEntropy(model)
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
