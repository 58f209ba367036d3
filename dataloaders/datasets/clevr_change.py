"""CLEVR-Change: three folders of images, captions of changes and of no change, splits and types.

Source: docs/reference.md, Data.
"""

import os
import reprlib
from collections.abc import Sequence
from pathlib import Path

from dataloaders.clevr_vocabulary import NO_CHANGE_SENTENCES, WORDS
from dataloaders.pairs import (
    ALL_PAIRS,
    SPLITS,
    ImagePair,
    PairDataset,
    distractor_id_of,
    split_change_distractor,
)
from system.escaping import has_control_characters
from system.files import is_safe_file_name
from system.json_files import read_json

KEY_PREFIX = "CLEVR_default_"
# Folder of the before, after and distractor images → how the names of its images begin.
FOLDERS = {
    "images": KEY_PREFIX,
    "sc_images": "CLEVR_semantic_",
    "nsc_images": "CLEVR_nonsemantic_",
}
CAPTION_FILES = ("change_captions.json", "no_change_captions.json")
TYPE_FILE = "type_mapping.json"


class ClevrChange(PairDataset):
    """CLEVR-Change, and drawn scenes in its layout; all files are below data_path.

    The published recipe does not finetune the token embedding on it.
    """

    name = "clevr"
    title = "data in CLEVR-Change's layout"
    trains_token_embedding = False
    ground_truth_splits = SPLITS
    no_change_phrases = NO_CHANGE_SENTENCES
    vocabulary = WORDS

    def pairs(self, split: str, need_images: bool = True) -> list[ImagePair]:
        root = self.source.data_path
        if not root.is_dir():
            raise FileNotFoundError(f"no folder {root} (--data_path)")
        names = read_split(root, split)
        captions = {file: read_captions(root / file) for file in CAPTION_FILES}
        for file, sentences in captions.items():
            missing = [name for name in names if name not in sentences]
            if missing:
                raise ValueError(
                    f"{root / file} has no captions for {KEY_PREFIX}{missing[0]}, "
                    f"which splits.json lists under {split}"
                )
        self._check_images(names if need_images else [], split)
        change, no_change = captions.values()
        return [self._pair(name, change[name], no_change[name]) for name in names]

    def annotation_file(self, split: str) -> Path:
        return self.source.data_path / "splits.json"

    def ground_truth(self, split: str) -> list[tuple[str, list[str]]]:
        """The captions of all splits: change captions first, then no-change captions."""
        change, no_change = [read_captions(self.source.data_path / file) for file in CAPTION_FILES]
        distractors = [(distractor_id_of(name), texts) for name, texts in no_change.items()]
        return [*change.items(), *distractors]

    def subsets(self, pairs: Sequence[ImagePair]) -> dict[str, list[str]]:
        subsets = split_change_distractor(pairs)
        for change_type, names in read_change_types(self.source.data_path).items():
            if change_type in subsets:
                raise ValueError(
                    f"{self.source.data_path / TYPE_FILE}: a type is called {change_type!r}, which "
                    f"is reserved for the scores over all {change_type}s"
                )
            wanted = set(names)
            subsets[change_type] = [pair.id for pair in pairs if pair.id in wanted]
        return subsets

    def _check_images(self, names: Sequence[str], split: str) -> None:
        for folder, prefix in FOLDERS.items():
            path = self.source.data_path / folder
            if not path.is_dir():
                raise FileNotFoundError(f"no image folder {path}")
            present = set(os.listdir(path))
            missing = [prefix + name for name in names if prefix + name not in present]
            if missing:
                raise FileNotFoundError(
                    f"no image {path / missing[0]}, which splits.json lists under {split}"
                )

    def _pair(self, name: str, change: Sequence[str], no_change: Sequence[str]) -> ImagePair:
        before, after, distractor = [
            str(self.source.data_path / folder / (prefix + name))
            for folder, prefix in FOLDERS.items()
        ]
        return ImagePair(name, before, after, tuple(change), distractor, tuple(no_change))


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Image name (`000000.png`) → sentences, in file order. Raises ValueError for other content."""
    captions = {}
    for key, sentences in read_json(path, dict).items():
        name = key.removeprefix(KEY_PREFIX)
        is_name = name != key and is_safe_file_name(name)
        is_list = isinstance(sentences, list)
        if not (is_name and is_list and all(isinstance(text, str) for text in sentences)):
            expected = f'"{KEY_PREFIX}000000.png": ["…", …]'
            raise ValueError(f"{path}: entry {reprlib.repr(key)} is not {expected}")
        captions[name] = sentences
    return captions


def read_split(data_path: str | Path, split: str) -> list[str]:
    """The image names (`000000.png`) of a split, in file order."""
    path = Path(data_path) / "splits.json"
    numbers = read_json(path, dict).get(split)
    is_list = isinstance(numbers, list)
    if not (is_list and all(type(number) is int and number >= 0 for number in numbers)):
        raise ValueError(f'{path}: "{split}" is not a list of scene numbers')
    if len(set(numbers)) < len(numbers):
        raise ValueError(f'{path}: "{split}" lists a scene twice')
    return [f"{number:06d}.png" for number in numbers]


def read_change_types(data_path: str | Path) -> dict[str, list[str]]:
    """Change type → image names, if the data has a type_mapping.json; else nothing."""
    path = Path(data_path) / TYPE_FILE
    return read_type_mapping(path) if path.is_file() else {}


def read_type_mapping(path: Path) -> dict[str, list[str]]:
    """Change type → image names, or ids, of a file. Raises ValueError for other content."""
    types = read_json(path, dict)
    for change_type, names in types.items():
        shown = reprlib.repr(change_type)
        if not (isinstance(names, list) and all(type(name) in (str, int) for name in names)):
            raise ValueError(f"{path}: {shown} is not a list of image names")
        if has_control_characters(change_type):
            raise ValueError(f"{path}: the type {shown} has a control character in its name")
    if ALL_PAIRS in types:
        raise ValueError(
            f"{path}: a type is called {ALL_PAIRS!r}, which is reserved for the scores over all "
            "pairs"
        )
    return {change_type: [str(name) for name in names] for change_type, names in types.items()}
