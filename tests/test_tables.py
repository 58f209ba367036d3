"""Tables as editors and spreadsheets save them."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dataloaders.datasets.pair_table import normalize_split, read_rows

PLAIN = [
    {"before": "b.png", "after": "a.png", "caption": "one, two"},
    {"before": "c.png", "after": "d.png", "caption": "thrée"},
]
TEXT = 'before,after,caption\nb.png,a.png,"one, two"\nc.png,d.png,thrée\n'


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        b"\xfe\xff" + TEXT.encode("utf-16-be"),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.replace("before,after", "Before, AFTER ").encode(),
        'before, after, caption\nb.png, a.png, "one, two" \n c.png ,d.png, thrée\n'.encode(),
        "before;after;caption\nb.png;a.png;one, two\nc.png;d.png;thrée\n".encode(),
        "before\tafter\tcaption\nb.png\ta.png\tone, two\nc.png\td.png\tthrée\n".encode(),
        "sep=;\r\nbefore;after;caption\r\nb.png;a.png;one, two\r\nc.png;d.png;thrée\r\n".encode(),
        TEXT.replace("c.png,", ',,\n\n" ",,\nc.png,').encode() + b",,\n,,\n",
        TEXT.rstrip().encode(),
    ],
)
def test_the_same_table_in_many_forms(tmp_path, content):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    assert [row for _, row in read_rows(path)] == PLAIN


@pytest.mark.parametrize("ending", [".CSV", ".Csv", ".tsv", ".TSV"])
def test_endings(tmp_path, ending):
    path = tmp_path / f"table{ending}"
    path.write_text(TEXT.replace(",", "\t").replace("one\t two", "one, two"), encoding="utf-8")
    assert [row for _, row in read_rows(path)] == PLAIN


def test_lines_of_json_with_an_ending_in_capitals(tmp_path):
    path = tmp_path / "table.JSONL"
    path.write_text('\n{"before": "b.png", "after": "a.png"}\r\n\n', encoding="utf-8-sig")
    assert list(read_rows(path)) == [(2, {"before": "b.png", "after": "a.png"})]


def test_lines_are_counted_as_an_editor_does(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('sep=,\nbefore,after\n"a\nb",c\n\nd,e\n', encoding="utf-8")
    assert [line for line, _ in read_rows(path)] == [3, 6]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"before,after\na.png,b.png,,\n", "line 2 has 4 fields, the header 2"),
        (b"before,after,After\n", "has two columns after"),
        (b"a,b\n1,2\n", "has the columns a, b; expected at least before and after"),
        ("before,after\né,b\n".encode("cp1252"), "is not UTF-8: .*save it as CSV UTF-8"),
        (b"\xff\xfea", "is not UTF-8"),
    ],
)
def test_wrong_tables_are_named(tmp_path, content, message):
    path = tmp_path / "table.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"table\.csv {message}"):
        list(read_rows(path))


# Values whose blanks at the ends do not count, without what no table can hold.
VALUES = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\0\r\ufeff"), max_size=12
).map(str.strip)
ROWS = st.lists(st.tuples(VALUES.filter(bool), VALUES, VALUES), min_size=1, max_size=5)


@given(
    rows=ROWS,
    separator=st.sampled_from(",;\t"),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
    num_blank=st.integers(0, 2),
    is_capital=st.booleans(),
    is_announced=st.booleans(),
)
def test_any_dialect_is_read_alike(
    rows, separator, line_end, encoding, quoting, num_blank, is_capital, is_announced
):
    if line_end == "\r":
        quoting = csv.QUOTE_ALL  # Python's writer would leave other line breaks as they are
    text = io.StringIO(newline="")
    if is_announced:
        text.write(f"sep={separator}{line_end}")
    writer = csv.writer(text, delimiter=separator, lineterminator=line_end, quoting=quoting)
    names = ("before", "after", "caption")
    writer.writerow([name.upper() if is_capital else name for name in names])
    for row in rows:
        writer.writerow(row)
        for _ in range(num_blank):
            text.write(separator * 2 + line_end)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.CSV"
        path.write_bytes(text.getvalue().encode(encoding))
        found = [tuple(row[name] for name in names) for _, row in read_rows(path)]
    assert found == rows


@given(st.binary(max_size=80), st.sampled_from([".csv", ".tsv", ".jsonl"]))
def test_any_bytes_are_a_table_or_refused_by_name(content, ending):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"table{ending}"
        path.write_bytes(content)
        try:
            rows = list(read_rows(path))
        except ValueError as error:
            refusal = str(error)
        else:
            assert all(isinstance(row, dict) for _, row in rows)
            refusal = str(path)
    assert str(path) in refusal


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ('before,after,caption\na,b,"gone\nc,d,x\n', 2),
        ('before,after,caption\na,b,x\nc,d,"gone\ne,f,"big" block\n', 3),
        ('before\tafter\tcaption\na\tb\t"gone\nc\td\tx\n', 2),
    ],
)
def test_quotes_that_swallow_rows_are_refused(tmp_path, content, line):
    path = tmp_path / "table.csv"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"line {line}: a double quote is not closed"):
        list(read_rows(path))


def test_blank_rows_before_the_header_and_keys_in_capitals(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("\n;;\nbefore;after\na;b\n")
    assert [row for _, row in read_rows(path)] == [{"before": "a", "after": "b"}]
    path = tmp_path / "table.jsonl"
    path.write_text('{"Before": " a.png", "AFTER": "b", "Other": 1}\n', encoding="utf-16")
    assert list(read_rows(path)) == [(1, {"before": " a.png", "after": "b", "Other": 1})]


@pytest.mark.parametrize(("name", "split"), [("Train", "train"), ("validation", "val"), (3, 3)])
def test_splits_under_other_names(name, split):
    assert normalize_split(name) == split
