"""The datasets by name. One line here, or an entry point of a package, adds another one.

Imports no dataset before one is opened: the command line reads the names.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from system.registry import Registry

if TYPE_CHECKING:
    from dataloaders.pairs import PairDataset

DATASETS = Registry(
    "dataset",
    {
        "spot": ".spot_the_diff:SpotTheDiff",
        "clevr": ".clevr_change:ClevrChange",
        "pairs": ".pair_table:PairTable",
    },
    package=__package__,
    group="clip4idc.datasets",
    members=(
        "name",
        "title",
        "trains_token_embedding",
        "ground_truth_splits",
        "protocols",
        "Settings",
        "defaults",
        "no_change_phrases",
        "vocabulary",
        "find_problems",
        "splits",
        "pairs",
        "annotation_file",
        "checked_pairs",
        "ground_truth",
        "references",
        "subsets",
        "download",
    ),
)


def open_dataset(
    name: str,
    data_path: str | Path,
    image_path: str | Path | None = None,
    gt_dir: str | Path = "gt",
    settings: Any = None,
) -> "PairDataset":
    """The dataset that --datatype calls `name`, opened; nothing is read yet.

    Raises ValueError for a name that is not registered, or a class that cannot be used.
    """
    from dataloaders.pairs import DataSource

    dataset_class = DATASETS[name]
    if dataset_class.name != name:
        raise ValueError(
            f"dataset {name!r} is registered, but its class has name = {dataset_class.name!r}"
        )
    images = None if image_path is None else Path(image_path)
    return dataset_class(DataSource(Path(data_path), images, Path(gt_dir), settings))
