"""Where the results of training go: the files of a run, or nowhere."""

import logging
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

from PIL import Image

from modules.report.tensorboard import TensorBoardWriter
from modules.training.checkpoints import Checkpoints
from modules.training.history import EPOCH, append_history
from modules.training.progress import Progress

log = logging.getLogger(__name__)

Tensors = Mapping[str, Any]  # `Trainer.tensors`: "model", "optimizer", "scaler"


class EpochResult(NamedTuple):
    """An epoch that has been trained and evaluated."""

    epoch: int
    values: Mapping[str, float]  # its mean loss, then its scores
    last_step: int  # of the whole training, from 1


class RunOutput(Protocol):
    """Takes what training produces. The main process keeps it, the others do not."""

    def record_step(self, number: int, values: Mapping[str, float]) -> None:
        """Record loss and speed at a step; steps count from 1 over the whole training."""

    def save_within_epoch(self, tensors: Tensors, progress: Progress, steps: int) -> None:
        """Save the state after `steps` steps of an epoch."""

    def save_trained_epoch(self, tensors: Tensors, progress: Progress) -> None:
        """Save weights and state after an epoch's last step, before its evaluation."""

    def record_epoch(
        self, result: EpochResult, progress: Progress, draw_samples: Callable[[], Image.Image]
    ) -> None:
        """Record an epoch's scores and progress; `draw_samples` draws a picture of some pairs."""


class NoOutput:
    """Keeps nothing: for all processes but the main one."""

    def record_step(self, number: int, values: Mapping[str, float]) -> None: ...

    def save_within_epoch(self, tensors: Tensors, progress: Progress, steps: int) -> None: ...

    def save_trained_epoch(self, tensors: Tensors, progress: Progress) -> None: ...

    def record_epoch(
        self, result: EpochResult, progress: Progress, draw_samples: Callable[[], Image.Image]
    ) -> None: ...


class RunFiles:
    """The main process's output: weights and states, history.csv, TensorBoard."""

    def __init__(self, checkpoints: Checkpoints, board: TensorBoardWriter) -> None:
        self.checkpoints = checkpoints
        self.board = board

    def record_step(self, number: int, values: Mapping[str, float]) -> None:
        self.board.add_scalars("step", values, number)

    def save_within_epoch(self, tensors: Tensors, progress: Progress, steps: int) -> None:
        log.info("saved %s", self.checkpoints.save_state(tensors, progress, steps))

    def save_trained_epoch(self, tensors: Tensors, progress: Progress) -> None:
        path = self.checkpoints.save_weights(tensors["model"], progress.epoch)
        self.checkpoints.save_state(tensors, progress)
        log.info("saved %s", path)

    def record_epoch(
        self, result: EpochResult, progress: Progress, draw_samples: Callable[[], Image.Image]
    ) -> None:
        append_history(self.checkpoints.folder, {EPOCH: result.epoch, **result.values})
        # Drawn first: if the run is killed between the two lines below, TensorBoard lacks an epoch.
        samples = draw_samples()
        self.checkpoints.record_evaluation(progress)
        self.board.add_epoch(result.values, samples, result.last_step)
