"""A run's files of weights and training state: saved at once, checked, found again, the best one marked (SPEC §6, Best epoch).

`training_state.bin.<epoch>` holds all that is needed to go on after an epoch, `training_state.bin.<epoch>.<steps>` the same from
inside one. Beside each lies a JSON sidecar with its SHA-256, the run's standing and options; a state without one that fits does
not count. Random states are not saved: every draw is made from (seed, epoch, place, process), so that the place says all.
"""

import logging
import math
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.card import checked_card
from modules.clip4idc import CLIP4IDC
from modules.fetching import fetch, shelf_of
from modules.files import file_sha256, read_json, short, write_json, written_at_once
from modules.urls import Address
from modules.weight_files import read_saved

log = logging.getLogger(__name__)

WEIGHTS = "pytorch_model.bin"
STATE = "training_state.bin"
HISTORY = "history.csv"
NO_SCORE_YET = 1e-5  # what the first epoch's score has to reach
# Options that do not change what comes out: where things lie, how they are read, what is told and kept. Whether the data are the
# same is told by their fingerprint.
WITHOUT_EFFECT = frozenset(
    {
        "output_dir",
        "data_path",
        "features_path",
        "gt_dir",
        "cache_dir",
        "image_cache",
        "resume",
        "resume_model",
        "resume_force",
        "init_model",
        "pretrained_clip_name",
        "quick_gelu",
        "n_display",
        "num_thread_reader",
        "batch_size_val",
        "local_rank",
        "task_type",
        "eval_split",
        "save_every_steps",
        "keep_checkpoints",
        "on_bad_image",
    }
)


@dataclass
class Progress:
    """How far a run is, and how well it has done."""

    epoch: int = 0  # the next one to train, or to go on with
    batches: int = 0  # of `epoch`, taken before this place
    losses: list[list[float]] = field(
        default_factory=list
    )  # for each process, the sum of the finite ones and their count
    skipped: int = 0  # steps without finite gradients, in all
    best_score: float = NO_SCORE_YET
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

    def losses_of(self, rank: int, world_size: int) -> list[float]:
        """What a process goes on adding to: its own where there are as many as before, else the first takes all."""
        if len(self.losses) == world_size:
            return self.losses[rank]
        return (
            [float(sum(column)) for column in zip(*self.losses, strict=True)]
            if rank == 0 and self.losses
            else [0.0, 0.0]
        )

    def end_epoch(self, loss: float) -> None:
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


@dataclass(frozen=True)
class ResumePoint:
    """A state that has been found and checked."""

    path: Path
    progress: Progress
    options: dict[str, Any]
    data: str  # fingerprint of what was trained on
    card: dict[str, Any]  # of the model (card.py)

    def tensors(self) -> dict[str, Any]:
        """What `Trainer.tensors` gave. ValueError where the file holds something else."""
        found = read_saved(self.path)
        weights = found.get("model") if isinstance(found, dict) else None
        if not (
            isinstance(weights, dict)
            and weights
            and all(isinstance(value, Tensor) for value in weights.values())
        ):
            raise ValueError(f"{self.path} holds no training state")
        return found

    def differences(self, options: Mapping[str, Any], data: str) -> tuple[list[str], list[str]]:
        """Options that are not what they were: those that change what comes out, and the others."""
        changed = [
            name
            for name, value in options.items()
            if name in self.options and self.options[name] != _plain(value)
        ]
        texts = {name: f"--{name} is {options[name]}, was {self.options[name]}" for name in changed}
        serious = [text for name, text in texts.items() if name not in WITHOUT_EFFECT]
        serious += (
            ["the training pairs, or those that choose the epoch, are others"]
            if data != self.data
            else []
        )
        return serious, [text for name, text in texts.items() if name in WITHOUT_EFFECT]


class RunFiles:
    """The files of one run: what its main process writes, and which of them it keeps.

    A run that begins `afresh` in a folder with states of an earlier one removes those once it has saved a state of its own.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        options: Mapping[str, Any],
        data: str,
        card: Mapping[str, Any],
        afresh: bool = False,
    ) -> None:
        self.folder, self.keep, self.data, self.card = folder, keep, data, card
        self._earlier = _states(folder) if afresh else []
        self.options = {name: _plain(value) for name, value in options.items()}

    def adopt(self, point: ResumePoint) -> None:
        """Copy a state from elsewhere, and what its run goes on with, into this run's folder."""
        if point.path.parent.resolve() == self.folder.resolve():
            return
        for name in (*_neighbours(point), point.path.name, _sidecar(point.path).name):
            with written_at_once(self.folder / name) as temporary:
                shutil.copyfile(point.path.with_name(name), temporary)

    def save_weights(self, model: CLIP4IDC, epoch: int) -> None:
        """`pytorch_model.bin.<epoch>`, under the released names."""
        self._save(weights_path(self.folder, epoch), model.state_dict())

    def save_state(
        self, tensors: Mapping[str, Any], progress: Progress, steps: int | None = None
    ) -> Path:
        """The state after `steps` of an epoch, or after all of it; older ones go. OSError for a full disk."""
        path = self.folder / f"{STATE}.{progress.epoch}{'' if steps is None else f'.{steps}'}"
        self._save(path, tensors)
        self._write_sidecar(path, progress, file_sha256(path))
        self._remove((earlier for earlier in self._earlier if earlier != path), "an earlier run's")
        self._earlier = []
        if self.keep >= 0:
            self._remove(_states(self.folder)[self.keep :])
        return path

    def save_progress(self, progress: Progress) -> None:
        """Put the standing after an evaluation beside the epoch's state, point `pytorch_model.bin.best` at the chosen epoch, and
        let go of weights that are neither the best nor among the last."""
        path = self.folder / f"{STATE}.{progress.epoch - 1}"
        self._write_sidecar(path, progress, read_json(_sidecar(path), dict)["sha256"])
        link = self.folder / f".{WEIGHTS}.best"
        link.unlink(missing_ok=True)
        link.symlink_to(weights_path(self.folder, progress.chosen_epoch).name)
        link.replace(weights_path(self.folder, "best"))
        if self.keep >= 0:
            saved = sorted(
                (epoch for epoch in _epochs_of(self.folder) if epoch < progress.epoch), reverse=True
            )
            self._remove(
                weights_path(self.folder, epoch)
                for epoch in saved[self.keep :]
                if epoch != progress.chosen_epoch
            )

    def _save(self, path: Path, tensors: Mapping[str, Any]) -> None:
        needed = _bytes(tensors)
        self._check_space(path, needed)
        try:
            with written_at_once(path) as temporary:
                torch.save(tensors, temporary)
        except (RuntimeError, OSError) as error:  # RuntimeError is what torch makes of a full disk
            self._check_space(path, needed)
            reason = getattr(error, "strerror", None) or short(error)
            raise OSError(f"cannot write {path}: {reason}{self._way_out()}") from None

    def _check_space(self, path: Path, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"cannot write {path}: it takes {needed / 1e9:.3f} GB, {free / 1e9:.3f} GB are free, "
                f"{(needed - free) / 1e9:.3f} GB are missing{self._way_out()}"
            )

    def _way_out(self) -> str:
        return (
            "; make room, and --resume auto continues from the last state"
            if _states(self.folder)
            else "; make room"
        )

    def _write_sidecar(self, path: Path, progress: Progress, sha256: str) -> None:
        write_json(
            _sidecar(path),
            {
                "sha256": sha256,
                "progress": asdict(progress),
                "options": self.options,
                "data": self.data,
                "card": self.card,
            },
        )

    def _remove(self, paths: Iterable[Path], reason: str = "") -> None:
        for path in paths:
            path.unlink(missing_ok=True)
            _sidecar(path).unlink(missing_ok=True)
            log.info("removed %s (%s)", path, reason or f"--keep_checkpoints {self.keep}")


def weights_path(folder: Path, epoch: int | str) -> Path:
    """`pytorch_model.bin.<epoch>`."""
    return folder / f"{WEIGHTS}.{epoch}"


def newest_state(folder: Path) -> ResumePoint | None:
    """The newest state whose checksum is right, each damaged one told; None where the folder has no state at all.

    Raises ValueError where it has some and none is sound.
    """
    states = _states(folder)
    for path in states:
        try:
            return _verified(path)
        except (ValueError, OSError) as error:
            log.warning("%s: trying an older state", error)
    if states:
        raise ValueError(
            f"no state in {folder} can be used; to start afresh leave --resume auto out"
        )
    return None


def named_state(name: str) -> ResumePoint:
    """The state that belongs to `pytorch_model.bin.<epoch>`, or `training_state.bin.…` itself; ValueError or OSError where it
    cannot be used."""
    path = Path(name)
    state = path.with_name(_state_name(path.name))
    if not state.is_file():
        newest = next(iter(_states(path.parent)), None)
        raise FileNotFoundError(
            f"no file {state}, which --resume_model needs"
            + (
                f"; {newest} is what this run continues from"
                if newest
                else "; to start afresh from weights give --init_model"
            )
        )
    return _verified(state)


def state_at(url: Address, cache_dir: str | None) -> ResumePoint:
    """The state at an address, brought into the cache, and beside it what the run's folder needs to go on; errors as above."""
    folder, shelf, name = shelf_of(url, cache_dir)
    if url != folder.joined(name):
        raise ValueError(
            f"--resume_model {url}: an address with a query has no neighbours, which a state needs"
        )
    state = shelf / _state_name(name)
    _sidecar(state).unlink(missing_ok=True)  # another run may have written there since
    sidecar = folder.joined(_sidecar(state).name)
    fetch(sidecar, _sidecar(state))
    sha256 = read_json(_sidecar(state), dict).get("sha256")
    if not isinstance(sha256, str):
        raise ValueError(f"{sidecar} is no sidecar of a training state")
    fetch(folder.joined(state.name), state, sha256)
    point = _verified(state)
    for file in _neighbours(point):
        (shelf / file).unlink(missing_ok=True)
        fetch(folder.joined(file), shelf / file)
    return point


def _neighbours(point: ResumePoint) -> list[str]:
    """What beside a state its run goes on with: the scores so far, the weights of the best epoch and of one not judged yet."""
    progress = point.progress
    epochs = {
        progress.chosen_epoch,
        progress.epoch if progress.unjudged_loss is not None else -1,
    } - {-1}
    return ([HISTORY] if progress.epoch else []) + [
        f"{WEIGHTS}.{epoch}" for epoch in sorted(epochs)
    ]


def _state_name(name: str) -> str:
    """Of the state that belongs to `pytorch_model.bin.<epoch>`, or the state's own; ValueError for what is neither."""
    match = re.fullmatch(rf"{re.escape(WEIGHTS)}\.(\d+)|{re.escape(STATE)}\.\d+(?:\.\d+)?", name)
    if match is None:
        raise ValueError(
            f"--resume_model {name}: expected a file {WEIGHTS}.<epoch> or {STATE}.<epoch>[.<steps>] of a run"
        )
    return f"{STATE}.{match.group(1)}" if match.group(1) else name


def _verified(path: Path) -> ResumePoint:
    """ValueError or OSError where state and sidecar do not fit."""
    found = read_json(_sidecar(path), dict)
    kinds = {"sha256": str, "progress": dict, "options": dict, "data": str, "card": dict}
    if not (
        all(isinstance(found.get(name), kind) for name, kind in kinds.items())
        and _is_progress(found["progress"])
    ):
        raise ValueError(f"{_sidecar(path)} is no sidecar of a training state")
    if file_sha256(path) != found["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {_sidecar(path)}")
    card = checked_card(found["card"], str(_sidecar(path)))
    return ResumePoint(path, Progress(**found["progress"]), found["options"], found["data"], card)


def _is_progress(values: dict[str, Any]) -> bool:
    """Whether these are all of a Progress' values, each of its kind."""
    if values.keys() != {one.name for one in fields(Progress)}:
        return False
    counts = [values[name] for name in ("epoch", "batches", "skipped", "epochs_without")]
    numbers = [
        values["best_score"],
        0.0 if values["unjudged_loss"] is None else values["unjudged_loss"],
    ]
    lists = values["losses"] if isinstance(values["losses"], list) else [None]
    return (
        all(type(count) is int and count >= 0 for count in counts)
        and all(type(number) is float for number in numbers)
        and type(values["best_epoch"]) is int
        and -1 <= values["best_epoch"] < max(counts[0], 1)
        and all(
            isinstance(one, list) and len(one) == 2 and all(type(number) is float for number in one)
            for one in lists
        )
    )


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _states(folder: Path) -> list[Path]:
    """The run's states, the newest place first."""
    places = {}
    for path in folder.glob(f"{STATE}.*"):
        if match := re.fullmatch(rf"{re.escape(STATE)}\.(\d+)(?:\.(\d+))?", path.name):
            places[path] = (
                int(match.group(1)),
                int(match.group(2)) if match.group(2) else math.inf,
            )  # all of the epoch
    return sorted(places, key=places.get, reverse=True)


def _epochs_of(folder: Path) -> list[int]:
    """The epochs whose weights are there."""
    names = (
        re.fullmatch(rf"{re.escape(WEIGHTS)}\.(\d+)", path.name)
        for path in folder.glob(f"{WEIGHTS}.*")
    )
    return [int(match.group(1)) for match in names if match]


def _bytes(value: Any) -> int:
    """What the tensors in nested dicts and lists take."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    parts = (
        value.values()
        if isinstance(value, Mapping)
        else value
        if isinstance(value, list | tuple)
        else ()
    )
    return sum(map(_bytes, parts))


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
