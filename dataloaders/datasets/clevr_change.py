"""CLEVR-Change's files: splits, captions of changes and of none, three folders of images (SPEC §3)."""

import os
import reprlib
from pathlib import Path

from dataloaders.pairs import ImagePair, check_pairs
from system.escaping import has_control_characters
from system.files import is_safe_file_name
from system.json_files import read_json

FOLDERS = {
    "images": "CLEVR_default_",
    "sc_images": "CLEVR_semantic_",
    "nsc_images": "CLEVR_nonsemantic_",
}


CAPTION_FILES = ("change_captions.json", "no_change_captions.json")


def read_captions(path: str | Path) -> dict[str, list[str]]:
    """Sentences by image name (`000000.png`), in file order. Raises ValueError for another schema."""
    captions = {}
    for key, sentences in read_json(path, dict).items():
        name = key.removeprefix("CLEVR_default_")
        if name == key or not (
            is_safe_file_name(name)
            and isinstance(sentences, list)
            and all(isinstance(s, str) for s in sentences)
        ):
            raise ValueError(
                f'{path}: entry {reprlib.repr(key)} is not "CLEVR_default_000000.png": ["…", …]'
            )
        captions[name] = sentences
    return captions


def read_split(data_path: str | Path, split: str) -> list[str]:
    """The image names (`000000.png`) of a split, in file order."""
    path = Path(data_path) / "splits.json"
    numbers = read_json(path, dict).get(split)
    if not (isinstance(numbers, list) and all(type(n) is int and n >= 0 for n in numbers)):
        raise ValueError(f'{path}: "{split}" is not a list of scene numbers')
    if len(set(numbers)) < len(numbers):
        raise ValueError(f'{path}: "{split}" lists a scene twice')
    return [f"{number:06d}.png" for number in numbers]


def change_types(data_path: str | Path) -> dict[str, list[str]]:
    """Image names by change type, where the data has a type_mapping.json; else nothing."""
    path = Path(data_path) / "type_mapping.json"
    return read_type_mapping(path) if path.is_file() else {}


def read_type_mapping(path: Path) -> dict[str, list[str]]:
    """Image names by change type of a file. Raises ValueError for another schema."""
    types = read_json(path, dict)
    for change_type, names in types.items():
        if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"{path}: {reprlib.repr(change_type)} is not a list of image names")
    unprintable = next(filter(has_control_characters, types), None)
    if unprintable is not None:
        raise ValueError(
            f"{path}: the type {reprlib.repr(unprintable)} has a control character in its name"
        )
    if "all" in types:
        raise ValueError(f"{path}: a type is called 'all', which the scores of all pairs are")
    return types


def load_clevr_change(
    data_path: str | Path, split: str, need_images: bool = True
) -> list[ImagePair]:
    """The scenes of a split in file order; need_images=False does not look whether theirs exist.

    Raises ValueError or OSError naming what is missing or wrong.
    """
    root = Path(data_path)
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} (--data_path)")
    names = read_split(root, split)
    change, no_change = (read_captions(root / file) for file in CAPTION_FILES)
    for folder in FOLDERS:
        if not (root / folder).is_dir():
            raise FileNotFoundError(f"no image folder {root / folder}")
    present = {folder: set(os.listdir(root / folder)) for folder in FOLDERS}
    scenes = []
    for name in names:
        for captions, file in zip((change, no_change), CAPTION_FILES, strict=True):
            if name not in captions:
                raise ValueError(
                    f"{root / file} has no captions of CLEVR_default_{name}, which splits.json puts in {split}"
                )
        for folder, prefix in FOLDERS.items():
            if need_images and prefix + name not in present[folder]:
                raise FileNotFoundError(
                    f"no image {root / folder / (prefix + name)}, which splits.json puts in {split}"
                )
        before, after, distractor = (
            str(root / folder / (prefix + name)) for folder, prefix in FOLDERS.items()
        )
        scenes.append(
            ImagePair(
                name,
                before,
                after,
                tuple(change[name]),
                distractor,
                f"{name}_n",
                tuple(no_change[name]),
            )
        )
    check_pairs(scenes, f"{root / 'splits.json'} ({split})")
    return scenes
