"""Datasets of image pairs: which one a run reads."""

from collections.abc import Sequence
from pathlib import Path

from dataloaders.datasets.clevr_change import load_clevr_change
from dataloaders.datasets.pair_table import load_pair_table
from dataloaders.datasets.spot_the_diff import load_spot_the_diff
from dataloaders.pairs import ImagePair
from dataloaders.storage.packed_list import PackedList


def load_pairs(
    datatype: str,
    data_path: str | Path,
    features_path: str | Path | None,
    split: str,
    need_images: bool = True,
) -> Sequence[ImagePair]:
    """A dataset's split in file order (SPEC §3), in memory that workers share. need_images=False lets images be missing."""
    if datatype == "pairs":
        return PackedList(load_pair_table(data_path, split, need_images))
    if datatype == "spot":
        return PackedList(load_spot_the_diff(data_path, features_path, split, need_images))
    return PackedList(load_clevr_change(data_path, split, need_images))
