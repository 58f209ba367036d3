"""The captions of --do_predict: printed, or written to a file that the next run can continue."""

import csv
import io
import logging
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dataloaders.pairs import ImagePair
from modules.model.explanation import Caption
from system.escaping import escape_formula, escape_text, name_as_text, show, to_one_line
from system.files import sync
from system.json_files import parse_json, read_json, to_json, write_json
from system.runtime import Runtime

log = logging.getLogger(__name__)

COLUMNS = ("id", "caption", "score", "before", "after")
# Settings that files of earlier versions do not record. Such files can be continued all the same.
LATER_SETTINGS = frozenset({"precision", "pretrained_clip_name", "quick_gelu", "model"})
ADVICE = "give --predictions another file, or remove this one"

CaptionedPair = tuple[ImagePair, Sequence[Caption]]


class FinishedPairs(NamedTuple):
    """How much of an earlier run's file is complete: pairs, and bytes including the header."""

    num_done: int = 0
    valid_bytes: int = 0


def print_captions(batches: Iterable[Sequence[CaptionedPair]], sentences_only: bool) -> None:
    """Print CSV, or only the sentences, one per line."""
    if not sentences_only:
        print(_csv_lines([COLUMNS]), end="")
    for captioned in batches:
        if sentences_only:
            texts = [caption.text for _, captions in captioned for caption in captions]
            sentences = map(to_one_line, texts)
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
    """Append each batch to the file and sync it; only the main process writes.

    Nothing is written before the first batch is there. Then everything after the last whole pair is
    removed, and a new file gets its settings next to it.
    """
    if finished.num_done:
        # A warning, because a prediction shows no other lines.
        log.warning("resuming %s after %d finished pairs", path, finished.num_done)
    is_prepared = False
    for captioned in batches:
        if not runtime.is_main:
            continue
        if not is_prepared:
            _prepare_file(path, finished, settings)
            is_prepared = True
        _append(path, format_rows(captioned, path.suffix.lower()))


def _prepare_file(path: Path, finished: FinishedPairs, settings: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not finished.num_done:
        write_json(origin_path(path), settings)
    with open(path, "ab") as file:
        file.truncate(finished.valid_bytes)
    if path.suffix.lower() == ".csv" and not finished.num_done:
        _append(path, _csv_lines([COLUMNS]))


def _append(path: Path, text: str) -> None:
    with open(path, "ab") as file:
        file.write(text.encode())
        sync(file)


def read_finished(path: Path, pairs: Sequence[ImagePair], num_captions: int) -> FinishedPairs:
    """How much of the file is complete.

    Raises ValueError if it cannot be read, or does not hold captions of these pairs in their order.
    """
    if not path.is_file():
        return FinishedPairs()
    is_csv = path.suffix.lower() == ".csv"
    header = [_csv_lines([COLUMNS]).encode()] if is_csv else []
    lines_per_pair = num_captions if is_csv else 1
    lines = path.read_bytes().splitlines(keepends=True)
    cut_off = b"" if not lines or lines[-1].endswith(b"\n") else lines[-1]
    lines = [line for line in lines if line.endswith(b"\n")]
    ids = _read_ids(lines[len(header) :], path)
    expected = [_written_id(pair, is_csv) for pair in pairs for _ in range(lines_per_pair)]
    # A run may have been killed before it wrote the header: then there are no lines.
    has_header = lines[: len(header)] == header[: len(lines)]
    if not lines:
        starts = header or [_json_start(pair) for pair in pairs[:1]]
        has_header = not cut_off or any(_begins_as_ours(cut_off, start) for start in starts)
    if not has_header or ids != expected[: len(ids)]:
        other = "other pairs, or of another --num_captions" if is_csv else "other pairs"
        raise ValueError(f"{path} holds the results of {other}: {ADVICE}")
    num_done = len(ids) // lines_per_pair
    if num_done == 0:
        return FinishedPairs()
    kept = lines[: len(header) + num_done * lines_per_pair]
    return FinishedPairs(num_done, sum(len(line) for line in kept))


def _begins_as_ours(content: bytes, start: bytes) -> bool:
    """Whether a file's only line, which is cut off, is one of ours: of another program's file not
    a byte may be lost."""
    return start.startswith(content) or content.startswith(start)


def _read_ids(lines: Sequence[bytes], path: Path) -> list[str]:
    """The pair's id in each line after the header. Raises ValueError for a damaged line."""
    try:
        texts = [line.decode() for line in lines]
        if path.suffix.lower() == ".csv":
            return [row[0] for row in csv.reader(texts)]
        return [parse_json(text)["id"] for text in texts]
    except (ValueError, KeyError, TypeError, IndexError, csv.Error):
        raise ValueError(f"{path} is damaged, or holds no captions: {ADVICE}") from None


def _written_id(pair: ImagePair, is_csv: bool) -> str:
    return escape_formula(pair.id) if is_csv else pair.id


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Raise ValueError or OSError if the file's captions were not made with these settings."""
    origin = origin_path(path)
    if not origin.is_file():
        raise FileNotFoundError(
            f"{path} has no {origin.name} next to it, which would say how it was made: {ADVICE}"
        )
    earlier = read_json(origin, dict)
    unknown = LATER_SETTINGS - earlier.keys()
    differing = [
        f"{name} {earlier.get(name)}"
        for name in {**settings, **earlier}
        if name not in unknown and earlier.get(name) != settings.get(name)
    ]
    if differing:
        raise ValueError(f"{path} was made with {', '.join(differing)} ({origin}): {ADVICE}")


def origin_path(path: Path) -> Path:
    """The file that records how a file of captions was made."""
    return path.with_name(f"{path.name}.origin.json")


def format_rows(captioned: Sequence[CaptionedPair], suffix: str) -> str:
    """CSV with a row for each caption, or JSON with a line for each pair."""
    if suffix == ".csv":
        rows = [_csv_row(pair, caption) for pair, captions in captioned for caption in captions]
        return _csv_lines(rows)
    return "".join(_json_line(pair, captions) for pair, captions in captioned)


def _csv_row(pair: ImagePair, caption: Caption) -> tuple[str, ...]:
    """A row for a spreadsheet, which must not take other people's texts for formulas."""
    return (
        escape_formula(pair.id),
        escape_formula(to_one_line(caption.text)),
        f"{caption.score:.4f}",
        escape_formula(name_as_text(pair.before)),
        escape_formula(name_as_text(pair.after)),
    )


def _csv_lines(rows: Sequence[Sequence[str]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _json_line(pair: ImagePair, captions: Sequence[Caption]) -> str:
    rows = [{"caption": caption.text, "score": round(caption.score, 4)} for caption in captions]
    return to_json({**_json_pair(pair), "captions": rows}, ascii_only=False) + "\n"


def _json_pair(pair: ImagePair) -> dict[str, str]:
    return {
        "id": pair.id,
        "before": name_as_text(pair.before),
        "after": name_as_text(pair.after),
    }


def _json_start(pair: ImagePair) -> bytes:
    """What a pair's line begins with, up to its captions."""
    return to_json({**_json_pair(pair), "captions": []}, ascii_only=False)[:-2].encode()
