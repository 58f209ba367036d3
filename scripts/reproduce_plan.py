"""The steps of scripts/reproduce.py: their commands, and how a finished one is recognized.

A step is finished when its result lies where it belongs. One that was broken off has none, so it is
done again; a training goes on from its last saved state.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from dataloaders.datasets import open_dataset
from dataloaders.datasets.spot_the_diff import AFTER_ENDING, read_annotations
from dataloaders.pairs import SPLITS
from preprocess.download import CLEVR_FILES, PAIRS, SCENES
from system.files import choose_cache_folder
from system.json_files import read_json
from system.places import choose_downloads_folder, list_ckpts_folders

ADAPTATION, FINETUNING = "adapt", "finetune"
STAGES = {ADAPTATION: "retrieval", FINETUNING: "caption"}  # as metrics.json calls them
BEST_WEIGHTS = "pytorch_model.bin.best"
LAST_FILE = "report.html"  # that a training writes
CLIP_FILE = "ViT-B-32.pt"
CLIP_OPTION = "--pretrained_clip_name"

# A rehearsal: few drawn scenes, and the small CLIP of scripts/demo.sh with random weights.
SMALL_SPLITS = {"train": 24, "val": 8, "test": 8}
SMALL_MODEL = """--pretrained_clip_name modules/clip-demo.json --intra_num_hidden_layers 0
  --linear_patch 3d --freeze_layer_num -1 --num_thread_reader 0 --max_words 24 --batch_size 12
  --batch_size_val 8 --epochs 2 --n_display 1"""
SMALL_STAGES = {
    ADAPTATION: "--lr 7e-4 --coef_lr 1",
    FINETUNING: "--decoder_model decoder-demo --lr 1e-3 --coef_lr 2 --freeze_vision",
}


class Dataset(NamedTuple):
    """A dataset of the paper."""

    name: str
    title: str
    folder: str
    """Where preprocess/download.py puts it."""
    image_folder: str
    """For --features_path, below `folder`."""
    lists: tuple[str, ...]
    """The files that training reads annotations from, below `folder`."""
    raw_lists: tuple[str, ...]
    """The files that `lists` are made from, if they are not the download's own."""
    pairs: Mapping[str, int]
    """How many pairs each split has."""
    count_pairs: Callable[[Path], Mapping[str, int]]
    """Counts them in a folder. Raises OSError or ValueError if a file is missing or wrong."""
    download_size: int
    """Gigabytes that the download needs, with its archive."""
    by_hand: str
    """Which files belong where, and where they come from; {} is the folder."""


def count_spot_pairs(folder: Path) -> dict[str, int]:
    """The ids in the lists of Spot-the-Diff, all of whose images are there."""
    images = set(os.listdir(folder / "images_test"))
    counts = {}
    for split in SPLITS:
        ids = {image_id for image_id, _ in read_annotations(folder / f"{split}.json")}
        needed = {f"{name}{ending}.png" for name in ids for ending in ("", AFTER_ENDING)}
        if not needed <= images:
            raise FileNotFoundError(f"no image {min(needed - images)}")
        counts[split] = len(ids)
    return counts


def count_clevr_pairs(folder: Path) -> dict[str, int]:
    """The scenes of CLEVR-Change, all of whose images and captions are there."""
    dataset = open_dataset("clevr", folder)
    dataset.subsets([])  # reads type_mapping.json
    return {split: len(dataset.checked_pairs(split)) for split in SPLITS}


DATASETS = {
    "spot": Dataset(
        name="spot",
        title="Spot-the-Diff",
        folder="images",
        image_folder="images_test",
        lists=tuple(f"reformat_{split}.json" for split in SPLITS),
        raw_lists=tuple(f"{split}.json" for split in SPLITS),
        pairs=PAIRS,
        count_pairs=count_spot_pairs,
        download_size=7,
        by_hand="""\
  {0}/train.json, val.json, test.json
      from https://github.com/harsh19/spot-the-diff, folder data/annotations
  {0}/images_test/ID.png and ID_2.png
      from the archive of resized images that data/get_images.txt there links to
  (python preprocess/download.py spot --to {0} --archive FILE unpacks an archive
  that a browser saved)""",
    ),
    "clevr": Dataset(
        name="clevr",
        title="CLEVR-Change",
        folder="data",
        image_folder="",
        lists=CLEVR_FILES,
        raw_lists=(),
        pairs=SCENES,
        count_pairs=count_clevr_pairs,
        download_size=45,
        by_hand="""\
  {0}/images, sc_images, nsc_images, change_captions.json, no_change_captions.json,
      splits.json, type_mapping.json
      from the archive that https://github.com/Seth-Park/RobustChangeCaptioning links to
  (python preprocess/download.py clevr --to {0} --archive FILE unpacks it)""",
    ),
}


@dataclass(frozen=True)
class Step:
    """A command, and a function that tells whether its result is there."""

    title: str
    command: tuple[str, ...]
    is_finished: Callable[[], bool]
    report: Path | None = None
    """The file that gets what the command prints, if it succeeds."""


class Training(NamedTuple):
    """One stage with one seed; `choice` is the split that chooses its epoch."""

    seed: int
    choice: str
    stage: str

    def describe(self) -> str:
        """What it is, in a heading."""
        number = list(STAGES).index(self.stage) + 1
        return f"seed {self.seed}, epochs chosen on {self.choice}: stage {number}"


@dataclass(frozen=True)
class Reproduction:
    """What is reproduced, with which settings, and where everything lies. Paths are absolute."""

    dataset: Dataset
    data: Path
    output: Path
    seeds: tuple[int, ...]
    choices: tuple[str, ...]
    is_small: bool = False
    options: tuple[str, ...] = ()
    """Further options of all trainings."""

    @property
    def trainings(self) -> list[Training]:
        """All trainings in order, one seed after the other."""
        return [
            Training(seed, choice, stage)
            for seed in self.seeds
            for choice in self.choices
            for stage in STAGES
        ]

    @property
    def ground_truth(self) -> Path:
        """The reference captions."""
        return self.output / "gt" / f"{self.dataset.name}_total_change_captions_reformat.json"

    def list_downloads(self) -> list[Step]:
        """The steps that bring what is needed. None needs another."""
        dataset = self.dataset
        if self.is_small:
            sizes = [word for split in SPLITS for word in (f"--{split}", str(SMALL_SPLITS[split]))]
            drawing = ("python", "preprocess/synthesize.py", "--datatype", dataset.name)
            command = (*drawing, "--output", str(self.data), "--overwrite", *sizes)
            return [Step("draw scenes", command, self.has_data)]
        program = ("python", "preprocess/download.py")
        command = (*program, dataset.name, "--to", str(self.data))
        steps = [Step(f"download {dataset.title}", command, self.has_data)]
        if CLIP_OPTION not in self.options:
            steps.append(Step("download CLIP's ViT-B/32", (*program, "clip"), has_clip))
        return steps

    def list_steps(self) -> list[Step]:
        """Everything after the downloads, in order."""
        return [*self._list_preparations(), *map(self._make_training_step, self.trainings)]

    def has_data(self) -> bool:
        """Whether the whole dataset is there: a smaller one is not the paper's."""
        expected = SMALL_SPLITS if self.is_small else self.dataset.pairs
        try:
            return self.dataset.count_pairs(self.data) == expected
        except (OSError, ValueError):
            return False

    def training_folder(self, training: Training) -> Path:
        """The run folder of a training."""
        return self.output.joinpath(
            f"seed-{training.seed}", f"by-{training.choice}", training.stage
        )

    def read_scores(self, training: Training) -> dict[str, Any] | None:
        """The test scores of a finished training; None if it is not finished."""
        folder = self.training_folder(training)
        if not all((folder / name).is_file() for name in (BEST_WEIGHTS, LAST_FILE)):
            return None
        try:
            scores = read_json(folder / "metrics.json", dict)
        except (OSError, ValueError):
            return None
        found = [scores.get(name) for name in ("stage", "datatype", "split")]
        return scores if found == [STAGES[training.stage], self.dataset.name, "test"] else None

    def _list_preparations(self) -> list[Step]:
        lists = [self.data / name for name in self.dataset.lists]
        datatype = ("--datatype", self.dataset.name, "--data_path", str(self.data))
        images = ("--features_path", str(self.data / self.dataset.image_folder))
        report = self.output / "check.txt"
        truth = ("python", "gt/eval_utils.py", *datatype, "--output", str(self.ground_truth))
        has_truth = partial(are_newer, [self.ground_truth], lists)
        check = ("python", "preprocess/check_dataset.py", *datatype, *images)
        return [
            *self._list_merging(lists),
            Step("write the reference captions", truth, has_truth),
            Step("check the dataset", check, partial(are_newer, [report], lists), report),
        ]

    def _list_merging(self, lists: Sequence[Path]) -> list[Step]:
        """The step that makes Spot-the-Diff's lists from its raw ones; nothing elsewhere."""
        raw = [self.data / name for name in self.dataset.raw_lists]
        if not raw:
            return []
        merge = ("python", "preprocess/reformat_dataset.py", "--data_path", str(self.data))
        return [Step("merge the annotations of each pair", merge, partial(are_newer, lists, raw))]

    def _make_training_step(self, training: Training) -> Step:
        """The published command, and behind it what differs."""
        folder = self.training_folder(training)
        words = ["bash", f"scripts/{training.stage}_{self.dataset.name}.sh"]
        words += ["--output_dir", str(folder), "--seed", str(training.seed)]
        words += ["--select_on", training.choice, "--resume", "auto"]
        if training.stage == FINETUNING:
            adapted = self.training_folder(training._replace(stage=ADAPTATION))
            words += ["--init_model", str(adapted / BEST_WEIGHTS)]
            words += ["--gt_dir", str(self.ground_truth.parent)]
        if self.is_small:
            words += [*SMALL_MODEL.split(), *SMALL_STAGES[training.stage].split()]
        return Step(
            training.describe(),
            (*words, *self.options),
            lambda: self.read_scores(training) is not None,
        )


def has_clip() -> bool:
    """Whether CLIP's weights are where a training looks for them."""
    folders = [choose_downloads_folder() / "modules", *list_ckpts_folders()]
    folders.append(choose_cache_folder(None))
    return any((folder / CLIP_FILE).is_file() for folder in folders)


def are_newer(results: Iterable[Path], sources: Iterable[Path]) -> bool:
    """Whether all files are there, and no result is older than a source."""
    try:
        oldest = min(path.stat().st_mtime for path in results)
        return oldest >= max(path.stat().st_mtime for path in sources)
    except FileNotFoundError:
        return False
