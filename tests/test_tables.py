"""Tables as editors and spreadsheets save them."""

import pytest

from dataloaders.datasets.pair_table import read_rows

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
