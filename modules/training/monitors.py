"""What a training epoch keeps an eye on: its mean loss, non-finite gradients, and its speed."""

import logging
import time

import torch
from torch import Tensor

from modules.training.output import RunOutput
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from system.runtime import Runtime

log = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 25  # in a row, after which training ends
MAX_IDS_LOGGED = 8  # of the pairs of a skipped step


class EpochLoss:
    """The sum and the number of an epoch's finite losses."""

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        self.epoch = progress.epoch
        self.runtime = runtime
        saved = progress.losses_for_rank(runtime.rank, runtime.world_size)
        self._sum_and_count = torch.tensor(saved, device=runtime.device)

    def add(self, loss: Tensor) -> None:
        """A batch's loss (), which a GPU may still be computing."""
        self._sum_and_count += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()])

    def of_each_process(self) -> list[list[float]]:
        """[sum, count] by rank, as `Progress.losses` keeps them."""
        return self.runtime.gather_objects(self._sum_and_count.tolist())

    def mean(self) -> float:
        """Over all processes. Raises ValueError if no loss was finite."""
        total, count = self.runtime.sum_over_processes(self._sum_and_count).tolist()
        if not count:
            raise ValueError(
                f"no batch of epoch {self.epoch} had a finite loss: try a lower --lr, "
                "or --precision fp32"
            )
        return total / count


class NonFiniteGuard:
    """Counts the steps that are skipped because of non-finite gradients; too many end the run."""

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        self.progress = progress
        self.runtime = runtime
        self.consecutive = 0
        self._ids: list[str] = []  # of the next step's pairs, on this process

    def add_ids(self, ids: list[str]) -> None:
        """The ids of pairs that the next step learns from."""
        self._ids += ids

    def check(self, taken: bool, loss: Tensor) -> None:
        """After each step. Raises ValueError after MAX_NONFINITE_STEPS skipped ones in a row."""
        ids = self._ids
        self._ids = []
        if taken:
            self.consecutive = 0
            return
        self.consecutive += 1
        self.progress.skipped += 1
        self._log_skipped(ids, loss)
        if self.consecutive >= MAX_NONFINITE_STEPS:
            raise ValueError(
                f"{MAX_NONFINITE_STEPS} steps in a row had non-finite gradients; the weights are "
                "as they were before them: look at the pairs named above, or try a lower --lr, "
                "or --precision fp32"
            )

    def _log_skipped(self, ids: list[str], loss: Tensor) -> None:
        all_ids = sum(self.runtime.gather_objects(ids), [])
        named = ", ".join(all_ids[:MAX_IDS_LOGGED])
        if len(all_ids) > MAX_IDS_LOGGED:
            named += f" and {len(all_ids) - MAX_IDS_LOGGED} more"
        log.warning(
            "epoch %d: skipped a step with non-finite gradients "
            "(loss %s, %d in a row, %d in total): %s",
            self.progress.epoch,
            loss.item(),
            self.consecutive,
            self.progress.skipped,
            named,
        )


class StepLogger:
    """A log line every `log_every` steps: loss, learning rate, seconds a step, pairs a second."""

    def __init__(self, trainer: Trainer, output: RunOutput, epoch: int, log_every: int) -> None:
        self.trainer = trainer
        self.output = output
        self.epoch = epoch
        self.log_every = log_every
        self._restart()

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._batches = 0
        self._pairs = 0
        self._losses = torch.zeros((), device=self.trainer.runtime.device)

    def add(self, loss: Tensor, num_pairs: int) -> None:
        """A batch's loss () and the number of its pairs on this process."""
        self._batches += 1
        self._pairs += num_pairs
        self._losses = self._losses + loss

    def log_if_due(self, number: int) -> None:
        """After the step of that number in the epoch, from 1."""
        if number % self.log_every:
            return
        trainer = self.trainer
        runtime = trainer.runtime
        seconds = time.perf_counter() - self._since
        loss = runtime.sum_over_processes(self._losses) / runtime.world_size / self._batches
        values = {
            "loss": loss.item(),
            "learning_rate": trainer.optimizer.first_learning_rate(),
            "pairs_per_second": self._pairs * runtime.world_size / seconds,
        }
        log.info(
            "epoch %d step %d/%d  loss %.4f  lr %.3e  %.3f s/step  %.1f pairs/s",
            self.epoch,
            number,
            trainer.steps_per_epoch,
            values["loss"],
            values["learning_rate"],
            seconds * trainer.options.gradient_accumulation_steps / self._batches,
            values["pairs_per_second"],
        )
        self.output.record_step(self.epoch * trainer.steps_per_epoch + number, values)
        self._restart()
