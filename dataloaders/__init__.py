"""Datasets of image pairs: which one a run reads."""

from pathlib import Path

from dataloaders.clevr_change import load_clevr_change
from dataloaders.pairs import Scene
from dataloaders.spot_the_diff import load_spot_the_diff


def load_scenes(datatype: str, data_path: str | Path, features_path: str | Path | None, split: str) -> list[Scene]:
    """A dataset's split in file order (SPEC §3)."""
    if datatype == "spot":
        return load_spot_the_diff(data_path, features_path, split)
    return load_clevr_change(data_path, split)
