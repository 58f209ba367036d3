"""Ids, types, captions, file names and model info from others stay text wherever they are put."""

import csv
import io
import json

import pytest
import yaml

from dataloaders.datasets import open_dataset
from dataloaders.datasets.clevr_change import read_captions, read_type_mapping
from dataloaders.datasets.spot_the_diff import read_annotations
from dataloaders.pairs import ImagePair
from dataloaders.user_pairs import find_pairs
from gt import eval_utils
from gt.score_files import ScoreReport, SystemReport, format_latex, format_report
from modules.model.explanation import Caption
from modules.pipeline.results import format_rows, print_captions, read_finished
from modules.report.tables import format_table
from modules.weights.model_card import CardFacts, make_card
from preprocess import check_dataset
from preprocess.check_dataset import SplitReport
from system.escaping import (
    escape_formula,
    escape_latex,
    escape_markdown,
    escape_text,
    has_control_characters,
    show,
    to_one_line,
)

SCORES = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "METEOR", "ROUGE_L", "CIDEr")

# A name that would write a line of its own, and clear the terminal.
FORGED = "moved\nall            0.9999\x1b[2J"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\r\tc\x1b[0m\x07\x7f\x9b", r"a\nb\r\tc\x1b[0m\x07\x7f\x9b"),
        ("a\u2028b\u2029c\u0085", r"a\u2028b\u2029c\x85"),
        ("\u202egnp.exe\u2066", r"\u202egnp.exe\u2066"),
        ("\ud800\udce9", r"\ud800\udce9"),
        ("字 é ą 😀 👩‍👩‍👧 שלום\u200f", "字 é ą 😀 👩‍👩‍👧 שלום\u200f"),
        ("", ""),
    ],
)
def test_control_characters_are_escaped_for_a_terminal(text, shown):
    assert to_one_line(text) == shown
    without_layout = text.replace("\n", "").replace("\t", "")
    assert escape_text(without_layout) == shown.replace(r"\n", "").replace(r"\t", "")
    to_one_line(text).encode()


def test_texts_of_several_lines_keep_breaks_and_tabs():
    assert escape_text("a\tb\nc\r\x1b") == "a\tb\nc\\r\\x1b"


@pytest.mark.parametrize("name", ["a\x1b", "a\n", "\u2028", "\ud800", "\0"])
def test_control_characters_are_found(name):
    assert has_control_characters(name)


@pytest.mark.parametrize("name", ["a b.png", "字.png", "e\u0301", "\u202e", "שלום\u200f"])
def test_other_characters_may_be_in_names(name):
    assert not has_control_characters(name)


def test_printed_text_has_no_control_characters_and_no_secrets(capsys):
    show("a\n\x1b[2Jb http://user:word5@host/x")
    assert capsys.readouterr().out == "a\n\\x1b[2Jb http://host/x\n"


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("color & size", r"color \& size"),
        ("100%_moved", r"100\%\_moved"),
        (r"\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("a~b^c#d$e", r"a\textasciitilde{}b\textasciicircum{}c\#d\$e"),
        ("a\nb\\\\", r"a b\textbackslash{}\textbackslash{}"),
        ("[5cm] a", r"{}[5cm] a"),
        ("*x", r"{}*x"),
        ("<|>", r"\textless{}\textbar{}\textgreater{}"),
        ("add", "add"),
    ],
)
def test_latex_shows_the_text_as_it_is(text, escaped):
    assert escape_latex(text) == escaped


@pytest.mark.parametrize(
    "text",
    [
        "=1+1",
        "+1",
        "-1",
        "@x",
        "\t=1",
        "\r=1",
        "＝1",
        " =1",
        "\ufeff=1",
        "\u200b@x",
        '=HYPERLINK("http://x")',
    ],
)
def test_spreadsheets_get_no_formula(text):
    assert escape_formula(text) == f"'{text}"
    assert escape_formula(f"a{text}") == f"a{text}"
    assert escape_formula(" a") == " a"


def test_markdown_has_no_element_and_no_link():
    escaped = escape_markdown(
        "# a\n[b](http://c) ![d](e) <f> *g* `h` | ~i~ me@example.org www.x.org &amp; 1. - +\x1b"
    )
    assert escaped == (
        r"\# a \[b\]\(http\://c\) \!\[d\]\(e\) &lt;f&gt; \*g\* \`h\` \| \~i\~ me\@example\.org "
        r"www\.x\.org \&amp; 1\. \- \+\\x1b"
    )
    assert escape_markdown("x" * 301) == "x" * 299 + "…"


def report(group: str, system: str) -> ScoreReport:
    scores = dict.fromkeys(SCORES, 0.5)
    spans = dict.fromkeys(scores, (0.4, 0.6))
    differences = dict.fromkeys(scores, {"interval": (0.1, 0.2), "p": 0.5})
    values = SystemReport(
        {"all": scores, group: scores}, {"all": spans, group: spans}, {group: differences}
    )
    return ScoreReport("gt.json", "each", {"all": 2, group: 2}, {system: values}, {"draws": 100})


def test_tables_of_scores_have_a_line_for_each_group():
    intact = format_report(report("moved", "a/system.json")).splitlines()
    forged = format_report(report(FORGED, f"a/{FORGED}.json")).splitlines()
    assert len(forged) == len(intact)
    assert [line for line in forged if line.startswith("all            0.9999")] == []
    assert [line for line in forged if "\x1b" in line] == []


def test_groups_in_a_latex_table_stay_in_their_cell():
    row = format_latex(report("100%_moved & \\input{x}\nall", "a&b_c.json")).splitlines()[5]
    assert row.startswith(r"a\&b\_c & 100\%\_moved \& \textbackslash{}input\{x\} all & ")
    assert row.replace(r"\&", "").count("&") == 8


def test_labels_in_a_table_of_the_log_stay_in_their_line():
    rows = [("all", {"CIDEr": 1.0}), (FORGED, {"CIDEr": 1.0})]
    _, *lines = format_table(rows).splitlines()
    labels = [line.split("  ")[0] for line in lines]
    assert labels == ["all", "moved\\nall"]


ROW = "before,after,split,caption,id,type\na.png,b.png,train,x,{id},{type}\n"


@pytest.mark.parametrize("text", ["a\nb", "a\x1b[2J", "a\u2028b", "a\tb", "\x9b1m"])
def test_ids_and_types_with_control_characters_are_refused_in_tables(text, tmp_path):
    table = tmp_path / "pairs.csv"
    for column in ("id", "type"):
        values = {"id": "1", "type": "add", column: f'"{text}"'}
        table.write_text(ROW.format(**values), encoding="utf-8", newline="")
        with pytest.raises(
            ValueError, match=rf"pairs\.csv line \d: the {column} is .*control character"
        ) as error:
            open_dataset("pairs", table).checked_pairs("train", need_images=False)
        assert not has_control_characters(str(error.value))
    for name in ("a.png", "b.png"):
        (tmp_path / name).write_bytes(b"")
    table.write_text(ROW.format(id=f'"{text}"', type="add"), encoding="utf-8", newline="")
    with pytest.raises(ValueError, match="control character"):
        find_pairs(None, None, str(table))


@pytest.mark.parametrize(
    ("content", "read", "message"),
    [
        ({FORGED: []}, read_type_mapping, "type .*control character"),
        ([{"img_id": FORGED, "sentences": ["x"]}], read_annotations, "not a plain file name"),
        ({f"CLEVR_default_{FORGED}": ["x"]}, read_captions, 'is not "CLEVR'),
    ],
    ids=["types", "annotations", "captions"],
)
def test_names_with_control_characters_are_refused_in_lists(content, read, message, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"a\.json.*{message}") as error:
        read(tmp_path / "a.json")
    assert not has_control_characters(str(error.value))


def test_the_check_of_a_dataset_has_a_line_for_each_name():
    found = SplitReport(
        1, 1, missing=[f"a/{FORGED}"], broken=[FORGED], identical=[FORGED], in_other_splits=[FORGED]
    )
    text = check_dataset.format_report("train", found, 32)
    assert len(text.splitlines()) == 9
    assert "\x1b" not in text
    unreadable = check_dataset.format_report("train", SplitReport(unreadable=FORGED), 32)
    assert len(unreadable.splitlines()) == 1


FORMULA = '=HYPERLINK("http://x")'


@pytest.fixture
def captioned(tmp_path) -> list[tuple[ImagePair, list[Caption]]]:
    """Pairs with ids, and captions, that a spreadsheet would take for formulas."""
    names = ("=1+1", "@x", "plain", "-2")
    pairs = [ImagePair(name, tmp_path / "a", tmp_path / "b") for name in names]
    return [(pair, [Caption(FORMULA, -0.5)]) for pair in pairs]


def test_predictions_in_csv_are_no_formulas_and_can_be_resumed(captioned, tmp_path):
    text = format_rows(captioned, ".csv")
    rows = list(csv.reader(io.StringIO(text)))
    assert [row[0] for row in rows] == ["'=1+1", "'@x", "plain", "'-2"]
    assert [row[1:3] for row in rows] == [[f"'{FORMULA}", "-0.5000"]] * 4
    path = tmp_path / "p.csv"
    path.write_text("id,caption,score,before,after\n" + text)
    pairs = [pair for pair, _ in captioned]
    assert read_finished(path, pairs, 1).num_done == 4


def test_predictions_in_json_stay_as_they_are_and_can_be_resumed(captioned, tmp_path):
    text = format_rows(captioned, ".jsonl")
    rows = [json.loads(line) for line in text.splitlines()]
    pairs = [pair for pair, _ in captioned]
    assert [row["id"] for row in rows] == [pair.id for pair in pairs]
    path = tmp_path / "p.jsonl"
    path.write_text(text)
    assert read_finished(path, pairs, 1).num_done == 4


@pytest.mark.parametrize(
    ("alone", "line"),
    [(True, "a\\x1b[2J\\nb"), (False, "1,a\\x1b[2J\\nb,-0.5000,before,after")],
)
def test_captions_cannot_control_the_terminal(alone, line, capsys):
    """A vocabulary of bytes can write anything."""
    pair = ImagePair("1", "before", "after")
    print_captions(iter([[(pair, [Caption("a\x1b[2J\nb", -0.5)])]]), alone)
    assert capsys.readouterr().out.splitlines()[-1] == line


@pytest.mark.parametrize("score", [10**400, float("inf"), "x", None, [1]])
def test_a_score_that_is_not_a_number_is_a_dash_on_the_models_page(score):
    page = make_card(CardFacts("x", "caption", 1, {}, {"CIDEr": score, "datatype": []}))
    assert "| captions | – |" in page
    assert "model-index" not in page


def test_a_models_page_shows_its_info_as_text():
    source = "mine\n\n# Head [x](http://y) <script>"
    scores = {"CIDEr": 1.0, "datatype": "spot", "split": "<i>\n# x"}
    info = {"trained_on": source, "started_from": source, "license": "mit\ntags: [x]\n---"}
    page = make_card(CardFacts("own/<b>name", "caption", 10**6, info, scores))
    assert "# own/&lt;b&gt;name" in page
    assert r"Trained on: mine \# Head \[x\]\(http\://y\) &lt;script&gt;." in page
    assert r"It started from: mine \# Head \[x\]" in page
    assert r"on the &lt;i&gt; \# x split" in page
    metadata = yaml.safe_load(page[4 : page.index("\n---\n\n# own")])
    assert metadata["license"] == info["license"]
    assert "x" not in metadata["tags"]
    assert "--init_model 'a b; rm -r x'" in make_card(CardFacts("a b; rm -r x", "retrieval", 1, {}))


def test_an_error_about_results_of_others_is_one_line(tmp_path, capsys):
    truth = {"annotations": [{"image_id": "a", "caption": "x", "id": 0}], "images": []}
    (tmp_path / "gt.json").write_text(json.dumps(truth))
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": FORGED, "caption": "x"}]))
    files = ["--gt", str(tmp_path / "gt.json"), "--results", str(tmp_path / "r.json")]
    with pytest.raises(SystemExit, match="2"):
        eval_utils.main(["score", *files])
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert r"0.9999\x1b[2J is captioned" in said
    assert "\x1b" not in said
