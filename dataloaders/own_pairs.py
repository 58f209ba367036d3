"""A user's own pairs of images: two files, folders, or a table; with captions and splits, a dataset of its own."""

import csv
import io
import os
import reprlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dataloaders.pairs import Scene, check_scenes
from modules.escaping import has_control_characters
from modules.files import parse_json, short
from modules.picture_files import picture_endings

SPLITS = ("train", "val", "test")
COLUMNS = ("before", "after", "split", "caption", "id", "type")
AFTER_ENDING = "_2"  # Spot-the-Diff's: x.png is before, x_2.png after


@dataclass(frozen=True)
class OwnPair:
    """A pair without a caption."""

    id: str
    before: Path
    after: Path


def list_pairs(before: str | None, after: str | None, table: str | None) -> list[OwnPair]:
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


def _images(folder: Path) -> dict[str, Path]:
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
    ones = _images(before)
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
        others = _images(after)
    alone = sorted(ones.keys() ^ others.keys())
    if alone:
        more = f", and {len(alone) - 1} more" if len(alone) > 1 else ""
        raise ValueError(
            f"{alone[0]} has no other image ({before}{f' and {after}' if after else ''}){more}"
        )
    return [OwnPair(stem, path, others[stem]) for stem, path in ones.items()]


def read_rows(path: Path) -> Iterator[tuple[int, dict]]:
    """Line number and object of each row of a .csv with a header or a .jsonl, UTF-8. ValueError names the line that is wrong."""
    if path.suffix not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: expected a .csv or .jsonl file")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    if path.suffix == ".csv":
        yield from _csv_rows(path, text)
        return
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # other breaks of lines may stand in JSON's texts
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path} line {number} is not JSON: {short(error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is not a JSON object")
        yield number, row


def _csv_rows(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), restval="")
    try:
        names = reader.fieldnames or []
        if names and not {"before", "after"} <= set(names):
            raise ValueError(
                f"{path} has the columns {', '.join(names)}; expected before, after and others, apart by commas"
            )
        twice = [name for name in COLUMNS if names.count(name) > 1]
        if twice:
            raise ValueError(f"{path} has two columns {twice[0]}")
        for row in reader:
            if None in row:
                count = len(names) + len(row[None])
                raise ValueError(
                    f"{path} line {reader.line_num} has {count} fields, the header {len(names)}: put values with "
                    "commas into double quotes"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is not CSV: {error}") from None


def _paths(path: Path, number: int, row: dict) -> tuple[Path, Path]:
    for name in ("before", "after"):
        if not (isinstance(row.get(name), str) and row[name].strip()):
            raise ValueError(f"{path} line {number}: no {name}")
        if "\0" in row[name]:
            raise ValueError(
                f"{path} line {number}: {name} is {reprlib.repr(row[name])}, in which a NUL is no letter of a path"
            )
    return path.parent / row["before"].strip(), path.parent / row["after"].strip()


def _identity(path: Path, number: int, row: dict) -> str | None:
    identity = row.get("id")
    if identity in (None, ""):
        return None
    if type(identity) not in (str, int):
        raise ValueError(f"{path} line {number}: the id is {reprlib.repr(identity)}, expected text")
    if has_control_characters(str(identity)):
        raise ValueError(
            f"{path} line {number}: the id is {reprlib.repr(identity)}, which has a control character in it"
        )
    return str(identity)


def _read_table(path: Path) -> Iterator[OwnPair]:
    for count, (number, row) in enumerate(read_rows(path)):
        yield OwnPair(_identity(path, number, row) or str(count), *_paths(path, number, row))


def splits_of(table: str | Path) -> list[str]:
    """The splits that occur in a table, in SPLITS' order; what else stands there is `load_own_pairs`' to refuse."""
    named = [row.get("split") for _, row in read_rows(Path(table))]
    return [split for split in SPLITS if split in named] or list(SPLITS)


def load_own_pairs(table: str | Path, split: str, need_images: bool = True) -> list[Scene]:
    """The pairs of a split of a table, in order of first appearance. Its columns: before, after, split, caption (or captions, a
    list, in JSON) and, if wanted, id and type. Rows of the same two images are one pair with several captions.

    Paths are relative to the table; need_images=False does not look whether they exist. Raises ValueError or FileNotFoundError
    naming the line that is wrong.
    """
    path = Path(table)
    found: dict[tuple[Path, Path, str], dict] = {}
    for number, row in read_rows(path):
        images, part = _paths(path, number, row), row.get("split")
        if part not in SPLITS:
            found_part = f"the split is {reprlib.repr(part)}" if part else "no split"
            raise ValueError(
                f"{path} line {number}: {found_part}, expected one of {', '.join(SPLITS)}"
            )
        if part != split:
            continue
        sentences = row.get("captions") if row.get("caption") in (None, "") else [row["caption"]]
        if not (
            isinstance(sentences, list)
            and sentences
            and all(isinstance(s, str) and s.strip() for s in sentences)
        ):
            raise ValueError(
                f"{path} line {number}: no caption; expected caption, a text, or in JSON captions, a list of texts"
            )
        change_type = row.get("type") or None
        if change_type is not None and (not isinstance(change_type, str) or change_type == "all"):
            raise ValueError(
                f"{path} line {number}: the type is {reprlib.repr(change_type)}, expected text other than 'all'"
            )
        if change_type is not None and has_control_characters(change_type):
            raise ValueError(
                f"{path} line {number}: the type is {reprlib.repr(change_type)}, which has a control character in it"
            )
        entry = found.setdefault(
            (*images, part), {"id": None, "type": None, "captions": [], "line": number}
        )
        for name, value in (("id", _identity(path, number, row)), ("type", change_type)):
            if value is not None and entry[name] not in (None, value):
                raise ValueError(
                    f"{path} line {number}: the {name} is {value!r}, but {entry[name]!r} in line {entry['line']} of "
                    "the same two images"
                )
            entry[name] = value if value is not None else entry[name]
        entry["captions"] += sentences
        for image in images:
            if need_images and not os.path.isfile(image):
                raise FileNotFoundError(f"no image {image} ({path} line {number})")
    scenes, seen = [], set()
    for count, ((before, after, _), entry) in enumerate(found.items()):
        identity = entry["id"] or f"{split}-{count}"
        if identity in seen:
            raise ValueError(
                f"{path} line {entry['line']}: the id {identity} belongs to another pair of images already"
            )
        seen.add(identity)
        scenes.append(
            Scene(
                identity,
                str(before),
                str(after),
                tuple(entry["captions"]),
                change_type=entry["type"],
            )
        )
    check_scenes(scenes, f"{path}, split {split}")
    return scenes
