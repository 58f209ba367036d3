"""Spot-the-Diff: lists of annotations, and images `<id>.png` and `<id>_2.png`.

Source: docs/reference.md, Data.
"""

import os
import reprlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dataloaders.pairs import ImagePair, PairDataset, find_repeated
from system.command import quote_script
from system.files import is_safe_file_name
from system.json_files import read_json

AFTER_ENDING = "_2"  # x.png is before, x_2.png is after
Annotation = tuple[str, list[str]]  # an id and its sentences


class SpotTheDiff(PairDataset):
    """Spot-the-Diff: `reformat_<split>.json` in data_path, all images in one folder.

    The ground truth of the test split is built from the raw list test.json, repeated ids included,
    as published. It does not cover the val split.
    """

    name = "spot"
    title = "Spot-the-Diff"
    ground_truth_splits = ("test",)

    def find_problems(self) -> list[str]:
        if self.source.image_path:
            return []
        return ["--features_path is required: the folder of Spot-the-Diff's images"]

    def pairs(self, split: str, need_images: bool = True) -> list[ImagePair]:
        path = self.annotation_file(split)
        if not path.is_file() and self._raw_file(split).is_file():
            script = "preprocess/reformat_dataset.py"
            command = quote_script(script, "--data_path", self.source.data_path)
            raise FileNotFoundError(f"no file {path}: make it with {command}")
        entries = read_annotations(path)
        repeated = find_repeated(image_id for image_id, _ in entries)
        if repeated is not None:
            raise ValueError(
                f"{path}: img_id {repeated} occurs twice; merge the entries of the raw list with "
                "preprocess/reformat_dataset.py"
            )
        folder = self.source.image_path
        if not folder.is_dir():
            raise FileNotFoundError(f"no image folder {folder} (--features_path)")
        present = set(os.listdir(folder))
        pairs = []
        for image_id, sentences in entries:
            names = (f"{image_id}.png", f"{image_id}{AFTER_ENDING}.png")
            missing = [name for name in names if name not in present]
            if need_images and missing:
                raise FileNotFoundError(
                    f"no image {folder / missing[0]}, which {path} lists under img_id {image_id}"
                )
            before, after = (str(folder / name) for name in names)
            pairs.append(ImagePair(names[0], before, after, tuple(sentences)))
        return pairs

    def annotation_file(self, split: str) -> Path:
        return self.source.data_path / f"reformat_{split}.json"

    def ground_truth(self, split: str) -> list[Annotation]:
        entries = read_annotations(self._raw_file(split))
        return [(f"{image_id}.png", sentences) for image_id, sentences in entries]

    def _raw_file(self, split: str) -> Path:
        return self.source.data_path / f"{split}.json"


def read_annotations(path: str | Path) -> list[Annotation]:
    """(id, sentences) of every entry of an annotation list. Raises ValueError for other content."""
    entries = []
    for number, entry in enumerate(read_json(path, list)):
        if not _is_annotation(entry):
            expected = '{"img_id": "…", "sentences": ["…", …]}'
            raise ValueError(f"{path}: entry {number} is not {expected}")
        image_id = str(entry["img_id"])
        if not is_safe_file_name(image_id):
            raise ValueError(
                f"{path}: entry {number} has the img_id {reprlib.repr(image_id)}, "
                "which is not a plain file name"
            )
        entries.append((image_id, entry["sentences"]))
    return entries


def _is_annotation(entry: Any) -> bool:
    if not isinstance(entry, dict):
        return False
    image_id = entry.get("img_id")
    sentences = entry.get("sentences")
    if not isinstance(image_id, str | int) or isinstance(image_id, bool):
        return False
    return isinstance(sentences, list) and all(isinstance(text, str) for text in sentences)


def merge_entries(entries: Iterable[Annotation]) -> list[dict[str, Any]]:
    """Merge the entries of each id: ids in order of first appearance, sentences in file order."""
    merged: dict[str, list[str]] = {}
    for image_id, sentences in entries:
        merged.setdefault(image_id, []).extend(sentences)
    return [{"img_id": image_id, "sentences": sentences} for image_id, sentences in merged.items()]
