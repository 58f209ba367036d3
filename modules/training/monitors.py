"""TODO."""

import logging
import time

from torch import Tensor

from modules.training.progress import Progress
from modules.training.trainer import Trainer
from system.runtime import Runtime

log = logging.getLogger(__name__)

MAX_NONFINITE_STEPS = 25  # steps in a row without finite gradients, after which training ends


MAX_IDS_LOGGED = 8  # of a batch in such a step's line


class NonFiniteGuard:
    """Counts steps that were skipped since their gradients were not finite, and ends a training that has no others."""

    def __init__(self, progress: Progress, runtime: Runtime) -> None:
        self.progress, self.runtime, self.consecutive = progress, runtime, 0
        self.ids: list[str] = []  # of the step's batches, on this process

    def check(self, taken: bool, loss: Tensor) -> None:
        """ValueError after MAX_SKIPPED in a row."""
        own, self.ids = self.ids, []
        if taken:
            self.consecutive = 0
            return
        self.consecutive += 1
        self.progress.skipped += 1
        ids = sum(self.runtime.gather_objects(own), [])
        more = f" and {len(ids) - MAX_IDS_LOGGED} more" if len(ids) > MAX_IDS_LOGGED else ""
        log.warning(
            "epoch %d: a step is skipped, its gradients are not finite (loss %s; %d in a row, %d in all): %s%s",
            self.progress.epoch,
            loss.item(),
            self.consecutive,
            self.progress.skipped,
            ", ".join(ids[:MAX_IDS_LOGGED]),
            more,
        )
        if self.consecutive >= MAX_NONFINITE_STEPS:
            raise ValueError(
                f"{MAX_NONFINITE_STEPS} steps in a row had no finite gradients; the weights stand as they were before: look "
                "at the pairs named above, or try a lower --lr, or --precision fp32"
            )


class StepLogger:
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
        mean = (runtime.all_sum(self.losses) / runtime.world_size / self.batches).item()
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
