"""What TensorBoard shows of a run: losses and rates by step, scores and pictures by epoch."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from system.escaping import name_as_text

log = logging.getLogger(__name__)

FOLDER = "tensorboard"  # below a run's folder


class TensorBoardWriter:
    """Writes a run's event files. Steps count from 1; an epoch is logged at its last step."""

    def __init__(self, folder: Path, done_steps: int) -> None:
        """`folder` is the run's. Events of steps after `done_steps`, which a run that broke off
        may have left there, are marked as void. TensorBoard cannot write below a folder whose name
        is not UTF-8: a warning says so, and nothing is written."""
        self._writer = None
        if name_as_text(folder) != str(folder):
            log.warning("%s is not UTF-8: nothing is written for TensorBoard", folder)
            return
        # Late: this import takes a second, and only training needs it.
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=done_steps + 1)

    def add_scalars(self, group: str, values: Mapping[str, float], step: int) -> None:
        """Each value as `group/name`."""
        if self._writer is None:
            return
        for name, value in values.items():
            self._writer.add_scalar(f"{group}/{name}", value, step)

    def add_epoch(self, values: Mapping[str, float], samples: Image.Image, step: int) -> None:
        """An epoch's values without missing ones (NaN) and its picture, written at once."""
        known = {name: value for name, value in values.items() if not math.isnan(value)}
        self.add_scalars("epoch", known, step)
        if self._writer is None:
            return
        self._writer.add_image("samples", np.asarray(samples), step, dataformats="HWC")
        self._writer.flush()
