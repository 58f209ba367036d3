"""The captions of --do_predict: printed, or written to a file that an interrupted run continues."""

import csv
import io
import json
import logging
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataloaders.pairs import ImagePair
from modules.model.explanation import Caption
from system.escaping import escape_formula, escape_text, show, to_one_line
from system.json_files import parse_json, read_json, write_json
from system.runtime import Runtime

log = logging.getLogger(__name__)

COLUMNS = ("id", "caption", "score", "before", "after")

CaptionedPair = tuple[ImagePair, Sequence[Caption]]


class FinishedPairs(NamedTuple):
    """What a file of an earlier run holds: whole pairs, and the bytes of these and the header."""

    num_done: int = 0
    valid_bytes: int = 0


def print_captions(batches: Iterable[Sequence[CaptionedPair]], sentences_only: bool) -> None:
    """Print CSV, or only the sentences, a line each."""
    if not sentences_only:
        print(_csv_lines([COLUMNS]), end="")
    for captioned in batches:
        if sentences_only:
            sentences = [to_one_line(one.text) for _, captions in captioned for one in captions]
            show("\n".join(sentences), flush=True)
        else:
            text = format_rows(captioned, ".csv")
            print(escape_text(text) if sys.stdout.isatty() else text, end="", flush=True)


def append_captions(
    batches: Iterable[Sequence[CaptionedPair]],
    path: Path,
    finished: FinishedPairs,
    settings: Mapping[str, Any],
    runtime: Runtime,
) -> None:
    """Append each batch to the file and sync it; the main process alone writes.

    Nothing is written before the first batch is there. Then everything after the last whole pair is
    removed, and beside a new file its settings are written.
    """
    if finished.num_done:
        log.warning("resuming %s after %d finished pairs", path, finished.num_done)
    is_prepared = False
    for captioned in batches:
        if not runtime.is_main:
            continue
        if not is_prepared:
            _prepare_file(path, finished, settings)
            is_prepared = True
        _append(path, format_rows(captioned, path.suffix))


def _prepare_file(path: Path, finished: FinishedPairs, settings: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not finished.num_done:
        write_json(origin_path(path), settings)
    with open(path, "ab") as file:
        file.truncate(finished.valid_bytes)
    if path.suffix == ".csv" and not finished.num_done:
        _append(path, _csv_lines([COLUMNS]))


def _append(path: Path, text: str) -> None:
    with open(path, "ab") as file:
        file.write(text.encode())
        file.flush()
        os.fsync(file.fileno())


def read_finished(path: Path, pairs: Sequence[ImagePair], num_captions: int) -> FinishedPairs:
    """What the file holds of these pairs. ValueError where it holds anything else."""
    if not path.is_file():
        return FinishedPairs()
    is_csv = path.suffix == ".csv"
    header = [_csv_lines([COLUMNS]).encode()] if is_csv else []
    lines_per_pair = num_captions if is_csv else 1
    lines = path.read_bytes().splitlines(keepends=True)
    lines = [line for line in lines if line.endswith(b"\n")]  # the last one may be cut off
    expected = [_written_id(pair, is_csv) for pair in pairs for _ in range(lines_per_pair)]
    try:
        found = _read_ids(lines[len(header) :], is_csv)
    except (ValueError, KeyError, TypeError, IndexError, csv.Error):
        found = None
    is_ours = lines[: len(header)] == header[: len(lines)]
    if not is_ours or found is None or found != expected[: len(found)]:
        raise ValueError(
            f"{path} holds the results of other pairs: give --predictions another file, "
            "or remove this one"
        )
    num_done = len(found) // lines_per_pair
    if num_done == 0:
        return FinishedPairs()
    kept = lines[: len(header) + num_done * lines_per_pair]
    return FinishedPairs(num_done, sum(len(line) for line in kept))


def _read_ids(lines: Sequence[bytes], is_csv: bool) -> list[str]:
    """The pair's id in each line after the header."""
    texts = [line.decode() for line in lines]
    if is_csv:
        return [row[0] for row in csv.reader(texts)]
    return [parse_json(text)["id"] for text in texts]


def _written_id(pair: ImagePair, is_csv: bool) -> str:
    return escape_formula(pair.id) if is_csv else pair.id


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """ValueError or OSError where the file's results were not made with these settings."""
    origin = origin_path(path)
    if not origin.is_file():
        raise FileNotFoundError(
            f"{path} has no {origin.name} beside it, which would say how it was made: "
            "give --predictions another file, or remove this one"
        )
    earlier = read_json(origin, dict)
    differing = [
        f"{name} {earlier.get(name)}"
        for name in {**settings, **earlier}
        if earlier.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(
            f"{path} was made with {', '.join(differing)} ({origin}): "
            "give --predictions another file, or remove this one"
        )


def origin_path(path: Path) -> Path:
    """Where the settings behind a file of captions are kept."""
    return path.with_name(f"{path.name}.origin.json")


def format_rows(captioned: Sequence[CaptionedPair], suffix: str) -> str:
    """CSV with a row for each caption, or JSON with a line for each pair."""
    if suffix == ".csv":
        return _csv_lines([_csv_row(pair, one) for pair, captions in captioned for one in captions])
    return "".join(_json_line(pair, captions) for pair, captions in captioned)


def _csv_row(pair: ImagePair, caption: Caption) -> tuple[str, ...]:
    """A row for a spreadsheet, which must not take other people's texts for formulas."""
    text = to_one_line(caption.text)
    score = f"{caption.score:.4f}"
    before, after = escape_formula(str(pair.before)), escape_formula(str(pair.after))
    return escape_formula(pair.id), escape_formula(text), score, before, after


def _csv_lines(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _json_line(pair: ImagePair, captions: Sequence[Caption]) -> str:
    rows = [{"caption": one.text, "score": round(one.score, 4)} for one in captions]
    content = {
        "id": pair.id,
        "before": str(pair.before),
        "after": str(pair.after),
        "captions": rows,
    }
    return json.dumps(content, ensure_ascii=False) + "\n"
