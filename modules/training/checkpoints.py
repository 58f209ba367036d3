"""A run's weights and states: saved atomically, old ones removed, the best one linked."""

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modules.training.progress import Progress
from modules.training.states import (
    STATE_FILE,
    ResumePoint,
    companion_files,
    list_complete_states,
    list_states,
    saved_epochs,
    sidecar_path,
    to_jsonable,
    weights_path,
)
from system.escaping import summarize_error
from system.files import DiskFull, atomic_write, check_free_space, compute_sha256, link_or_copy
from system.json_files import read_json, write_json

log = logging.getLogger(__name__)


class Checkpoints:
    """One run's `pytorch_model.bin.*` and `training_state.bin.*`.

    A new run in a folder with an earlier run's states removes those once it has saved its own.
    """

    def __init__(
        self,
        folder: Path,
        keep: int,
        options: Mapping[str, Any],
        data: str,
        info: Mapping[str, Any],
        is_new_run: bool = False,
    ) -> None:
        """`keep` is the number of newest states and weights kept besides the best weights; -1: all.

        `options`, `data` (a fingerprint) and `info` (of the model) go into the sidecars.
        """
        self.folder = folder
        self.keep = keep
        self.options = {name: to_jsonable(value) for name, value in options.items()}
        self.data = data
        self.info = info
        self._earlier_run = list_states(folder) if is_new_run else []

    def save_weights(self, weights: Mapping[str, Tensor], epoch: int) -> Path:
        """`pytorch_model.bin.<epoch>`, under the released names. Raises OSError for a full disk."""
        path = weights_path(self.folder, epoch)
        self._save(path, weights)
        return path

    def save_state(
        self, tensors: Mapping[str, Any], progress: Progress, steps: int | None = None
    ) -> Path:
        """Save the state after `steps` of an epoch, or after all of it, and remove older ones.

        Raises OSError for a full disk.
        """
        name = f"{STATE_FILE}.{progress.epoch}"
        if steps is not None:
            name += f".{steps}"
        path = self.folder / name
        self._save(path, tensors)
        self._write_sidecar(path, progress, compute_sha256(path))
        stale = [state for state in self._earlier_run if state != path]
        self._remove(stale, "an earlier run's")
        self._earlier_run = []
        if self.keep >= 0:
            self._remove(list_states(self.folder)[self.keep :])
        return path

    def record_evaluation(self, progress: Progress) -> None:
        """Put the run's progress after an evaluation next to the epoch's state.

        Then `pytorch_model.bin.best` is the chosen epoch's, and older weights are removed.
        """
        state = self.folder / f"{STATE_FILE}.{progress.epoch - 1}"
        sha256 = read_json(sidecar_path(state), dict)["sha256"]
        self._write_sidecar(state, progress, sha256)
        self.link_best(progress)
        self._remove_old_weights(progress)

    def link_best(self, progress: Progress) -> None:
        """Make `pytorch_model.bin.best` the chosen epoch's weights."""
        chosen = weights_path(self.folder, progress.chosen_epoch)
        link_or_copy(chosen, weights_path(self.folder, "best"))

    def _remove_old_weights(self, progress: Progress) -> None:
        if self.keep < 0:
            return
        # Later epochs are an earlier run's: a new run replaces them one by one.
        saved = [epoch for epoch in saved_epochs(self.folder) if epoch < progress.epoch]
        old = sorted(saved, reverse=True)[self.keep :]
        self._remove(
            weights_path(self.folder, epoch) for epoch in old if epoch != progress.chosen_epoch
        )

    def _save(self, path: Path, tensors: Mapping[str, Any]) -> None:
        needed = _size_in_bytes(tensors)
        self._check_space(path, needed)
        try:
            with atomic_write(path) as temporary:
                torch.save(tensors, temporary)
        except (RuntimeError, OSError) as error:  # torch raises RuntimeError for a full disk
            self._check_space(path, needed)
            reason = getattr(error, "strerror", None) or summarize_error(error)
            raise OSError(f"cannot write {path}: {reason}{self._recovery_hint()}") from None

    def _check_space(self, path: Path, needed: int) -> None:
        try:
            check_free_space(self.folder, needed, f"cannot write {path}")
        except DiskFull as error:
            raise DiskFull(f"{error}{self._recovery_hint()}") from None

    def _recovery_hint(self) -> str:
        if list_complete_states(self.folder):
            return "; make room, and --resume auto continues from the last state"
        return "; make room"

    def _write_sidecar(self, path: Path, progress: Progress, sha256: str) -> None:
        content = {
            "sha256": sha256,
            "progress": asdict(progress),
            "options": self.options,
            "data": self.data,
            "card": self.info,  # the key of earlier versions
        }
        write_json(sidecar_path(path), content)

    def _remove(self, paths: Iterable[Path], reason: str = "") -> None:
        for path in paths:
            path.unlink(missing_ok=True)
            sidecar_path(path).unlink(missing_ok=True)
            log.info("removed %s (%s)", path, reason or f"--keep_checkpoints {self.keep}")


def import_state(resume: ResumePoint, folder: Path) -> None:
    """Copy a state from elsewhere, and the files its run needs, into a run's folder."""
    if resume.path.parent.resolve() == folder.resolve():
        return
    names = [*companion_files(resume), resume.path.name, sidecar_path(resume.path).name]
    for name in names:
        with atomic_write(folder / name) as temporary:
            shutil.copyfile(resume.path.with_name(name), temporary)


def _size_in_bytes(value: Any) -> int:
    """The size of all tensors in nested dicts and lists."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(_size_in_bytes, value.values()))
    if isinstance(value, list | tuple):
        return sum(map(_size_in_bytes, value))
    return 0
