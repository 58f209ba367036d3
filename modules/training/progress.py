"""A run's progress: how far it has come and how good it is. A resumed run continues from it."""

import math
from dataclasses import dataclass, field

INITIAL_BEST = 1e-5  # a score counts as an improvement only from this value on


@dataclass
class Progress:
    """The run's progress. The field names are keys in the sidecars of states: they stay."""

    epoch: int = 0  # to train or to finish next
    batches: int = 0  # of `epoch`, already trained on
    # Of `epoch`, one entry per process: the sum of its finite losses, and their number.
    losses: list[list[float]] = field(default_factory=list)
    skipped: int = 0  # steps with non-finite gradients, in the whole run
    best_score: float = INITIAL_BEST
    best_epoch: int = -1
    epochs_without: int = 0  # an improvement, in a row
    # The mean loss of `epoch`, if it has been trained but not evaluated yet.
    unjudged_loss: float | None = None

    @property
    def chosen_epoch(self) -> int:
        """The best epoch, or the newest one if none has scored."""
        return self.best_epoch if self.best_epoch >= 0 else self.epoch - 1

    @property
    def trained_epochs(self) -> int:
        """The number of epochs whose steps have all been taken."""
        return self.epoch + (self.unjudged_loss is not None)

    def losses_for_rank(self, rank: int, world_size: int) -> list[float]:
        """The sum and count that a process starts from.

        That is its own if the number of processes is the same as before. Otherwise the first
        process takes the sums of all.
        """
        if len(self.losses) == world_size:
            return self.losses[rank]
        if rank > 0 or not self.losses:
            return [0.0, 0.0]
        return [float(sum(column)) for column in zip(*self.losses, strict=True)]

    def finish_epoch(self, loss: float) -> None:
        """Note that all steps of `epoch` have been taken, with this mean loss."""
        self.batches = 0
        self.losses = []
        self.unjudged_loss = loss

    def record_score(self, score: float) -> bool:
        """Compare the score of `epoch` with the best so far, and go on to the next epoch.

        Returns whether it is the best. A score equal to the best counts as better, so the later
        epoch is chosen. With NaN the epoch is neither the best nor one without improvement.
        """
        is_best = self._compare(score)
        self.epoch += 1
        self.unjudged_loss = None
        return is_best

    def _compare(self, score: float) -> bool:
        if math.isnan(score):
            return False
        if score >= self.best_score:
            self.best_score = score
            self.best_epoch = self.epoch
            self.epochs_without = 0
            return True
        self.epochs_without += 1
        return False
