"""TODO."""

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dataloaders.pairs import ImagePair
from modules.model.explanation import Caption
from system.escaping import one_line, printable, show, spreadsheet_text
from system.json_files import parse_json, read_json, write_json
from system.runtime import Runtime

log = logging.getLogger(__name__)

COLUMNS = ("id", "caption", "score", "before", "after")


Captioned = tuple[ImagePair, list[Caption]]


def print_captions(rounds: Iterator[list[Captioned]], alone: bool) -> None:
    """One pair: its sentences, a line each. Several: CSV."""
    if not alone:
        print(_csv_lines([COLUMNS]), end="")
    for captioned in rounds:
        if alone:
            show("\n".join(one_line(caption.text) for caption in captioned[0][1]), flush=True)
        else:
            text = _format_rows(captioned, ".csv")
            print(printable(text) if sys.stdout.isatty() else text, end="", flush=True)


def append_captions(
    rounds: Iterator[list[Captioned]],
    path: Path,
    done: int,
    kept_bytes: int,
    origin: dict[str, Any],
    runtime: Runtime,
) -> None:
    """Append each round and sync it; what stood behind the last whole pair goes first. Beside a new file stands its origin."""
    if done:
        log.warning("%s holds %d pairs already: going on behind them", path, done)
    for number, captioned in enumerate(rounds):
        if not runtime.is_main:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if number == 0 and not done:
            write_json(origin_path(path), origin)
        with open(path, "ab") as file:
            if number == 0:
                file.truncate(kept_bytes)
                if path.suffix == ".csv" and not kept_bytes:
                    file.write(_csv_lines([COLUMNS]).encode())
            file.write(_format_rows(captioned, path.suffix).encode())
            file.flush()
            os.fsync(file.fileno())


def check_settings(path: Path, origin: dict[str, Any]) -> None:
    """ValueError where the results in the file come from something else, by what stands beside them."""
    if not origin_path(path).is_file():
        raise FileNotFoundError(
            f"{path} has no {origin_path(path).name} beside it, which tells what made it: give --predictions "
            "another file, or remove this one"
        )
    before = read_json(origin_path(path), dict)
    differing = [
        f"{name} {before.get(name)}" for name, value in origin.items() if before.get(name) != value
    ]
    if differing:
        raise ValueError(
            f"{path} was made with {', '.join(differing)} ({origin_path(path)}): give --predictions another file, or "
            "remove this one"
        )


def origin_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.origin.json")


def _format_rows(captioned: Sequence[Captioned], kind: str) -> str:
    """CSV with a row for each caption, or JSON with a line for each pair."""
    if kind == ".csv":
        return _csv_lines(
            [_row(pair, caption) for pair, captions in captioned for caption in captions]
        )
    return "".join(
        json.dumps(
            {
                "id": pair.id,
                "before": str(pair.before),
                "after": str(pair.after),
                "captions": [
                    {"caption": caption.text, "score": round(caption.score, 4)}
                    for caption in captions
                ],
            },
            ensure_ascii=False,
        )
        + "\n"
        for pair, captions in captioned
    )


def _row(pair: ImagePair, caption: Caption) -> tuple[str, ...]:
    """What a spreadsheet may open: texts of others are no formulas there."""
    before, after = (spreadsheet_text(str(path)) for path in (pair.before, pair.after))
    text = spreadsheet_text(one_line(caption.text))
    return spreadsheet_text(pair.id), text, f"{caption.score:.4f}", before, after


def _csv_lines(rows: Sequence[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def read_finished(path: Path, pairs: Sequence[ImagePair], num_captions: int) -> tuple[int, int]:
    """How many pairs a file of an earlier run holds whole, and how many bytes they take; ValueError where it is another's."""
    if not path.is_file():
        return 0, 0
    lines = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    head, per_pair = (1, num_captions) if path.suffix == ".csv" else (0, 1)
    other = ValueError(
        f"{path} holds other results than these pairs': give --predictions another file, or remove this one"
    )
    try:
        if lines[:head] != [_csv_lines([COLUMNS]).encode()][: len(lines[:head])]:
            raise other
        if head:
            found = [row[0] for row in csv.reader(line.decode() for line in lines[head:])]
            expected = [spreadsheet_text(pair.id) for pair in pairs]
        else:
            found = [parse_json(line.decode())["id"] for line in lines]
            expected = [pair.id for pair in pairs]
    except (ValueError, KeyError, TypeError, IndexError, csv.Error):
        raise other from None
    if len(found) > len(pairs) * per_pair or any(
        expected[n // per_pair] != one for n, one in enumerate(found)
    ):
        raise other
    done = len(found) // per_pair
    return done, sum(map(len, lines[: head + done * per_pair])) if done else 0
