"""How far a run has come and how well it has done: what a resumed run continues from."""

import math
from dataclasses import dataclass, field

INITIAL_BEST = 1e-5  # the first score that counts as better must reach it


@dataclass
class Progress:
    """A run's standing. The field names are the keys of the states' JSON files."""

    epoch: int = 0  # the one to train or to finish next
    batches: int = 0  # of `epoch`, already trained on
    # Of `epoch`, for each process: the sum of its finite losses, and their number.
    losses: list[list[float]] = field(default_factory=list)
    skipped: int = 0  # steps with non-finite gradients, in the whole run
    best_score: float = INITIAL_BEST
    best_epoch: int = -1
    epochs_without: int = 0  # in a row, since the best
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
        """The sum and count that a process adds to: its own, if the number of processes is the
        same as before; otherwise the first process takes all of them."""
        if len(self.losses) == world_size:
            return self.losses[rank]
        if rank > 0 or not self.losses:
            return [0.0, 0.0]
        return [float(sum(column)) for column in zip(*self.losses, strict=True)]

    def finish_epoch(self, loss: float) -> None:
        """All steps of `epoch` have been taken, with this mean loss."""
        self.batches = 0
        self.losses = []
        self.unjudged_loss = loss

    def record_score(self, score: float) -> bool:
        """Close `epoch` with its score; returns whether it is the best so far.

        A score equal to the best counts as better, so the later epoch is chosen. With NaN the
        epoch is neither the best nor one without improvement.
        """
        epoch = self.epoch
        self.epoch = epoch + 1
        self.unjudged_loss = None
        if math.isnan(score):
            return False
        if score >= self.best_score:
            self.best_score = score
            self.best_epoch = epoch
            self.epochs_without = 0
            return True
        self.epochs_without += 1
        return False
