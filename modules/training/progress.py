"""TODO."""

import math
from dataclasses import dataclass, field

INITIAL_BEST = 1e-5  # what the first epoch's score has to reach


@dataclass
class Progress:
    """How far a run is, and how well it has done."""

    epoch: int = 0  # the next one to train, or to go on with
    batches: int = 0  # of `epoch`, taken before this place
    losses: list[list[float]] = field(
        default_factory=list
    )  # for each process, the sum of the finite ones and their count
    skipped: int = 0  # steps without finite gradients, in all
    best_score: float = INITIAL_BEST
    best_epoch: int = -1
    epochs_without: int = 0  # in a row, since the best
    unjudged_loss: float | None = (
        None  # mean loss of `epoch`, where it has been trained but not yet evaluated
    )

    @property
    def chosen_epoch(self) -> int:
        """The best epoch, or the newest where none has scored."""
        return self.best_epoch if self.best_epoch >= 0 else self.epoch - 1

    @property
    def trained_epochs(self) -> int:
        """Epochs whose steps have all been taken."""
        return self.epoch + (self.unjudged_loss is not None)

    def losses_for_rank(self, rank: int, world_size: int) -> list[float]:
        """What a process goes on adding to: its own where there are as many as before, else the first takes all."""
        if len(self.losses) == world_size:
            return self.losses[rank]
        return (
            [float(sum(column)) for column in zip(*self.losses, strict=True)]
            if rank == 0 and self.losses
            else [0.0, 0.0]
        )

    def finish_epoch(self, loss: float) -> None:
        """All steps of `epoch` are taken."""
        self.batches, self.losses, self.unjudged_loss = 0, [], loss

    def judge(self, epoch: int, score: float) -> bool:
        """Take in an epoch's score, an equal one counting as better, NaN as none; returns whether it is the best so far."""
        self.epoch, self.unjudged_loss = epoch + 1, None
        if math.isnan(score):
            return False
        if score >= self.best_score:
            self.best_score, self.best_epoch, self.epochs_without = score, epoch, 0
            return True
        self.epochs_without += 1
        return False
