"""Watches a training epoch: mean loss, non-finite gradients, speed."""

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from modules.training.output import RunOutput
from modules.training.pace import Pace, format_duration
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from system.runtime import Runtime

log = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 25  # in a row; then training ends
MAX_IDS_LOGGED = 8  # per skipped step


class EpochLoss:
    """Sum and count of an epoch's finite losses."""

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        self.epoch = progress.epoch
        self.runtime = runtime
        saved = progress.losses_for_rank(runtime.rank, runtime.world_size)
        self._sum_and_count = torch.tensor(saved, device=runtime.device)

    def add(self, loss: Tensor) -> None:
        """Add a batch's scalar loss; does not wait for the GPU."""
        self._sum_and_count += torch.stack([loss.nan_to_num(0, 0, 0), loss.isfinite()])

    def of_each_process(self) -> list[list[float]]:
        """[sum, count] of each rank, as in `Progress.losses`."""
        return self.runtime.gather_objects(self._sum_and_count.tolist())

    def mean(self) -> float:
        """The mean over all processes. Raises ValueError if no loss was finite."""
        total, count = self.runtime.sum_over_processes(self._sum_and_count).tolist()
        if not count:
            raise ValueError(
                f"no batch of epoch {self.epoch + 1} had a finite loss: try a lower --lr, "
                "or --precision fp32"
            )
        return total / count


class NonFiniteGuard:
    """Counts steps that are skipped for non-finite gradients, and ends the run after too many."""

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        self.progress = progress
        self.runtime = runtime
        self.consecutive = 0
        self._ids: list[str] = []  # of the next step's pairs, on this process

    def add_ids(self, ids: list[str]) -> None:
        """Note the ids of pairs in the next step."""
        self._ids += ids

    def check(self, was_taken: bool, loss: Tensor) -> None:
        """Call after each step; `loss` is that of its last micro-batch on this process.

        Raises ValueError after MAX_NONFINITE_STEPS skipped steps in a row.
        """
        ids = self._ids
        self._ids = []
        if was_taken:
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
            self.progress.epoch + 1,
            loss.item(),
            self.consecutive,
            self.progress.skipped,
            named,
        )


class StepLogger:
    """Loss, learning rate and speed every `log_every` steps, in the log and in TensorBoard."""

    def __init__(
        self, trainer: Trainer, output: RunOutput, pace: Pace, epoch: int, log_every: int
    ) -> None:
        self.trainer = trainer
        self.output = output
        self.pace = pace
        self.epoch = epoch
        self.log_every = log_every
        self._restart()

    def _restart(self) -> None:
        self._since = time.perf_counter()
        self._batches = 0
        self._pairs = 0
        self._losses = torch.zeros((), device=self.trainer.runtime.device)

    def add(self, loss: Tensor, num_pairs: int) -> None:
        """Add a batch's scalar loss and its number of pairs on this process."""
        self._batches += 1
        self._pairs += num_pairs
        self._losses = self._losses + loss

    def log_if_due(self, number: int) -> None:
        """Call after step `number` (from 1) of the epoch; logs if due."""
        if number % self.log_every:
            return
        seconds = time.perf_counter() - self._since
        values = self._measure(seconds)
        self._log(number, values, seconds)
        self.output.record_step(self.epoch * self.trainer.steps_per_epoch + number, values)
        self._restart()

    def _measure(self, seconds: float) -> dict[str, float]:
        """Means since the last log line, over all processes."""
        runtime = self.trainer.runtime
        loss = runtime.sum_over_processes(self._losses) / runtime.world_size / self._batches
        return {
            "loss": loss.item(),
            "learning_rate": self.trainer.optimizer.first_learning_rate(),
            "pairs_per_second": self._pairs * runtime.world_size / seconds,
        }

    def _log(self, number: int, values: Mapping[str, float], seconds: float) -> None:
        batches_per_step = self.trainer.options.gradient_accumulation_steps
        log.info(
            "%s step %d/%d  loss %.4f  lr %.3e  %.3f s/step  %.1f pairs/s  %s",
            self.trainer.name_epoch(self.epoch),
            number,
            self.trainer.count_steps_in(self.epoch),
            values["loss"],
            values["learning_rate"],
            seconds * batches_per_step / self._batches,
            values["pairs_per_second"],
            self._describe_time_left(number),
        )

    def _describe_time_left(self, number: int) -> str:
        """The time left after step `number`: in the epoch, and in the whole training."""
        in_epoch = self.trainer.count_steps_in(self.epoch) - number
        before = self.epoch * self.trainer.steps_per_epoch + number
        in_all = self.pace.estimate(
            self.trainer.num_steps - before, self.trainer.num_epochs - self.epoch
        )
        return (
            f"{format_duration(self.pace.estimate(in_epoch))} left in this epoch, "
            f"{format_duration(in_all)} in all"
        )
