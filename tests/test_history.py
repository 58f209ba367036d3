"""history.csv, also as spreadsheets save it."""

import math

import pandas as pd
import pytest

import main_task_retrieval
from modules.training.history import append_history, read_history
from tests.runs import arguments, log_of

FIRST = {"epoch": 0, "loss": 1.2345678901234567, "CIDEr": math.nan}
SECOND = {"epoch": 1, "loss": 0.1, "CIDEr": 0.5}


@pytest.fixture
def folder(tmp_path):
    append_history(tmp_path, FIRST)
    append_history(tmp_path, SECOND)
    return tmp_path


def test_rows_are_kept_to_the_last_digit(folder):
    found = read_history(folder).to_dict("records")
    assert [row["loss"] for row in found] == [FIRST["loss"], SECOND["loss"]]
    assert math.isnan(found[0]["CIDEr"])
    assert (folder / "history.csv").read_text().splitlines()[0] == "epoch,loss,CIDEr"


def test_rows_of_later_epochs_are_replaced(folder):
    append_history(folder, {"epoch": 1, "loss": 7.0})
    assert read_history(folder)["loss"].tolist() == [FIRST["loss"], 7.0]
    append_history(folder, {"epoch": 0, "loss": 8.0})
    assert read_history(folder)["loss"].tolist() == [8.0]


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(",", ";"),
        lambda text: text.replace(",", "\t"),
        lambda text: text.replace(",", ";").replace(".", ","),
        lambda text: "\ufeff" + text.replace("\n", "\r\n") + ",,\r\n",
        lambda text: text.replace("epoch", "Epoch"),
    ],
)
def test_what_a_spreadsheet_saved_is_read(change, folder):
    path = folder / "history.csv"
    path.write_text(change(path.read_text()), encoding="utf-8")
    append_history(folder, {"epoch": 2, "loss": 0.05, "CIDEr": 1.0})
    table = pd.read_csv(path)
    assert table["epoch"].tolist() == [0, 1, 2]
    assert table["loss"].tolist() == pytest.approx([FIRST["loss"], 0.1, 0.05])


@pytest.mark.parametrize(
    "content",
    ["", "nonsense", "epoch,loss\nx,y\n", "epoch\n0,1,2\n", "\xff", "epoch,loss\ninf,1\n"],
)
def test_what_cannot_be_read_is_put_aside_and_told(content, folder, caplog):
    path = folder / "history.csv"
    path.write_text(content, encoding="latin-1")
    append_history(folder, {"epoch": 2, "loss": 0.05})
    assert pd.read_csv(path)["epoch"].tolist() == [2]
    aside = folder / "history.csv.unreadable"
    if content:
        assert aside.read_text(encoding="latin-1") == content
        (message,) = caplog.messages
        assert message.endswith("a new one is begun; the old one is now history.csv.unreadable")


def test_it_is_told_before_the_next_epoch(spot, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    words = arguments(spot, run, tiny_sizes, "retrieval", "--do_train", "--resume", "auto")
    assert main_task_retrieval.main([*words, "--epochs", "1"]) == 0
    (run / "history.csv").write_text("nonsense")
    assert main_task_retrieval.main([*words, "--resume_force"]) == 0
    log = log_of(run)
    assert log.index("history.csv.unreadable") < log.index("epoch 2/2 step 1")
    assert read_history(run)["epoch"].tolist() == [1]
