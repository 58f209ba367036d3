"""history.csv: the mean loss and the scores of each epoch. People open it in spreadsheets."""

import logging
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import pandas as pd

from system.escaping import summarize_error
from system.files import atomic_write
from system.tables import read_table

log = logging.getLogger(__name__)

HISTORY_FILE = "history.csv"
EPOCH = "epoch"


def read_history(folder: Path) -> pd.DataFrame:
    """The epochs so far, one per row; missing scores are NaN. No rows if there is no file.

    A spreadsheet may have saved the file, with its own separators. A file that cannot be read is
    put aside, and a warning says so.
    """
    path = folder / HISTORY_FILE
    if not path.is_file():
        return pd.DataFrame()
    try:
        rows = [_parse_row(row) for _, row in read_table(path, (EPOCH,), (EPOCH,))]
    except (ValueError, OverflowError) as error:
        aside = _put_aside(path)
        log.warning(
            "%s cannot be read (%s): a new one is begun; the old one is now %s",
            path,
            summarize_error(error),
            aside.name,
        )
        return pd.DataFrame()
    return pd.DataFrame(rows)


def _put_aside(path: Path) -> Path:
    """Rename a file to the first free name of its kind."""
    names = (f"{HISTORY_FILE}.unreadable{number or ''}" for number in count())
    aside = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.replace(aside)
    return aside


def _parse_row(row: Mapping[str, str]) -> dict[str, float]:
    values = {name: _parse_number(text) for name, text in row.items()}
    return {**values, EPOCH: int(values[EPOCH])}


def _parse_number(text: str) -> float:
    """A number with a point or, as in many countries, a comma; empty text is NaN."""
    return float(text.replace(",", ".")) if text else float("nan")


def append_history(folder: Path, row: Mapping[str, float]) -> None:
    """Add an epoch's row, and remove rows from this epoch on, which an earlier run left."""
    rows = read_history(folder).to_dict("records") if row[EPOCH] > 0 else []
    kept = [earlier for earlier in rows if earlier[EPOCH] < row[EPOCH]]
    with atomic_write(folder / HISTORY_FILE) as temporary:
        pd.DataFrame([*kept, row]).to_csv(temporary, index=False)
