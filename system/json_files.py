"""Strict JSON: no NaN, no key twice, UTF-8 only; errors name the file, and writes are atomic."""

import json
import math
import os
import re
import reprlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from system.escaping import summarize_error
from system.files import atomic_write

SURROGATE_ESCAPE = re.compile(r"\\u[dD]")


def parse_json(text: str) -> Any:
    """The JSON value in a text.

    Raises ValueError, also for what Python's `json` accepts: NaN and infinities, duplicate keys and
    lone surrogates; and for nesting beyond the recursion limit.
    """
    try:
        value = json.loads(
            text,
            object_pairs_hook=_build_object,
            parse_constant=_parse_finite,
            parse_float=_parse_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if SURROGATE_ESCAPE.search(text):
        _refuse_lone_surrogates(value)
    return value


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        key, _ = counts.most_common(1)[0]
        raise ValueError(f"the key {reprlib.repr(key)} occurs twice in an object")
    return value


def _parse_finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError(f"{number[:20]} is not a number in JSON, or too large")
    return value


def _refuse_lone_surrogates(value: Any) -> None:
    """Raise UnicodeEncodeError, a ValueError, for half of a surrogate pair: it has no UTF-8."""
    json.dumps(value, ensure_ascii=False).encode()


def read_json(path: str | Path, value_type: type | None = None) -> Any:
    """The JSON value in a UTF-8 file; `value_type`, list or dict, is the one it must have.

    Raises FileNotFoundError, or ValueError naming the file and what is wrong.
    """
    path = Path(path)
    # os.path, because pathlib's own tests raise if a name is too long.
    if os.path.isdir(path):
        raise FileNotFoundError(f"{path} is a folder, expected a file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"no file {path}")
    try:
        value = parse_json(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"{path} is not JSON in UTF-8: {summarize_error(error)}") from None
    if value_type is not None and not isinstance(value, value_type):
        names = {list: "a list", dict: "an object"}
        found = names.get(type(value), type(value).__name__)
        raise ValueError(f"{path} holds {found}, expected {names[value_type]}")
    return value


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, in the form that `json.dump` gives. What is not finite becomes
    null."""
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(value), encoding="utf-8")


def to_json(value: Any, indent: int | None = None, ascii_only: bool = True) -> str:
    """A value as JSON text. JSON has no NaN and no infinities: they become null."""
    finite = _replace_non_finite(value)
    return json.dumps(finite, indent=indent, ensure_ascii=ascii_only, allow_nan=False)


def _replace_non_finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _replace_non_finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_non_finite(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
