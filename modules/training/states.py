"""Training states on disk: how they are named, found, checked and compared with options.

`training_state.bin.<epoch>` has all that is needed to continue after an epoch, and
`training_state.bin.<epoch>.<steps>` all that is needed to continue inside one. A JSON sidecar holds
its SHA-256, the run's progress and options. It is written last, so a state without one is
incomplete and does not count. Random states are not saved: every draw is made from (seed, epoch,
position, process).
"""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from modules.training.history import HISTORY_FILE
from modules.training.progress import Progress
from modules.weights.model_info import check_model_info
from modules.weights.tensor_files import read_torch_file
from system.download import fetch, locate_in_cache
from system.escaping import name_as_text
from system.files import compute_sha256
from system.json_files import read_json
from system.urls import Location

log = logging.getLogger(__name__)

WEIGHTS_FILE = "pytorch_model.bin"
STATE_FILE = "training_state.bin"
WEIGHTS_PATTERN = re.compile(re.escape(WEIGHTS_FILE) + r"\.(\d+)")  # epoch
STATE_PATTERN = re.compile(re.escape(STATE_FILE) + r"\.(\d+)(?:\.(\d+))?")  # epoch, steps
# Options that do not change the result: where files are, how they are read, what is logged and
# kept. The fingerprint tells whether the data are the same.
HARMLESS_OPTIONS = frozenset(
    {
        "output_dir",
        "device",
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
        "limit",
        "patience",
    }
)
SIDECAR_TYPES = {"sha256": str, "progress": dict, "options": dict, "data": str, "card": dict}


@dataclass(frozen=True)
class ResumePoint:
    """A state that was found and checked."""

    path: Path
    progress: Progress
    options: dict[str, Any]
    data: str  # the fingerprint of the training data
    info: dict[str, Any]  # of the model, as in model.json

    def tensors(self) -> dict[str, Any]:
        """`Trainer.tensors` as saved. Raises ValueError if the file holds something else."""
        content = read_torch_file(self.path)
        weights = content.get("model") if isinstance(content, dict) else None
        is_filled = isinstance(weights, dict) and len(weights) > 0
        if not is_filled or not all(isinstance(value, Tensor) for value in weights.values()):
            raise ValueError(f"{self.path} holds no training state")
        return content

    def changed_options(self, options: Mapping[str, Any], data: str) -> tuple[list[str], list[str]]:
        """Describe what differs from the present options.

        First comes what affects the result, then what does not. `data` is the present fingerprint.
        Options that the saved run did not know are not compared.
        """
        affecting: list[str] = []
        harmless: list[str] = []
        for name, value in options.items():
            if name not in self.options or self.options[name] == to_jsonable(value):
                continue
            changes = harmless if name in HARMLESS_OPTIONS else affecting
            changes.append(f"--{name} is {value}, was {self.options[name]}")
        if data != self.data:
            affecting.append("the pairs to train on, or those that choose the epoch, have changed")
        return affecting, harmless


def weights_path(folder: Path, epoch: int | str) -> Path:
    """`pytorch_model.bin.<epoch>`."""
    return folder / f"{WEIGHTS_FILE}.{epoch}"


def sidecar_path(path: Path) -> Path:
    """The JSON file next to a state."""
    return path.with_name(f"{path.name}.json")


def newest_state(folder: Path) -> ResumePoint | None:
    """The newest intact state; None if the folder has no complete state. Logs corrupt ones.

    Raises ValueError if it has complete states and all are corrupt.
    """
    states = list_complete_states(folder)
    for path in states:
        try:
            return _verify(path)
        except (ValueError, OSError) as error:
            log.warning("%s: trying an older state", error)
    if states:
        raise ValueError(
            f"no state in {folder} can be used; to start a new run there, leave out --resume auto"
        )
    return None


def named_state(name: str) -> ResumePoint:
    """The state of `pytorch_model.bin.<epoch>`, or the `training_state.bin.…` that is named.

    Raises ValueError or OSError if it cannot be used.
    """
    path = Path(name)
    state = path.with_name(_state_name(path.name))
    if state.is_file():
        return _verify(state)
    newest = next(iter(list_complete_states(path.parent)), None)
    advice = "to start a new run from weights, give --init_model"
    if newest:
        advice = f"the newest state of this run is {newest}"
    raise FileNotFoundError(f"no file {state}, which --resume_model needs; {advice}")


def state_at(url: Location, cache_dir: str | None) -> ResumePoint:
    """Download a state and the files its run needs; returns the state, now in the cache.

    Raises ValueError or OSError if it cannot be used.
    """
    remote_folder, local_folder, name = locate_in_cache(url, cache_dir)
    if url != remote_folder.joined(name):
        raise ValueError(
            f"--resume_model {url}: a state needs other files from the same folder, "
            "and a URL with a query gives no access to them"
        )
    state = local_folder / _state_name(name)
    sidecar = sidecar_path(state)
    sidecar.unlink(missing_ok=True)  # another run may have written there since
    remote_sidecar = remote_folder.joined(sidecar.name)
    fetch(remote_sidecar, sidecar)
    sha256 = read_json(sidecar, dict).get("sha256")
    if not isinstance(sha256, str):
        raise ValueError(f"{remote_sidecar} does not describe a training state")
    fetch(remote_folder.joined(state.name), state, sha256)
    resume = _verify(state)
    for companion in companion_files(resume):
        (local_folder / companion).unlink(missing_ok=True)
        fetch(remote_folder.joined(companion), local_folder / companion)
    return resume


def companion_files(resume: ResumePoint) -> list[str]:
    """The other files in a state's folder that its run needs to continue.

    These are the scores so far, and the weights of the best epoch and of one not evaluated yet.
    """
    progress = resume.progress
    epochs = {progress.chosen_epoch}
    if progress.unjudged_loss is not None:
        epochs.add(progress.epoch)
    history = [HISTORY_FILE] if progress.epoch else []
    return history + [f"{WEIGHTS_FILE}.{epoch}" for epoch in sorted(epochs) if epoch >= 0]


def list_states(folder: Path) -> list[Path]:
    """A run's states, the latest in the training first."""
    positions = {}
    for path in folder.glob(f"{STATE_FILE}.*"):
        match = STATE_PATTERN.fullmatch(path.name)
        if match:
            epoch, steps = match.groups()
            # A name without a number of steps means the end of the epoch.
            steps_done = math.inf if steps is None else int(steps)
            positions[path] = (int(epoch), steps_done)
    return sorted(positions, key=positions.get, reverse=True)


def list_complete_states(folder: Path) -> list[Path]:
    """Like `list_states`, but only those with a sidecar: a run killed in a save leaves others."""
    return [path for path in list_states(folder) if sidecar_path(path).is_file()]


def saved_epochs(folder: Path) -> list[int]:
    """The epochs whose weights are in a run's folder."""
    epochs = []
    for path in folder.glob(f"{WEIGHTS_FILE}.*"):
        match = WEIGHTS_PATTERN.fullmatch(path.name)
        if match:
            epochs.append(int(match.group(1)))
    return epochs


def to_jsonable(value: Any) -> Any:
    """An option's value as JSON returns it; paths need not be UTF-8."""
    if isinstance(value, str):
        return name_as_text(value)
    return list(value) if isinstance(value, tuple) else value


def _state_name(name: str) -> str:
    """`pytorch_model.bin.<epoch>` → the name of its state. A state's name stays.

    Raises ValueError for any other name.
    """
    weights = WEIGHTS_PATTERN.fullmatch(name)
    if weights:
        return f"{STATE_FILE}.{weights.group(1)}"
    if STATE_PATTERN.fullmatch(name):
        return name
    raise ValueError(
        f"--resume_model {name}: expected a file {WEIGHTS_FILE}.<epoch> or "
        f"{STATE_FILE}.<epoch>[.<steps>] of a run"
    )


def _verify(path: Path) -> ResumePoint:
    """Check a state against its sidecar. Raises ValueError or OSError if they do not fit."""
    sidecar = sidecar_path(path)
    content = read_json(sidecar, dict)
    types_fit = [isinstance(content.get(name), type_) for name, type_ in SIDECAR_TYPES.items()]
    if not all(types_fit) or not _is_progress(content["progress"]):
        raise ValueError(f"{sidecar} does not describe a training state")
    if compute_sha256(path) != content["sha256"]:
        raise ValueError(f"{path} is corrupt: its SHA-256 is not the one in {sidecar}")
    progress = Progress(**content["progress"])
    info = check_model_info(content["card"], str(sidecar))
    return ResumePoint(path, progress, content["options"], content["data"], info)


def _is_progress(values: dict[str, Any]) -> bool:
    """Whether these are all values of a Progress, each of its type and in its range."""
    if values.keys() != {field.name for field in fields(Progress)}:
        return False
    counts = [values[name] for name in ("epoch", "batches", "skipped", "epochs_without")]
    return all(map(_is_count, counts)) and _has_scores(values) and _has_losses(values)


def _has_scores(values: dict[str, Any]) -> bool:
    best_epoch = values["best_epoch"]
    is_finished = type(best_epoch) is int and -1 <= best_epoch < values["epoch"]
    return is_finished and type(values["best_score"]) is float


def _has_losses(values: dict[str, Any]) -> bool:
    if type(values["unjudged_loss"]) not in (float, NoneType):
        return False
    return isinstance(values["losses"], list) and all(map(_is_sum_and_count, values["losses"]))


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_sum_and_count(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2
    return is_pair and all(type(number) is float for number in value)
