"""A run's files of weights and training state: saved at once, checked, found again, the best one marked (SPEC §6, Best epoch).

`training_state.bin.<epoch>` holds all that is needed to go on after an epoch, `training_state.bin.<epoch>.<steps>` the same from
inside one. Beside each lies a JSON sidecar with its SHA-256, the run's standing and options; a state without one that fits does
not count. Random states are not saved: every draw is made from (seed, epoch, place, process), so that the place says all.
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor

from modules.training.progress import Progress
from modules.weights.model_info import check_model_info
from modules.weights.tensor_files import read_torch_file
from system.download import cache_path, fetch
from system.files import sha256_of
from system.json_files import read_json
from system.urls import Address

log = logging.getLogger(__name__)

WEIGHTS_FILE = "pytorch_model.bin"


STATE_FILE = "training_state.bin"


HISTORY_FILE = "history.csv"


# Options that do not change what comes out: where things lie, how they are read, what is told and kept. Whether the data are the
# same is told by their fingerprint.
HARMLESS_OPTIONS = frozenset(
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


@dataclass(frozen=True)
class ResumePoint:
    """A state that has been found and checked."""

    path: Path
    progress: Progress
    options: dict[str, Any]
    data: str  # fingerprint of what was trained on
    info: dict[str, Any]  # of the model (card.py)

    def tensors(self) -> dict[str, Any]:
        """What `Trainer.tensors` gave. ValueError where the file holds something else."""
        found = read_torch_file(self.path)
        weights = found.get("model") if isinstance(found, dict) else None
        if not (
            isinstance(weights, dict)
            and weights
            and all(isinstance(value, Tensor) for value in weights.values())
        ):
            raise ValueError(f"{self.path} holds no training state")
        return found

    def changed_options(self, options: Mapping[str, Any], data: str) -> tuple[list[str], list[str]]:
        """Options that are not what they were: those that change what comes out, and the others."""
        changed = [
            name
            for name, value in options.items()
            if name in self.options and self.options[name] != jsonable(value)
        ]
        texts = {name: f"--{name} is {options[name]}, was {self.options[name]}" for name in changed}
        serious = [text for name, text in texts.items() if name not in HARMLESS_OPTIONS]
        serious += (
            ["the training pairs, or those that choose the epoch, are others"]
            if data != self.data
            else []
        )
        return serious, [text for name, text in texts.items() if name in HARMLESS_OPTIONS]


def weights_path(folder: Path, epoch: int | str) -> Path:
    """`pytorch_model.bin.<epoch>`."""
    return folder / f"{WEIGHTS_FILE}.{epoch}"


def newest_state(folder: Path) -> ResumePoint | None:
    """The newest state whose checksum is right, each damaged one told; None where the folder has no state at all.

    Raises ValueError where it has some and none is sound.
    """
    states = list_states(folder)
    for path in states:
        try:
            return _verify(path)
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
        newest = next(iter(list_states(path.parent)), None)
        raise FileNotFoundError(
            f"no file {state}, which --resume_model needs"
            + (
                f"; {newest} is what this run continues from"
                if newest
                else "; to start afresh from weights give --init_model"
            )
        )
    return _verify(state)


def state_at(url: Address, cache_dir: str | None) -> ResumePoint:
    """The state at an address, brought into the cache, and beside it what the run's folder needs to go on; errors as above."""
    folder, shelf, name = cache_path(url, cache_dir)
    if url != folder.joined(name):
        raise ValueError(
            f"--resume_model {url}: an address with a query has no neighbours, which a state needs"
        )
    state = shelf / _state_name(name)
    sidecar_path(state).unlink(missing_ok=True)  # another run may have written there since
    sidecar = folder.joined(sidecar_path(state).name)
    fetch(sidecar, sidecar_path(state))
    sha256 = read_json(sidecar_path(state), dict).get("sha256")
    if not isinstance(sha256, str):
        raise ValueError(f"{sidecar} is no sidecar of a training state")
    fetch(folder.joined(state.name), state, sha256)
    point = _verify(state)
    for file in companion_files(point):
        (shelf / file).unlink(missing_ok=True)
        fetch(folder.joined(file), shelf / file)
    return point


def companion_files(point: ResumePoint) -> list[str]:
    """What beside a state its run goes on with: the scores so far, the weights of the best epoch and of one not judged yet."""
    progress = point.progress
    epochs = {
        progress.chosen_epoch,
        progress.epoch if progress.unjudged_loss is not None else -1,
    } - {-1}
    return ([HISTORY_FILE] if progress.epoch else []) + [
        f"{WEIGHTS_FILE}.{epoch}" for epoch in sorted(epochs)
    ]


def _state_name(name: str) -> str:
    """Of the state that belongs to `pytorch_model.bin.<epoch>`, or the state's own; ValueError for what is neither."""
    match = re.fullmatch(
        rf"{re.escape(WEIGHTS_FILE)}\.(\d+)|{re.escape(STATE_FILE)}\.\d+(?:\.\d+)?", name
    )
    if match is None:
        raise ValueError(
            f"--resume_model {name}: expected a file {WEIGHTS_FILE}.<epoch> or {STATE_FILE}.<epoch>[.<steps>] of a run"
        )
    return f"{STATE_FILE}.{match.group(1)}" if match.group(1) else name


def _verify(path: Path) -> ResumePoint:
    """ValueError or OSError where state and sidecar do not fit."""
    found = read_json(sidecar_path(path), dict)
    kinds = {"sha256": str, "progress": dict, "options": dict, "data": str, "card": dict}
    if not (
        all(isinstance(found.get(name), kind) for name, kind in kinds.items())
        and _is_progress(found["progress"])
    ):
        raise ValueError(f"{sidecar_path(path)} is no sidecar of a training state")
    if sha256_of(path) != found["sha256"]:
        raise ValueError(f"{path} is damaged: its SHA-256 is not the one in {sidecar_path(path)}")
    card = check_model_info(found["card"], str(sidecar_path(path)))
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


def sidecar_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def list_states(folder: Path) -> list[Path]:
    """The run's states, the newest place first."""
    places = {}
    for path in folder.glob(f"{STATE_FILE}.*"):
        if match := re.fullmatch(rf"{re.escape(STATE_FILE)}\.(\d+)(?:\.(\d+))?", path.name):
            places[path] = (
                int(match.group(1)),
                int(match.group(2)) if match.group(2) else math.inf,
            )  # all of the epoch
    return sorted(places, key=places.get, reverse=True)


def saved_epochs(folder: Path) -> list[int]:
    """The epochs whose weights are there."""
    names = (
        re.fullmatch(rf"{re.escape(WEIGHTS_FILE)}\.(\d+)", path.name)
        for path in folder.glob(f"{WEIGHTS_FILE}.*")
    )
    return [int(match.group(1)) for match in names if match]


def jsonable(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value
