"""A user's own pairs: a table, .csv or .jsonl, of image files, splits and captions."""

import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dataloaders.file_names import find_file, refuse_address
from dataloaders.pairs import ALL_PAIRS, SPLITS, ImagePair, PairDataset, require_images
from system.escaping import has_control_characters
from system.tables import read_table

COLUMNS = ("before", "after", "split", "caption", "id", "type")
REQUIRED = ("before", "after")
SPLIT_ALIASES = {"training": "train", "validation": "val", "valid": "val", "dev": "val"}
BeforeAfter = tuple[Path, Path]  # before, after


class PairTable(PairDataset):
    """A table with the columns before, after, split, caption, and optionally id and type.

    JSON may have `captions`, a list, instead of `caption`. Rows of the same two images in a split
    are one pair with several captions. Paths are relative to the table.
    """

    name = "pairs"
    title = "a table of pairs"

    def splits(self) -> tuple[str, ...]:
        """The splits that the table names; all of them if it names none."""
        named = [normalize_split(row.get("split")) for _, row in read_rows(self.source.data_path)]
        return tuple(split for split in SPLITS if split in named) or SPLITS

    def pairs(self, split: str, need_images: bool = True) -> list[ImagePair]:
        path = self.source.data_path
        rows = []
        for line, row in read_rows(path):
            if read_split(path, line, row) != split:
                continue
            parsed = parse_row(path, line, row)
            if need_images:
                require_images(parsed.images, f"{path} line {line}")
            rows.append(parsed)
        return make_pairs(path, split, merge_rows(path, rows))


@dataclass(frozen=True)
class TableRow:
    """A row of the table, checked."""

    line: int
    images: BeforeAfter
    captions: list[str]
    id: str | None
    type: str | None


@dataclass
class Entry:
    """The rows of the same two images, merged. id and type come from the rows that have them."""

    line: int  # of the first row
    captions: list[str] = field(default_factory=list)
    id: str | None = None
    type: str | None = None


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """First line and content of each row; errors as in `read_table`."""
    return read_table(path, REQUIRED, COLUMNS)


def normalize_split(name: Any) -> Any:
    """A split's usual name: in small letters, and `val` for what others call it."""
    if not isinstance(name, str):
        return name
    lowered = name.strip().lower()
    return SPLIT_ALIASES.get(lowered, lowered)


def read_split(path: Path, line: int, row: dict[str, Any]) -> str:
    """The split of a row. Raises ValueError for none, or an unknown one."""
    split = normalize_split(row.get("split"))
    if split not in SPLITS:
        problem = f"the split is {reprlib.repr(split)}" if split else "no split"
        raise ValueError(f"{path} line {line}: {problem}, expected one of {', '.join(SPLITS)}")
    return split


def read_images(path: Path, line: int, row: dict[str, Any]) -> BeforeAfter:
    """The two files of a row, relative to the table's folder. Raises ValueError for none."""
    for name in ("before", "after"):
        value = row.get(name)
        if not (isinstance(value, str) and value.strip()):
            raise ValueError(f"{path} line {line}: no {name}")
        if "\0" in value:
            raise ValueError(
                f"{path} line {line}: {name} is {reprlib.repr(value)}, but a path cannot contain a "
                "NUL byte"
            )
        try:
            refuse_address(value)
        except ValueError as error:
            raise ValueError(f"{path} line {line}: {error}") from None
    before, after = (find_file(path.parent / row[name]) for name in ("before", "after"))
    return before, after


def read_id(path: Path, line: int, row: dict[str, Any]) -> str | None:
    """The id of a row, if it has one. Raises ValueError for one that cannot be printed."""
    value = row.get("id")
    if value in (None, ""):
        return None
    found = f"{path} line {line}: the id is {reprlib.repr(value)}"
    if type(value) not in (str, int):
        raise ValueError(f"{found}, expected text or a whole number")
    if has_control_characters(str(value)):
        raise ValueError(f"{found}, which has a control character in it")
    return str(value)


def _read_type(path: Path, line: int, row: dict[str, Any]) -> str | None:
    value = row.get("type")
    if value in (None, ""):
        return None
    found = f"{path} line {line}: the type is {reprlib.repr(value)}"
    if type(value) not in (str, int) or value == ALL_PAIRS:
        raise ValueError(f"{found}, expected text other than {ALL_PAIRS!r}")
    value = str(value)
    if has_control_characters(value):
        raise ValueError(f"{found}, which has a control character in it")
    return value


def _read_captions(path: Path, line: int, row: dict[str, Any]) -> list[str]:
    caption = row.get("caption")
    captions = row.get("captions") if caption in (None, "") else [caption]
    is_list = isinstance(captions, list) and captions
    if not is_list or not all(isinstance(text, str) and text.strip() for text in captions):
        raise ValueError(
            f"{path} line {line}: no caption; expected `caption` (text) or, in JSON, `captions` "
            "(a list of texts)"
        )
    return captions


def parse_row(path: Path, line: int, row: dict[str, Any]) -> TableRow:
    """Check a row. Raises ValueError that names its line and what is wrong."""
    return TableRow(
        line=line,
        images=read_images(path, line, row),
        captions=_read_captions(path, line, row),
        id=read_id(path, line, row),
        type=_read_type(path, line, row),
    )


def merge_rows(path: Path, rows: Iterable[TableRow]) -> dict[BeforeAfter, Entry]:
    """Merge the rows that name the same two images into one entry, in order of first appearance.

    Raises ValueError if they contradict each other.
    """
    entries: dict[BeforeAfter, Entry] = {}
    for row in rows:
        entry = entries.setdefault(row.images, Entry(row.line))
        entry.captions += row.captions
        for name in ("id", "type"):
            value = getattr(row, name)
            earlier = getattr(entry, name)
            if value is None:
                continue
            if earlier not in (None, value):
                raise ValueError(
                    f"{path} line {row.line}: the {name} is {value!r}, but line {entry.line}, for "
                    f"the same two images, says {earlier!r}"
                )
            setattr(entry, name, value)
    return entries


def make_pairs(path: Path, split: str, entries: dict[BeforeAfter, Entry]) -> list[ImagePair]:
    """The entries as pairs; one without an id gets the split and its index as an id."""
    pairs: dict[str, ImagePair] = {}
    for index, ((before, after), entry) in enumerate(entries.items()):
        pair_id = entry.id or f"{split}-{index}"
        if pair_id in pairs:
            raise ValueError(
                f"{path} line {entry.line}: the id {pair_id} is already used by another pair of "
                "images"
            )
        captions = tuple(entry.captions)
        pairs[pair_id] = ImagePair(
            pair_id, str(before), str(after), captions, change_type=entry.type
        )
    return list(pairs.values())
