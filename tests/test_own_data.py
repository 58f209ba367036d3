"""A user's own table: training, evaluation and scoring of both stages on it, what is refused, and the look over any dataset."""

import csv
import json
from pathlib import Path

import pytest
from PIL import Image

import CLIP4IDCinference
import main_task_retrieval
from dataloaders.datasets import open_dataset
from gt import eval_utils
from preprocess import check_dataset
from tests.conftest import make_clevr, make_spot
from tests.test_predict import BLUE, RED, draw

COLUMNS = ("before", "after", "split", "caption", "id", "type")


@pytest.fixture
def table(tmp_path) -> Path:
    """Eight pairs to train on, of which one has two rows, and four to test on, of two types."""
    rows = []
    for n in range(12):
        draw(tmp_path / "img" / f"{n}a.png", None, n)
        draw(tmp_path / "img" / f"{n}b.jpg", RED if n % 2 else BLUE, n)
        color = "red" if n % 2 else "blue"
        rows.append(
            (
                f"img/{n}a.png",
                f"img/{n}b.jpg",
                "train" if n < 8 else "test",
                f"a {color} square, new",
                "",
                color,
            )
        )
    rows.append(("img/0a.png", "img/0b.jpg", "train", "someone added a square", "first", ""))
    path = tmp_path / "pairs.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def options(table: Path, sizes: Path, output: Path, *more: str) -> list[str]:
    return [
        "--datatype",
        "pairs",
        "--data_path",
        str(table),
        "--output_dir",
        str(output),
        "--batch_size",
        "4",
        "--batch_size_val",
        "2",
        "--epochs",
        "1",
        "--max_words",
        "12",
        "--num_thread_reader",
        "0",
        "--intra_num_hidden_layers",
        "1",
        "--lr",
        "1e-3",
        "--pretrained_clip_name",
        str(sizes),
        *more,
    ]


def test_both_stages_and_then_the_users_own_captions(table, tiny_sizes, tmp_path, capsys):
    assert main_task_retrieval.main(options(table, tiny_sizes, tmp_path / "one", "--do_train")) == 0
    more = (
        "--do_train",
        "--init_model",
        str(tmp_path / "one" / "pytorch_model.bin.best"),
        "--decoder_num_hidden_layers",
        "1",
    )
    assert CLIP4IDCinference.main(options(table, tiny_sizes, tmp_path / "two", *more)) == 0
    captions = json.loads((tmp_path / "two" / "hyp_ep_eval.json").read_text())
    assert [row["image_id"] for row in captions] == [f"test-{n}" for n in range(4)]
    log = (tmp_path / "two" / "log.txt").read_text()
    scores = log[log.rindex("caption scores") :].splitlines()
    assert [line.split()[0] for line in scores[2:5]] == ["all", "blue", "red"]
    # The ground truth that was made on the way is what the tool of its own makes, and scores as training did.
    truth = tmp_path / "two" / "ground_truth.json"
    assert (
        eval_utils.main(
            [
                "--datatype",
                "pairs",
                "--data_path",
                str(table),
                "--output",
                str(tmp_path / "gt.json"),
            ]
        )
        == 0
    )
    assert truth.read_text() == (tmp_path / "gt.json").read_text()
    assert (
        eval_utils.main(
            [
                "score",
                "--gt",
                str(truth),
                "--results",
                str(tmp_path / "two" / "hyp_ep_eval.json"),
                "--type_mapping",
                str(tmp_path / "two" / "type_mapping.json"),
                "--format",
                "json",
                "--output",
                str(tmp_path / "s.json"),
            ]
        )
        == 0
    )
    scores = next(iter(json.loads((tmp_path / "s.json").read_text())["systems"].values()))["scores"]
    assert list(scores) == ["all", "blue", "red"]
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert scores["all"] == pytest.approx({name: metrics[name] for name in scores["all"]}, abs=1e-6)
    # What it left behind captions at once, by its model.json, without the flags that it was trained with.
    capsys.readouterr()
    pair = [
        "--before",
        str(table.parent / "img/9a.png"),
        "--after",
        str(table.parent / "img/9b.jpg"),
    ]
    assert (
        CLIP4IDCinference.main(
            [
                "--do_predict",
                *pair,
                "--init_model",
                str(tmp_path / "two" / "pytorch_model.bin.best"),
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.count("\n") == 1


def test_rows_of_one_pair_are_one_and_json_says_the_same(table, tmp_path):
    train = open_dataset("pairs", table).checked_pairs("train")
    assert len(train) == 8
    assert (train[0].id, train[0].change_type) == (
        "first",
        "blue",
    )  # each from the one row that tells it
    assert train[0].captions == ("a blue square, new", "someone added a square")
    lines = [
        {
            "before": str(Path(s.before).relative_to(tmp_path)),
            "after": str(Path(s.after).relative_to(tmp_path)),
            "split": "train",
            "captions": list(s.captions),
            "type": s.change_type,
            "id": s.id,
        }
        for s in train
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert open_dataset("pairs", tmp_path / "pairs.jsonl").checked_pairs("train") == train


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("img/0a.png,img/0b.jpg,dev,x,,", "line 2: the split is 'dev'"),
        ("img/0a.png,img/0b.jpg,train,,,", "line 2: no caption"),
        ("img/0a.png,,train,x,,", "line 2: no after"),
        ("img/0a.png,none.png,train,x,,", "no image"),
        ("img/0a.png,img/0b.jpg,train,x,,all", "other than 'all'"),
        ("img/0a.png,img/0b.jpg,,x,,", "line 2: no split"),
        (
            "img/0a.png,img/0b.jpg,train,the ball, which was red, is gone,,",
            "line 2 has 8 fields, the header 6",
        ),
        (
            "img/0a.png,img/0b.jpg,train,x,7,\nimg/1a.png,img/1b.jpg,train,x,7,",
            "line 3: the id 7 belongs to another",
        ),
        (
            "img/0a.png,img/0b.jpg,train,x,7,\nimg/0a.png,img/0b.jpg,train,y,8,",
            "line 3: the id is '8', but '7' in line 2",
        ),
        (
            "img/0a.png,img/0b.jpg,train,x,,add\nimg/0a.png,img/0b.jpg,train,y,,drop",
            "line 3: the type is 'drop', but 'add' in line 2",
        ),
    ],
)
def test_wrong_tables_name_their_line(row, message, table):
    table.write_text(",".join(COLUMNS) + "\n" + row + "\n")
    with pytest.raises((ValueError, OSError), match=message):
        open_dataset("pairs", table).checked_pairs("train")


def test_a_look_over_the_table(table, tmp_path, capsys):
    words = ["--datatype", "pairs", "--data_path", str(table)]  # which has no val
    assert (
        check_dataset.main(
            [*words, "--contact_sheet", str(tmp_path / "sheet.png"), "--max_words", "5"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "train: 8 pairs, 9 captions" in out
    assert "6 captions are repeats of others" in out
    assert "8 captions are longer than --max_words 5" in out
    assert "nothing that would stop a training" in out
    assert Image.open(tmp_path / "sheet.png").size[0] > 900
    (table.parent / "img" / "8a.png").write_bytes(
        (table.parent / "img" / "8a.png").read_bytes()[:200]
    )
    (table.parent / "img" / "9b.jpg").unlink()
    (table.parent / "img" / "10b.jpg").write_bytes((table.parent / "img" / "10a.png").read_bytes())
    assert check_dataset.main(words) == 1
    out = capsys.readouterr().out
    assert "WRONG: 1 images are missing" in out
    assert "9b.jpg" in out
    assert "WRONG: 1 images are broken" in out
    assert "8a.png" in out
    assert "1 images equal their pair's first" in out


def test_splits_that_overlap_or_lack_are_wrong(table, capsys):
    text = table.read_text()
    table.write_text(text + "img/0a.png,img/0b.jpg,test,once more,,\n")
    words = ["--datatype", "pairs", "--data_path", str(table)]
    assert check_dataset.main(words) == 1
    assert "WRONG: 1 pairs stand in another split too" in capsys.readouterr().out
    (table.parent / "odd.jsonl").write_text(
        '{"before": "img/0a.png", "after": "img/0b.jpg", "split": ["train"], "caption": "x"}'
    )
    assert check_dataset.main([*words[:3], str(table.parent / "odd.jsonl")]) == 1
    assert "the split is ['train'], expected one of" in capsys.readouterr().out
    table.write_text(text.replace(",test,", ",val,"))
    assert check_dataset.main(words) == 1
    assert "WRONG: no test split" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["spot", "clevr"])
def test_a_look_over_the_papers_layouts(dataset, tmp_path, capsys):
    data = (make_spot if dataset == "spot" else make_clevr)(
        tmp_path, {"train": 5, "val": 2, "test": 2}
    )
    words = [
        "--datatype",
        dataset,
        "--data_path",
        str(data),
        "--features_path",
        str(data / "images_test"),
    ]
    assert check_dataset.main(words) == 0
    assert "train: 5 pairs" in capsys.readouterr().out
    next(data.rglob("*.png")).unlink()
    assert check_dataset.main(words) == 1
    assert "images are missing" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main(["--datatype", "pairs", "--data_path", str(tmp_path / "none.csv")])
    assert "no file" in capsys.readouterr().err
