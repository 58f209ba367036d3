"""A run's files of weights and training state: saved at once, found again, the best one marked (SPEC §6, Best epoch)."""

import json
import logging
import re
import reprlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from modules.bert_config import load_decoder_config
from modules.clip4idc import CLIP4IDC
from modules.files import read_json, short, written_at_once
from modules.weight_files import UNREADABLE, read_saved, read_weights

log = logging.getLogger(__name__)

WEIGHTS, STATE = "pytorch_model.bin", "training_state.bin"
CARD = "model.json"  # beside weights: what their shapes cannot say
NO_SCORE_YET = 1e-5  # what the first epoch's score has to reach


@dataclass
class Progress:
    """How far a run is, and how well it has done."""

    epoch: int = 0  # the next one to train
    best_score: float = NO_SCORE_YET
    best_epoch: int = -1
    epochs_without: int = 0  # in a row, since the best
    unjudged_loss: float | None = None  # mean loss of `epoch`, where it has been trained but not yet evaluated

    @property
    def chosen_epoch(self) -> int:
        """The best epoch, or the newest where none has scored."""
        return self.best_epoch if self.best_epoch >= 0 else self.epoch - 1

    @property
    def trained_epochs(self) -> int:
        """Epochs whose steps have all been taken."""
        return self.epoch + (self.unjudged_loss is not None)

    def judge(self, epoch: int, score: float) -> bool:
        """Take in an epoch's score, an equal one counting as better; returns whether it is the best so far."""
        self.epoch, self.unjudged_loss = epoch + 1, None
        if score >= self.best_score:
            self.best_score, self.best_epoch, self.epochs_without = score, epoch, 0
            return True
        self.epochs_without += 1
        return False


def weights_path(folder: Path, epoch: int | str) -> Path:
    """`pytorch_model.bin.<epoch>`."""
    return folder / f"{WEIGHTS}.{epoch}"


def save_epoch(folder: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any,
               progress: Progress, learning: nn.Module | None = None) -> None:
    """Weights under the released names, and beside them what else training needs; of the latter only the newest is kept.

    Where `model` holds averages, `learning` is what they are of.
    """
    with written_at_once(weights_path(folder, epoch)) as temporary:
        torch.save(model.state_dict(), temporary)
    with written_at_once(folder / f"{STATE}.{epoch}") as temporary:
        torch.save({"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(), "progress": asdict(progress),
                    "learning": learning.state_dict() if learning else None}, temporary)
    for old in folder.glob(f"{STATE}.*"):
        if old.name != f"{STATE}.{epoch}":
            old.unlink()


def save_progress(folder: Path, progress: Progress) -> None:
    """Put the run's standing into the newest training state, and point `pytorch_model.bin.best` at the chosen epoch."""
    path = folder / f"{STATE}.{progress.epoch - 1}"
    state = read_saved(path)
    with written_at_once(path) as temporary:
        torch.save({**state, "progress": asdict(progress)}, temporary)
    link = folder / f".{WEIGHTS}.best"
    link.unlink(missing_ok=True)
    link.symlink_to(weights_path(folder, progress.chosen_epoch).name)
    link.replace(weights_path(folder, "best"))


def write_card(folder: Path, model: CLIP4IDC, max_words: int, **more: Any) -> None:
    """`model.json`: what a captioner needs besides its weights, and whatever else is to be said of it."""
    values = {"intra_num_hidden_layers": model.clip.visual.intra_layers, "linear_patch": model.clip.visual.linear_patch,
              "max_words": max_words}
    if model.task == "caption":
        config = asdict(model.decoder.config)
        values["decoder_config"] = {"num_decoder_layers": config.pop("num_layers"), **config}
    with written_at_once(folder / CARD) as temporary:
        temporary.write_text(json.dumps({**values, **more}, indent=2) + "\n", encoding="utf-8")


def read_card(weights: Path) -> dict[str, Any]:
    """The `model.json` beside weights, {} where there is none. Raises ValueError for values of the wrong kind."""
    path = weights.parent / CARD
    if not path.is_file():
        return {}
    card = read_json(path, dict)
    kinds = {"intra_num_hidden_layers": int, "linear_patch": str, "max_words": int, "decoder_config": dict, "trained_on": str}
    for name, kind in kinds.items():
        if name in card and type(card[name]) is not kind:
            raise ValueError(f"{path}: {name} is {reprlib.repr(card[name])}, expected {kind.__name__}")
    if "decoder_config" in card:
        try:
            load_decoder_config(card["decoder_config"])
        except ValueError as error:
            raise ValueError(f"{path}: decoder_config: {error}") from None
    return card


def resume_files(weights: str) -> tuple[Path, Path]:
    """`pytorch_model.bin.<epoch>` and the training state beside it; ValueError or OSError where they are not both there."""
    path = Path(weights)
    match = re.fullmatch(rf"{re.escape(WEIGHTS)}\.(\d+)", path.name)
    if match is None:
        raise ValueError(f"--resume_model {path}: expected a file {WEIGHTS}.<epoch> of a run")
    state_path = path.with_name(f"{STATE}.{match.group(1)}")
    for needed in (path, state_path):
        if not needed.is_file():
            newest = max(path.parent.glob(f"{STATE}.*"), default=None)
            raise FileNotFoundError(f"no file {needed}, which --resume_model needs" + (
                f"; {newest} is what this run continues from" if newest else "; to start afresh from weights give --init_model"))
    return path, state_path


def load_for_resume(weights: str, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any,
                    averaged: AveragedModel | None = None) -> Progress:
    """Continue from `pytorch_model.bin.<epoch>` and its training state; ValueError or OSError where they do not fit."""
    path, state_path = resume_files(weights)
    try:
        state = read_saved(state_path)
        if bool(state.get("learning")) != bool(averaged):
            raise ValueError("--ema was " + ("not given" if averaged else "given"))
        model.load_state_dict(state["learning"] if averaged else read_weights(path))
        if averaged:
            averaged.module.load_state_dict(read_weights(path))
            averaged.n_averaged.fill_(1)  # any number but 0, at which the averages would begin anew
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        progress = Progress(**state["progress"])
    except UNREADABLE as error:
        raise ValueError(f"cannot continue from {path} and {state_path} with these options: {short(error)}") from None
    log.info("continuing %s at epoch %d%s; --init_model and --pretrained_clip_name give no weights", path, progress.epoch,
             "" if progress.unjudged_loss is None else ", which is trained but not evaluated")
    return progress
