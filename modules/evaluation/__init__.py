"""Evaluation of either stage, epoch after epoch: scores, sample pictures, and at the end the report."""

import platform
from collections.abc import Mapping
from typing import Any

import torch

from modules.options import Options

NUM_SAMPLES = 6  # pairs on the picture of an epoch


REPORT_FILE = "report.html"


def run_facts(checkpoint: str, options: Options) -> dict[str, Mapping[str, Any]]:
    """What made the evaluated weights and scores: `facts`, and options left at their `defaults`."""
    versions = {
        "checkpoint": checkpoint,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    given, defaults = (
        {f"--{name}": value for name, value in options.items(changed)} for changed in (True, False)
    )
    return {"facts": {**versions, **given}, "defaults": defaults}
