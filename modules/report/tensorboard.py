"""What TensorBoard shows of a run: losses and rates by step, scores and pictures by epoch."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = "tensorboard"  # below a run's folder


class TensorBoardWriter:
    """Writes a run's event files. Steps count from 1; an epoch is logged at its last step."""

    def __init__(self, folder: Path, done_steps: int) -> None:
        """`folder` is the run's. Events of steps after `done_steps`, which a run that broke off
        may have left there, are marked as void."""
        # Late: this import takes a second, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=done_steps + 1)

    def add_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Each value as `group/name`."""
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def add_epoch(self, values: Mapping[str, float], samples: Image.Image, step: int) -> None:
        """An epoch's values without missing ones (NaN) and its picture, written at once."""
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        self.add_scalars("epoch", known, step)
        self._writer.add_image("samples", np.asarray(samples), step, dataformats="HWC")
        self._writer.flush()
