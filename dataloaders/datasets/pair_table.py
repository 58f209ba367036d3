"""A user's own pairs of images: two files, folders, or a table; with captions and splits, a dataset of its own."""

import csv
import io
import os
import reprlib
from collections.abc import Iterator
from pathlib import Path

from dataloaders.pairs import SPLITS, ImagePair, check_pairs
from system.escaping import has_control_characters
from system.files import error_line
from system.json_files import parse_json

COLUMNS = ("before", "after", "split", "caption", "id", "type")


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
            raise ValueError(f"{path} line {number} is not JSON: {error_line(error)}") from None
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


def row_images(path: Path, number: int, row: dict) -> tuple[Path, Path]:
    for name in ("before", "after"):
        if not (isinstance(row.get(name), str) and row[name].strip()):
            raise ValueError(f"{path} line {number}: no {name}")
        if "\0" in row[name]:
            raise ValueError(
                f"{path} line {number}: {name} is {reprlib.repr(row[name])}, in which a NUL is no letter of a path"
            )
    return path.parent / row["before"].strip(), path.parent / row["after"].strip()


def row_id(path: Path, number: int, row: dict) -> str | None:
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


def table_splits(table: str | Path) -> list[str]:
    """The splits that occur in a table, in SPLITS' order; what else stands there is `load_own_pairs`' to refuse."""
    named = [row.get("split") for _, row in read_rows(Path(table))]
    return [split for split in SPLITS if split in named] or list(SPLITS)


def load_pair_table(table: str | Path, split: str, need_images: bool = True) -> list[ImagePair]:
    """The pairs of a split of a table, in order of first appearance. Its columns: before, after, split, caption (or captions, a
    list, in JSON) and, if wanted, id and type. Rows of the same two images are one pair with several captions.

    Paths are relative to the table; need_images=False does not look whether they exist. Raises ValueError or FileNotFoundError
    naming the line that is wrong.
    """
    path = Path(table)
    found: dict[tuple[Path, Path, str], dict] = {}
    for number, row in read_rows(path):
        images, part = row_images(path, number, row), row.get("split")
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
        for name, value in (("id", row_id(path, number, row)), ("type", change_type)):
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
            ImagePair(
                identity,
                str(before),
                str(after),
                tuple(entry["captions"]),
                change_type=entry["type"],
            )
        )
    check_pairs(scenes, f"{path}, split {split}")
    return scenes
