"""Evaluation of a split: scores and sample pictures after each epoch, a report of the last one."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

NUM_SAMPLES = 6  # pairs in the picture of an epoch
REPORT_FILE = "report.html"


@dataclass(frozen=True)
class RunDescription:
    """Where an evaluation's files go, and what they say about the run."""

    folder: Path
    data: str  # --data_path as given, for the title
    split: str
    options: Mapping[str, Any] = field(default_factory=dict)  # flag → value, as given
    defaults: Mapping[str, Any] = field(default_factory=dict)  # flag → value, not given

    @property
    def report_path(self) -> Path:
        return self.folder / REPORT_FILE

    def list_facts(self, checkpoint: str) -> dict[str, Any]:
        """What led to the scores of a checkpoint: versions, then the options that were given."""
        return {
            "checkpoint": checkpoint,
            "torch": torch.__version__,
            "Python": platform.python_version(),
            **self.options,
        }
