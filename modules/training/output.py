"""TODO."""

import logging
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from modules.clip4idc import CLIP4IDC
from modules.training.progress import Progress
from modules.training.states import (
    STATE_FILE,
    WEIGHTS_FILE,
    ResumePoint,
    companion_files,
    jsonable,
    list_states,
    saved_epochs,
    sidecar_path,
    weights_path,
)
from system.files import atomic_write, error_line, sha256_of
from system.json_files import read_json, write_json

log = logging.getLogger(__name__)


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
        self.folder, self.keep, self.data, self.info = folder, keep, data, card
        self._earlier = list_states(folder) if afresh else []
        self.options = {name: jsonable(value) for name, value in options.items()}

    def import_state(self, point: ResumePoint) -> None:
        """Copy a state from elsewhere, and what its run goes on with, into this run's folder."""
        if point.path.parent.resolve() == self.folder.resolve():
            return
        for name in (*companion_files(point), point.path.name, sidecar_path(point.path).name):
            with atomic_write(self.folder / name) as temporary:
                shutil.copyfile(point.path.with_name(name), temporary)

    def save_weights(self, model: CLIP4IDC, epoch: int) -> None:
        """`pytorch_model.bin.<epoch>`, under the released names."""
        self._save(weights_path(self.folder, epoch), model.state_dict())

    def save_state(
        self, tensors: Mapping[str, Any], progress: Progress, steps: int | None = None
    ) -> Path:
        """The state after `steps` of an epoch, or after all of it; older ones go. OSError for a full disk."""
        path = self.folder / f"{STATE_FILE}.{progress.epoch}{'' if steps is None else f'.{steps}'}"
        self._save(path, tensors)
        self._write_sidecar(path, progress, sha256_of(path))
        self._remove((earlier for earlier in self._earlier if earlier != path), "an earlier run's")
        self._earlier = []
        if self.keep >= 0:
            self._remove(list_states(self.folder)[self.keep :])
        return path

    def save_progress(self, progress: Progress) -> None:
        """Put the standing after an evaluation beside the epoch's state, point `pytorch_model.bin.best` at the chosen epoch, and
        let go of weights that are neither the best nor among the last."""
        path = self.folder / f"{STATE_FILE}.{progress.epoch - 1}"
        self._write_sidecar(path, progress, read_json(sidecar_path(path), dict)["sha256"])
        link = self.folder / f".{WEIGHTS_FILE}.best"
        link.unlink(missing_ok=True)
        link.symlink_to(weights_path(self.folder, progress.chosen_epoch).name)
        link.replace(weights_path(self.folder, "best"))
        if self.keep >= 0:
            saved = sorted(
                (epoch for epoch in saved_epochs(self.folder) if epoch < progress.epoch),
                reverse=True,
            )
            self._remove(
                weights_path(self.folder, epoch)
                for epoch in saved[self.keep :]
                if epoch != progress.chosen_epoch
            )

    def _save(self, path: Path, tensors: Mapping[str, Any]) -> None:
        needed = _size_in_bytes(tensors)
        self._check_space(path, needed)
        try:
            with atomic_write(path) as temporary:
                torch.save(tensors, temporary)
        except (RuntimeError, OSError) as error:  # RuntimeError is what torch makes of a full disk
            self._check_space(path, needed)
            reason = getattr(error, "strerror", None) or error_line(error)
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
            if list_states(self.folder)
            else "; make room"
        )

    def _write_sidecar(self, path: Path, progress: Progress, sha256: str) -> None:
        write_json(
            sidecar_path(path),
            {
                "sha256": sha256,
                "progress": asdict(progress),
                "options": self.options,
                "data": self.data,
                "card": self.info,
            },
        )

    def _remove(self, paths: Iterable[Path], reason: str = "") -> None:
        for path in paths:
            path.unlink(missing_ok=True)
            sidecar_path(path).unlink(missing_ok=True)
            log.info("removed %s (%s)", path, reason or f"--keep_checkpoints {self.keep}")


def _size_in_bytes(value: Any) -> int:
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
    return sum(map(_size_in_bytes, parts))


def append_history(path: Path, row: dict[str, float], fresh: bool) -> None:
    rows = [] if fresh or not path.is_file() else pd.read_csv(path).to_dict("records")
    rows = [old for old in rows if old["epoch"] < row["epoch"]] + [row]
    with atomic_write(path) as temporary:
        pd.DataFrame(rows).to_csv(temporary, index=False)
