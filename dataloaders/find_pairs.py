"""TODO."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataloaders.datasets.pair_table import read_rows, row_id, row_images
from dataloaders.picture_files import picture_endings
from system.escaping import has_control_characters

AFTER_ENDING = "_2"  # Spot-the-Diff's: x.png is before, x_2.png after


@dataclass(frozen=True)
class OwnPair:
    """A pair without a caption."""

    id: str
    before: Path
    after: Path


def find_pairs(before: str | None, after: str | None, table: str | None) -> list[OwnPair]:
    """The pairs of two files, of a folder in Spot-the-Diff's naming, of two folders with the same names, or of a table.

    Raises FileNotFoundError or ValueError, in one line, where there are none, where one lacks its other image, or ids repeat.
    """
    if table:
        pairs = list(_read_table(Path(table)))
        source = table
    elif before and after and Path(before).is_dir() != Path(after).is_dir():
        raise ValueError(f"one of {before} and {after} is a folder, the other is not")
    elif before and Path(before).is_dir():
        pairs, source = _from_folders(Path(before), Path(after) if after else None), before
    else:
        if not (before and after):
            raise ValueError("give --before and --after, --before with a folder, or --pairs")
        pairs, source = [OwnPair(Path(before).stem, Path(before), Path(after))], before
    if not pairs:
        raise ValueError(f"{source} holds no pairs")
    seen: set[str] = set()
    for pair in pairs:
        if pair.id in seen:
            raise ValueError(f"{source}: the id {pair.id} occurs twice")
        seen.add(pair.id)
        if has_control_characters(f"{pair.id}{pair.before}{pair.after}"):
            raise ValueError(
                f"{source}: the pair {pair.id!r} has a line break or another control character in its id or paths"
            )
        for path in (pair.before, pair.after):
            if not os.path.isfile(path):
                raise FileNotFoundError(f"no image {path} (pair {pair.id}, {source})")
    return pairs


def _images_in(folder: Path) -> dict[str, Path]:
    """The folder's images by name without ending, sorted; ValueError where two have the same."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no folder {folder}")
    known = picture_endings()
    images: dict[str, Path] = {}
    for path in sorted(
        path for path in folder.iterdir() if path.suffix.lower() in known and path.is_file()
    ):
        if any("\ud800" <= letter <= "\udfff" for letter in path.name):
            raise ValueError(f"{folder}: the name {path.name!r} is not UTF-8: rename the file")
        if path.stem in images:
            raise ValueError(
                f"{images[path.stem]} and {path.name} differ by their ending alone: which belongs to the pair?"
            )
        images[path.stem] = path
    return images


def _from_folders(before: Path, after: Path | None) -> list[OwnPair]:
    ones = _images_in(before)
    if after is None:
        others = {
            stem.removesuffix(AFTER_ENDING): path
            for stem, path in ones.items()
            if stem.endswith(AFTER_ENDING) and stem.removesuffix(AFTER_ENDING) in ones
        }
        ones = {stem: path for stem, path in ones.items() if path not in others.values()}
        if not others:
            raise ValueError(
                f"{before} holds no pairs named x.png and x{AFTER_ENDING}.png; for two folders give --after too"
            )
    else:
        others = _images_in(after)
    alone = sorted(ones.keys() ^ others.keys())
    if alone:
        more = f", and {len(alone) - 1} more" if len(alone) > 1 else ""
        raise ValueError(
            f"{alone[0]} has no other image ({before}{f' and {after}' if after else ''}){more}"
        )
    return [OwnPair(stem, path, others[stem]) for stem, path in ones.items()]


def _read_table(path: Path) -> Iterator[OwnPair]:
    for count, (number, row) in enumerate(read_rows(path)):
        yield OwnPair(row_id(path, number, row) or str(count), *row_images(path, number, row))
