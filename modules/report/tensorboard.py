"""What TensorBoard shows of a run: losses and rates by step, scores and sample pictures by epoch."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "tensorboard"  # below a run's folder


class TensorBoardWriter:
    """Writes a run's event files. Steps count from 1; an epoch stands at its last step."""

    def __init__(self, folder: Path, done_steps: int) -> None:
        """In a run's folder; what stands there of steps after `done_steps`, by a run that broke off, is marked as void."""
        from torch.utils.tensorboard import SummaryWriter  # a second to import: for training alone

        self.writer = SummaryWriter(str(folder / FOLDER), purge_step=done_steps + 1)

    def scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Each value as `group/name`."""
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, step)

    def epoch(self, values: Mapping[str, float], samples: Image.Image, step: int) -> None:
        """An epoch's values, missing ones (NaN) left out, and picture, onto the disk at once."""
        self.scalars(
            "epoch", {name: value for name, value in values.items() if not math.isnan(value)}, step
        )
        self.writer.add_image("samples", np.asarray(samples), step, dataformats="HWC")
        self.writer.flush()
