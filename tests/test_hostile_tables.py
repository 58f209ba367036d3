"""Any table of pairs is read, or refused by its name."""

import json
import random

import pytest
from hypothesis import strategies as st

from dataloaders.datasets import open_dataset
from dataloaders.datasets.pair_table import COLUMNS
from dataloaders.user_pairs import find_pairs
from tests.hostile import (
    at_both_sizes,
    mutate,
    only_our_error,
)
from tests.hostile_json import NAMES, VALUES, check_property, corrupted

ROWS = [
    {
        "before": "a.png",
        "after": "b.png",
        "split": "train",
        "caption": "a box",
        "id": "1",
        "type": "add",
    },
    {"before": "c.png", "after": "d.png", "split": "train", "captions": ["x", "y"], "id": 7},
]
CELLS = st.sampled_from(
    ("a.png", "b.png", "train", "val", "", '"', ",", "\n", "\r", "7", "add", *NAMES[:8], "\u2028")
) | st.text(max_size=4)


def tables() -> st.SearchStrategy[tuple[str, bytes]]:
    """Endings and contents of tables of pairs."""
    rubbish = st.binary(max_size=20)
    jsonl = _json_lines() | _mutations(as_lines(ROWS)) | rubbish
    intact = ",".join(COLUMNS).encode() + b'\na.png,b.png,train,"a, box",1,add\n'
    csv = _sheets() | _mutations(intact) | rubbish
    return st.tuples(st.just(".jsonl"), jsonl) | st.tuples(st.just(".csv"), csv)


def as_lines(rows: list) -> bytes:
    """Each row's JSON in a line."""
    return "\n".join(map(json.dumps, rows)).encode()


def _json_lines() -> st.SearchStrategy[bytes]:
    rows = corrupted(ROWS[0]) | corrupted(ROWS[1]) | VALUES
    return st.lists(rows, max_size=3).map(as_lines)


def _sheets() -> st.SearchStrategy[bytes]:
    """CSV of any cells, below the right columns or wrong ones."""
    rows = st.lists(st.lists(CELLS, max_size=7).map(",".join), max_size=3)
    shuffled = st.permutations([*COLUMNS, "before", "note"])
    headers = st.just(",".join(COLUMNS)) | shuffled.map(lambda names: ",".join(names[:6]))

    def join(parts: tuple[str, list[str]]) -> bytes:
        header, lines = parts
        return "\n".join([header, *lines]).encode(errors="surrogatepass")

    return st.tuples(headers, rows).map(join)


def _mutations(content: bytes) -> st.SearchStrategy[bytes]:
    seeds = st.integers(0, 2**32)
    return seeds.map(lambda seed: mutate(content, random.Random(seed)))


@at_both_sizes
@pytest.mark.parametrize(
    "read",
    [
        lambda path: open_dataset("pairs", path).checked_pairs("train", need_images=False),
        lambda path: open_dataset("pairs", path).checked_pairs("train"),
        lambda path: find_pairs(None, None, str(path)),
    ],
    ids=["to train", "with images", "to caption"],
)
def test_any_table_of_pairs_is_read_or_refused_by_its_name(read, count, tmp_path):
    for name in "abcd":
        (tmp_path / f"{name}.png").write_bytes(b"")

    def check(table):
        ending, content = table
        path = tmp_path / f"table{ending}"
        path.write_bytes(content)
        with only_our_error(path):
            read(path)

    sheet = ",".join(COLUMNS) + "\na.png,b.png,train,a box,1,add"
    for ending, content in ((".jsonl", as_lines(ROWS)), (".csv", sheet.encode())):
        path = tmp_path / f"intact{ending}"
        path.write_bytes(b"\xef\xbb\xbf" + content)
        assert read(path)[0].id == "1"
    check_property(check, tables(), count)


def test_columns_and_paths_that_cannot_be_are_refused_in_one_line(tmp_path):
    table = tmp_path / "t.csv"
    table.write_text("before,after,after\na,b,c\n")
    with pytest.raises(ValueError, match=r"t\.csv has two columns after"):
        find_pairs(None, None, str(table))
    table.write_text(f"before,after\na,{'x' * 5000}\n")
    (tmp_path / "a").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no image .*t\.csv"):
        find_pairs(None, None, str(table))
    table.write_text(f"before,after,split,caption\na,{'x' * 5000},train,words\n")
    with pytest.raises(FileNotFoundError, match=r"no image .*t\.csv line 2"):
        open_dataset("pairs", table).checked_pairs("train")
    (tmp_path / "t.jsonl").write_text(json.dumps({**ROWS[0], "before": "a\0.png"}))
    with pytest.raises(ValueError, match=r"t\.jsonl line 1: before is 'a\\x00.png'.*NUL"):
        open_dataset("pairs", tmp_path / "t.jsonl").checked_pairs("train", need_images=False)
