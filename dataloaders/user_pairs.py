"""A user's pairs without captions: two files, one folder, two folders, or a table."""

import os
from pathlib import Path

from dataloaders.datasets.pair_table import read_id, read_images, read_rows
from dataloaders.pairs import ImagePair
from dataloaders.picture_files import picture_endings
from system.escaping import has_control_characters

AFTER_ENDING = "_2"  # as in Spot-the-Diff: x.png is before, x_2.png is after


def find_pairs(before: str | None, after: str | None, table: str | None) -> list[ImagePair]:
    """The pairs of two files, of one folder, of two folders, or of a table.

    One folder holds x.png and x_2.png, as in Spot-the-Diff. In two folders the images of a pair
    have the same name. Raises FileNotFoundError or ValueError, in one line, where there are no
    pairs, an image has no counterpart or no file, or ids repeat.
    """
    if table:
        pairs, source = _from_table(Path(table)), table
    elif not before:
        raise ValueError("give --before and --after, --before with a folder, or --pairs")
    else:
        pairs, source = _from_paths(Path(before), Path(after) if after else None), before
    if not pairs:
        raise ValueError(f"{source} holds no pairs")
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise ValueError(f"{source}: the id {pair.id} occurs twice")
        seen.add(pair.id)
        _check_pair(pair, source)
    return pairs


def _check_pair(pair: ImagePair, source: str) -> None:
    if has_control_characters(f"{pair.id}{pair.before}{pair.after}"):
        raise ValueError(
            f"{source}: the pair {pair.id!r} has a line break or another control character in its "
            "id or paths"
        )
    for path in (pair.before, pair.after):
        if not os.path.isfile(path):
            raise FileNotFoundError(f"no image {path} (pair {pair.id}, {source})")


def _from_table(path: Path) -> list[ImagePair]:
    pairs = []
    for line, row in read_rows(path):
        before, after = read_images(path, line, row)
        pair_id = read_id(path, line, row) or str(len(pairs))
        pairs.append(ImagePair(pair_id, str(before), str(after)))
    return pairs


def _from_paths(before: Path, after: Path | None) -> list[ImagePair]:
    if after is not None and before.is_dir() != after.is_dir():
        raise ValueError(
            f"--before and --after must both be files or both folders: {before}, {after}"
        )
    if before.is_dir():
        return _from_folders(before, after)
    if after is None:
        raise ValueError("give --before and --after, --before with a folder, or --pairs")
    return [ImagePair(before.stem, str(before), str(after))]


def _from_folders(before: Path, after: Path | None) -> list[ImagePair]:
    befores = _images_in(before)
    if after is None:
        befores, afters = _split_by_ending(befores, before)
    else:
        afters = _images_in(after)
    unpaired = sorted(befores.keys() ^ afters.keys())
    if unpaired:
        more = f", and {len(unpaired) - 1} more" if len(unpaired) > 1 else ""
        folders = f"{before} and {after}" if after else f"{before}"
        raise ValueError(f"{unpaired[0]} has no other image ({folders}){more}")
    return [ImagePair(stem, str(path), str(afters[stem])) for stem, path in befores.items()]


def _split_by_ending(
    images: dict[str, Path], folder: Path
) -> tuple[dict[str, Path], dict[str, Path]]:
    """The images of one folder → before and after, by the name of the pair."""
    afters = {}
    for stem, path in images.items():
        pair_id = stem.removesuffix(AFTER_ENDING)
        if pair_id != stem and pair_id in images:
            afters[pair_id] = path
    if not afters:
        raise ValueError(
            f"{folder} holds no pairs named x.png and x{AFTER_ENDING}.png; for two folders give "
            "--after too"
        )
    used = {pair_id + AFTER_ENDING for pair_id in afters}
    befores = {stem: path for stem, path in images.items() if stem not in used}
    return befores, afters


def _images_in(folder: Path) -> dict[str, Path]:
    """Name without ending → image file, sorted. Raises ValueError for two of one name."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in picture_endings() or not path.is_file():
            continue
        if any("\ud800" <= letter <= "\udfff" for letter in path.name):
            raise ValueError(f"{folder}: the name {path.name!r} is not UTF-8: rename the file")
        if path.stem in images:
            raise ValueError(
                f"{images[path.stem]} and {path.name} differ only in their ending: which one "
                "belongs to the pair?"
            )
        images[path.stem] = path
    return images
