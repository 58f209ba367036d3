"""Spot-the-Diff's files: `reformat_{split}.json`, images `<id>.png` and `<id>_2.png` (SPEC §3)."""

import os
import reprlib
from pathlib import Path

from dataloaders.pairs import ImagePair, check_pairs
from system.files import is_safe_file_name
from system.json_files import read_json


def read_annotations(path: str | Path) -> list[tuple[str, list[str]]]:
    """(id, sentences) of every entry of an annotation list. Raises ValueError for another schema."""
    entries = []
    for number, entry in enumerate(read_json(path, list)):
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("img_id"), str | int)
            and not isinstance(entry["img_id"], bool)
            and isinstance(entry.get("sentences"), list)
            and all(isinstance(s, str) for s in entry["sentences"])
        ):
            raise ValueError(
                f'{path}: entry {number} is not {{"img_id": "…", "sentences": ["…", …]}}'
            )
        image_id = str(entry["img_id"])
        if not is_safe_file_name(image_id):
            raise ValueError(
                f"{path}: entry {number} has the img_id {reprlib.repr(image_id)}, which is no plain file name"
            )
        entries.append((image_id, entry["sentences"]))
    return entries


def load_spot_the_diff(
    data_path: str | Path, features_path: str | Path, split: str, need_images: bool = True
) -> list[ImagePair]:
    """The pairs of a split in file order; need_images=False does not look whether theirs exist.

    Raises ValueError or OSError naming what is missing or wrong.
    """
    path, images = Path(data_path) / f"reformat_{split}.json", Path(features_path)
    if not path.is_file() and (Path(data_path) / f"{split}.json").is_file():
        raise FileNotFoundError(
            f"no file {path}: make it with python preprocess/reformat_dataset.py --data_path {data_path}"
        )
    entries = read_annotations(path)
    seen: set[str] = set()
    for image_id, _ in entries:
        if image_id in seen:
            raise ValueError(
                f"{path}: img_id {image_id} occurs twice; reformat the raw list with preprocess/reformat_dataset.py"
            )
        seen.add(image_id)
    if not images.is_dir():
        raise FileNotFoundError(f"no image folder {images} (--features_path)")
    present = set(os.listdir(images))
    scenes = []
    for image_id, sentences in entries:
        names = (f"{image_id}.png", f"{image_id}_2.png")
        for name in names:
            if need_images and name not in present:
                raise FileNotFoundError(
                    f"no image {images / name}, which {path} asks for with img_id {image_id}"
                )
        scenes.append(
            ImagePair(names[0], str(images / names[0]), str(images / names[1]), tuple(sentences))
        )
    check_pairs(scenes, str(path))
    return scenes
