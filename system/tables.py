"""Reads tables that people make: .csv, .tsv or .jsonl, as editors and spreadsheets save them."""

import codecs
import csv
import io
import re
from collections.abc import Collection, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

from system.escaping import summarize_error
from system.json_files import parse_json

ENDINGS = (".csv", ".tsv", ".jsonl")
SEPARATORS = (",", ";", "\t")
# Spreadsheets mark UTF-16 by its first bytes.
UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
SEPARATOR_LINE = "sep="  # a first line by which spreadsheets say which separator follows

LINE_END = re.compile(r"\r\n|\r|\n")

Row = dict[str, Any]


def read_table(
    path: Path, required: Collection[str], known: Collection[str]
) -> Iterator[tuple[int, Row]]:
    """First line and content of each row. A .csv has a header with the `required` columns.

    Commas, semicolons or tabs separate its values, and blanks around these do not count. Rows
    without content are passed over. `known` columns may be written in capitals. Raises
    FileNotFoundError for no file, and ValueError that names the line that is wrong, or a known
    column that is there twice.
    """
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{path}: expected a .csv or .jsonl file, or .tsv")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if ending == ".jsonl":
        for line, row in _read_json_rows(path, _read_any_text(path, "save it so")):
            yield line, {_lower_known(name, known): value for name, value in row.items()}
    else:
        text = _read_any_text(path, "in a spreadsheet, save it as CSV UTF-8")
        yield from _read_csv_rows(path, text, required, known)


def _lower_known(name: str, known: Collection[str]) -> str:
    lowered = name.strip().lower()
    return lowered if lowered in known else name


def _read_any_text(path: Path, advice: str) -> str:
    with open(path, "rb") as file:
        is_utf_16 = file.read(2) in UTF_16_MARKS
    encoding = "utf-16" if is_utf_16 else "utf-8-sig"
    try:
        return path.read_bytes().decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}; {advice}") from None


def _read_json_rows(path: Path, text: str) -> Iterator[tuple[int, Row]]:
    # Not splitlines: JSON strings may hold other kinds of line breaks.
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = parse_json(content)
        except ValueError as error:
            raise ValueError(f"{path} line {line} is not JSON: {summarize_error(error)}") from None
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {line} is not a JSON object")
        yield line, row


def _read_csv_rows(
    path: Path, text: str, required: Collection[str], known: Collection[str]
) -> Iterator[tuple[int, Row]]:
    separator, skipped = _find_separator(text, required)
    lines = io.StringIO(text, newline="")
    for _ in range(skipped):
        next(lines)
    _check_quotes(path, text, separator)
    reader = csv.reader(lines, delimiter=separator, skipinitialspace=True)
    try:
        header = next((values for values in reader if any(map(str.strip, values))), [])
        names = _read_header(path, header, required, known)
        line = skipped + reader.line_num + 1
        for values in reader:
            stripped = [value.strip() for value in values]
            if any(stripped):
                yield line, _make_row(path, line, names, stripped)
            line = skipped + reader.line_num + 1  # quoted values may have several lines
    except csv.Error as error:
        raise ValueError(f"{path} line {skipped + reader.line_num} is not CSV: {error}") from None


def _find_separator(text: str, required: Collection[str]) -> tuple[str, int]:
    """The separator, and how many lines stand before the header."""
    lines = LINE_END.split(text)
    index = next((n for n, line in enumerate(lines) if line.strip(" ,;\t")), 0)
    first = lines[index].rstrip(" ")
    if first.lower().startswith(SEPARATOR_LINE) and len(first) == len(SEPARATOR_LINE) + 1:
        return first[len(SEPARATOR_LINE)], index + 1
    for separator in SEPARATORS:
        names = {name.strip().strip('"').strip().lower() for name in first.split(separator)}
        if set(required) <= names:
            return separator, 0
    return ",", 0


def _check_quotes(path: Path, text: str, separator: str) -> None:
    """Raise ValueError for a quoted value that does not end where it should: it takes the rows
    after it with it."""
    blanks_after_quotes = re.compile(rf'"[ \t]+(?=[{re.escape(separator)}\r\n]|$)')
    cleaned = io.StringIO(blanks_after_quotes.sub('"', text), newline="")
    reader = csv.reader(cleaned, delimiter=separator, skipinitialspace=True, strict=True)
    line = 1
    try:
        for _ in reader:
            line = reader.line_num + 1
    except csv.Error as error:
        if "field larger" in str(error):
            return  # the reader of the rows says so
        raise ValueError(
            f"{path} line {line}: a double quote is not closed, or text follows it; inside of "
            'quotes, write "" for a double quote'
        ) from None


def _read_header(
    path: Path, names: list[str], required: Collection[str], known: Collection[str]
) -> list[str]:
    """The names of the columns, known ones in small letters."""
    stripped = [name.strip() for name in names]
    columns = [_lower_known(name, known) for name in stripped]
    if columns and not set(required) <= set(columns):
        raise ValueError(
            f"{path} has the columns {', '.join(columns)}; expected at least "
            f"{' and '.join(required)}, separated by commas"
        )
    repeated = [name for name in known if columns.count(name) > 1]
    if repeated:
        raise ValueError(f"{path} has two columns {repeated[0]}")
    return columns


def _make_row(path: Path, line: int, names: list[str], values: list[str]) -> Row:
    if len(values) > len(names):
        raise ValueError(
            f"{path} line {line} has {len(values)} fields, the header {len(names)}: "
            "put values that contain commas in double quotes"
        )
    return dict(zip_longest(names, values, fillvalue=""))
