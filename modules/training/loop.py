"""The training loop: each epoch is trained, saved, evaluated and compared with the best so far."""

import logging
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from PIL import Image

from modules.clip4idc import CLIP4IDC
from modules.training.memory import advise_on_memory
from modules.training.monitors import EpochLoss, NonFiniteGuard, StepLogger
from modules.training.output import EpochResult, RunOutput
from modules.training.pace import Pace, format_duration
from modules.training.progress import Progress
from modules.training.states import WEIGHTS_FILE
from modules.training.trainer import Trainer
from system.signals import StopRequested

log = logging.getLogger(__name__)


class Evaluator(Protocol):
    """Evaluates a model on one split, epoch after epoch."""

    def evaluate(self, model: CLIP4IDC, label: str) -> tuple[float, dict[str, float]]:
        """The score that is compared with the best so far, and all scores.

        `label` names the epoch in files.
        """

    def draw_samples(self) -> Image.Image:
        """A picture of some pairs of the latest evaluation, with the model's answers.

        The pairs are the same in every epoch. Only the main process may call this.
        """


def fit(
    trainer: Trainer,
    output: RunOutput,
    progress: Progress,
    evaluator: Evaluator,
    log_every: int,
) -> None:
    """Train to the last epoch, or until scores have not improved for as long as --patience says.

    Starts where `progress` stands and keeps it up to date. Logs every `log_every` steps. Raises
    StopRequested after a signal, once the state is saved.
    """
    pace = Pace()
    while progress.epoch < trainer.num_epochs:
        if _has_lost_patience(trainer, progress):
            log.info(
                "early stopping: no improvement for %d epochs (--patience %d)",
                progress.epochs_without,
                trainer.patience,
            )
            break
        if progress.unjudged_loss is None:  # otherwise a run ended before this epoch's evaluation
            _train_and_save(trainer, output, progress, pace, log_every)
        _evaluate_and_compare(trainer, output, progress, pace, evaluator)


def _has_lost_patience(trainer: Trainer, progress: Progress) -> bool:
    """Whether scores have not improved for too long. Before the first score nobody can tell."""
    has_scored = progress.best_epoch >= 0
    return has_scored and 0 < trainer.patience <= progress.epochs_without


def _train_and_save(
    trainer: Trainer, output: RunOutput, progress: Progress, pace: Pace, log_every: int
) -> None:
    with trainer.stop.deferred():
        loss = train_epoch(trainer, output, progress, pace, log_every)
        progress.finish_epoch(loss)
        log.info(
            "%s: mean loss %.4f, at most %s of memory",
            trainer.name_epoch(progress.epoch),
            loss,
            trainer.runtime.describe_peak_memory(),
        )
        output.save_trained_epoch(trainer.tensors(), progress)


def _evaluate_and_compare(
    trainer: Trainer, output: RunOutput, progress: Progress, pace: Pace, evaluator: Evaluator
) -> None:
    epoch = progress.epoch
    trainer.model.eval()
    with pace.evaluating():
        score, scores = evaluator.evaluate(trainer.model, str(epoch))
    with trainer.stop.deferred():
        values = {"loss": progress.unjudged_loss, **scores}
        best_before = progress.best_score if progress.best_epoch >= 0 else None
        is_best = progress.record_score(score)
        last_step = epoch * trainer.steps_per_epoch + trainer.count_steps_in(epoch)
        result = EpochResult(epoch, values, last_step)
        output.record_epoch(result, progress, evaluator.draw_samples)
        log.info(
            "%s (%s.%d): %s%s",
            trainer.name_epoch(epoch),
            WEIGHTS_FILE,
            epoch,
            _verdict(score, is_best, best_before, progress),
            _describe_time_left(trainer, progress, pace),
        )


def _describe_time_left(trainer: Trainer, progress: Progress, pace: Pace) -> str:
    """The time that the epochs after this one will take; empty after the last one."""
    epochs = trainer.num_epochs - progress.epoch
    if epochs <= 0:
        return ""
    steps = trainer.num_steps - progress.epoch * trainer.steps_per_epoch
    return f"; about {format_duration(pace.estimate(steps, epochs))} left"


def _verdict(score: float, is_best: bool, best_before: float | None, progress: Progress) -> str:
    if is_best and score == best_before:
        return f"as good as the best so far, {score:.4f}: the later epoch is chosen"
    if is_best:
        return f"the best so far, {score:.4f}"
    if math.isnan(score):
        return "not compared: the score that selects the best epoch is missing"
    return f"no improvement on {progress.best_score:.4f} for {progress.epochs_without} epoch(s)"


def train_epoch(
    trainer: Trainer, output: RunOutput, progress: Progress, pace: Pace, log_every: int
) -> float:
    """Train the rest of `progress.epoch`; returns its mean loss over all batches and processes."""
    runtime = trainer.runtime
    trainer.objective.train()
    losses = EpochLoss(progress, runtime)
    guard = NonFiniteGuard(progress, runtime)
    logger = StepLogger(trainer, output, pace, progress.epoch, log_every)
    num_steps = trainer.count_steps_in(progress.epoch)
    pace.begin_epoch()
    for micro_batch in _micro_batches(trainer, progress):
        # Dropout depends only on the position in the run, so a resumed run draws the same.
        runtime.seed(trainer.seed, progress.epoch, micro_batch.index)
        guard.add_ids(micro_batch.batch["id"])
        with advise_on_memory(trainer, micro_batch.batch):
            loss = trainer.backward(micro_batch.batch, micro_batch.completes_step)
            was_taken = micro_batch.completes_step and trainer.step()
        losses.add(loss)
        logger.add(loss, len(micro_batch.batch["images"]))
        if not micro_batch.completes_step:
            continue
        guard.check(was_taken, loss)
        pace.add_step()
        logger.log_if_due(micro_batch.steps)
        if micro_batch.steps < num_steps:
            _save_or_stop(trainer, output, progress, losses, micro_batch)
        elif num_steps < trainer.steps_per_epoch:
            break  # --max_steps ends the epoch early
    trainer.discard_gradients()
    return losses.mean()


class _MicroBatch(NamedTuple):
    """One of the batches that make up an optimizer step."""

    batch: dict[str, Any]
    index: int  # in the epoch
    steps: int  # of the epoch, taken once this batch has been trained on
    completes_step: bool


def _micro_batches(trainer: Trainer, progress: Progress) -> Iterator[_MicroBatch]:
    """The batches of the epoch that are still to be trained on."""
    micro_batches_per_step = trainer.options.gradient_accumulation_steps
    trainer.loader.set_epoch(progress.epoch, progress.batches)
    name = trainer.name_epoch(progress.epoch)
    # Without a terminal the log has its own lines, every --n_display steps.
    batches = trainer.runtime.progress_bar(trainer.loader, name, has_lines=False)
    for index, batch in enumerate(batches, progress.batches):
        steps, rest = divmod(index + 1, micro_batches_per_step)
        yield _MicroBatch(batch, index, steps, completes_step=rest == 0)


def _save_or_stop(
    trainer: Trainer,
    output: RunOutput,
    progress: Progress,
    losses: EpochLoss,
    micro_batch: _MicroBatch,
) -> None:
    """Save the state within an epoch if --save_every_steps or a signal asks for it.

    Raises StopRequested after a signal.
    """
    every = trainer.options.save_every_steps
    stop = trainer.runtime.any_process(trainer.stop.requested)
    if stop or (every and micro_batch.steps % every == 0):
        progress.batches = micro_batch.index + 1
        progress.losses = losses.of_each_process()
        output.save_within_epoch(trainer.tensors(), progress, micro_batch.steps)
    if stop:
        raise StopRequested
