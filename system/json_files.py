"""TODO."""

import json
import math
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.files import atomic_write, error_line


def parse_json(text: str) -> Any:
    """The JSON value in a text. Raises ValueError also for what Python lets pass: numbers that are none, keys given twice, and
    halves of letters; and for nesting without end."""
    try:
        value = json.loads(
            text,
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_finite_number,
            parse_float=_finite_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    if re.search(r"\\u[dD]", text):
        json.dumps(
            value, ensure_ascii=False
        ).encode()  # an escaped half of a surrogate pair cannot be encoded
    return value


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {reprlib.repr(twice)} occurs twice in an object")
    return value


def _finite_number(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is no number of JSON's, or too large a one")
    return value


def read_json(path: str | Path, kind: type | None = None) -> Any:
    """The JSON value in a UTF-8 file. Raises FileNotFoundError, or ValueError for what is no JSON or not of `kind`."""
    path = Path(path)
    if not os.path.isfile(path):  # pathlib's raises where a name is too long
        raise FileNotFoundError(
            f"{path} is a folder, expected a file" if os.path.isdir(path) else f"no file {path}"
        )
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError both are one
        raise ValueError(f"{path} is not JSON in UTF-8: {error_line(error)}") from None
    if kind is not None and not isinstance(value, kind):
        names = {list: "a list", dict: "an object"}
        raise ValueError(
            f"{path} holds {names.get(type(value), type(value).__name__)}, expected {names[kind]}"
        )
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file at once, in the compact form of `json.dump`."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def to_json(value: Any, indent: int | None = None) -> str:
    """A value as JSON, which has no NaN: a missing score is null."""
    return json.dumps(_replace_nan(value), indent=indent)


def _replace_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_nan(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nan(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value
