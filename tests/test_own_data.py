"""A user's own table through both stages, what is refused, and the check of any dataset."""

import csv
import json
import shlex
from pathlib import Path

import pytest
from PIL import Image

import CLIP4IDCinference
import main_task_retrieval
from dataloaders.datasets import open_dataset
from dataloaders.datasets.pair_table import read_rows
from dataloaders.pairs import ImagePair
from gt import eval_utils
from modules.options import parse_options
from preprocess import check_dataset
from preprocess.training_commands import format_training_commands
from system.urls import Location
from tests.conftest import make_clevr, make_spot
from tests.quick_scores import skip_reports, use_quick_scores
from tests.test_predict import BLUE, RED, draw

COLUMNS = ("before", "after", "split", "caption", "id", "type")


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Eight pairs to train on, of which one has two rows, and four to test on, of two types."""
    rows = []
    for number in range(12):
        color = "red" if number % 2 else "blue"
        split = "train" if number < 8 else "test"
        before, after = f"img/{number}a.png", f"img/{number}b.jpg"
        draw(tmp_path / before, None, number)
        draw(tmp_path / after, RED if color == "red" else BLUE, number)
        rows.append((before, after, split, f"a {color} square, new", "", color))
    rows.append(("img/0a.png", "img/0b.jpg", "train", "someone added a square", "first", ""))
    path = tmp_path / "pairs.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


def pairs_of(table: Path, split: str = "train") -> list[ImagePair]:
    return open_dataset("pairs", table).checked_pairs(split)


def command(table: Path, sizes: Path, output: Path, *more: str) -> list[str]:
    words = f"--datatype pairs --data_path {table} --output_dir {output} --epochs 1"
    words += f" --pretrained_clip_name {sizes} --intra_num_hidden_layers 1 --max_words 12"
    words += " --batch_size 4 --batch_size_val 2 --num_thread_reader 0 --lr 1e-3"
    return [*words.split(), *more]


def test_both_stages_and_then_the_users_own_captions(
    table: Path, tiny_sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    adapted, finetuned = tmp_path / "one", tmp_path / "two"
    assert main_task_retrieval.main(command(table, tiny_sizes, adapted, "--do_train")) == 0
    weights = str(adapted / "pytorch_model.bin.best")
    words = command(table, tiny_sizes, finetuned, "--do_train", "--init_model", weights)
    assert CLIP4IDCinference.main([*words, "--decoder_num_hidden_layers", "1"]) == 0
    captions = json.loads((finetuned / "hyp_ep_eval.json").read_text())
    assert [row["image_id"] for row in captions] == [f"test-{number}" for number in range(4)]
    log = (finetuned / "log.txt").read_text()
    scores = log[log.rindex("caption scores") :].splitlines()
    assert [line.split()[0] for line in scores[2:5]] == ["all", "blue", "red"]
    check_scores_of_the_tool(table, finetuned, tmp_path)
    # The run's folder captions at once, by its model.json, without the flags of its training.
    capsys.readouterr()
    words = ["--do_predict", "--init_model", str(finetuned / "pytorch_model.bin.best")]
    words += ["--before", str(table.parent / "img/9a.png")]
    words += ["--after", str(table.parent / "img/9b.jpg")]
    assert CLIP4IDCinference.main(words) == 0
    assert capsys.readouterr().out.count("\n") == 1


def check_scores_of_the_tool(table: Path, run: Path, folder: Path) -> None:
    """The run's ground truth is what eval_utils.py makes, and `score` gives the run's scores."""
    truth = run / "ground_truth.json"
    words = ["--datatype", "pairs", "--data_path", str(table), "--output", str(folder / "gt.json")]
    assert eval_utils.main(words) == 0
    assert truth.read_text() == (folder / "gt.json").read_text()
    words = ["score", "--gt", str(truth), "--results", str(run / "hyp_ep_eval.json")]
    words += ["--type_mapping", str(run / "type_mapping.json")]
    words += ["--format", "json", "--output", str(folder / "scores.json")]
    assert eval_utils.main(words) == 0
    (system,) = json.loads((folder / "scores.json").read_text())["systems"].values()
    assert list(system["scores"]) == ["all", "blue", "red"]
    metrics = json.loads((run / "metrics.json").read_text())
    scores = system["scores"]["all"]
    assert scores == pytest.approx({name: metrics[name] for name in scores}, abs=1e-6)


def test_rows_of_one_pair_are_one_and_json_says_the_same(table: Path, tmp_path: Path) -> None:
    pairs = pairs_of(table)
    assert len(pairs) == 8
    # The id and the type of the first pair come from two of its rows.
    assert (pairs[0].id, pairs[0].change_type) == ("first", "blue")
    assert pairs[0].captions == ("a blue square, new", "someone added a square")
    assert pairs[7].id == "train-7"
    lines = []
    for pair in pairs:
        row = {
            "before": str(Path(pair.before).relative_to(tmp_path)),
            "after": str(Path(pair.after).relative_to(tmp_path)),
            "split": "train",
            "captions": list(pair.captions),
            "type": pair.change_type,
            "id": pair.id,
        }
        lines.append(json.dumps(row))
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    assert pairs_of(tmp_path / "pairs.jsonl") == pairs


def test_the_splits_and_types_of_a_table(table: Path) -> None:
    dataset = open_dataset("pairs", table)
    assert dataset.splits() == ("train", "test")
    pairs = dataset.checked_pairs("test")
    assert dataset.subsets(pairs) == {"blue": ["test-0", "test-2"], "red": ["test-1", "test-3"]}
    assert dataset.references("test", pairs)["test-1"] == ["a red square, new"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("img/0a.png,img/0b.jpg,other,x,,", "line 2: the split is 'other'"),
        ("img/0a.png,img/0b.jpg,train,,,", "line 2: no caption"),
        ("img/0a.png,,train,x,,", "line 2: no after"),
        ("img/0a.png,none.png,train,x,,", r"no image .*none.png .*line 2"),
        ("img/0a.png,img/0b.jpg,train,x,,all", "line 2: the type is 'all'.*other than 'all'"),
        ("img/0a.png,img/0b.jpg,,x,,", "line 2: no split"),
        ("img/0a.png,img/0b.jpg,test,x,,", "split train lists no pairs"),
        (
            "img/0a.png,img/0b.jpg,train,the ball, which was red, is gone,,",
            "line 2 has 8 fields, the header 6",
        ),
        (
            "img/0a.png,img/0b.jpg,train,x,7,\nimg/1a.png,img/1b.jpg,train,x,7,",
            "line 3: the id 7 is already used by another",
        ),
        (
            "img/0a.png,img/0b.jpg,train,x,7,\nimg/0a.png,img/0b.jpg,train,y,8,",
            "line 3: the id is '8', but line 2, for the same two images, says '7'",
        ),
        (
            "img/0a.png,img/0b.jpg,train,x,,add\nimg/0a.png,img/0b.jpg,train,y,,drop",
            "line 3: the type is 'drop', but line 2, .*says 'add'",
        ),
    ],
)
def test_wrong_tables_name_their_line(row: str, message: str, table: Path) -> None:
    table.write_text(",".join(COLUMNS) + "\n" + row + "\n")
    with pytest.raises((ValueError, OSError), match=message) as error:
        pairs_of(table)
    assert str(table) in str(error.value)


def test_a_row_of_several_lines_is_named_by_its_first(tmp_path: Path) -> None:
    table = tmp_path / "pairs.csv"
    rows = 'before,after,split,caption\n"a.png","b.png",train,"one\ntwo"\n\n,"b.png",train,"x\ny"\n'
    table.write_text(rows)
    assert [line for line, _ in read_rows(table)] == [2, 5]
    with pytest.raises(ValueError, match="line 5: no before"):
        open_dataset("pairs", table).pairs("train", need_images=False)


def test_a_table_is_checked(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    words = ["--datatype", "pairs", "--data_path", str(table)]  # which has no val split
    sheet = tmp_path / "sheet.png"
    assert check_dataset.main([*words, "--contact_sheet", str(sheet), "--max_words", "5"]) == 0
    out = capsys.readouterr().out
    assert "train: 8 pairs, 9 captions" in out
    assert "6 captions are repeats of others" in out
    assert "8 captions are longer than --max_words 5" in out
    assert "OK: found nothing that would stop training" in out
    assert Image.open(sheet).size[0] > 900


def commands_in(text: str) -> list[list[str]]:
    """The words of each indented command, without `python`."""
    lines = text.replace("\\\n", "").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.startswith("  python ")]


def test_the_check_ends_with_commands_for_the_table(table, capsys) -> None:
    assert check_dataset.main(["--datatype", "pairs", "--data_path", str(table)]) == 0
    adapt, finetune, trial = commands_in(capsys.readouterr().out)
    tasks = {"main_task_retrieval.py": "retrieval", "CLIP4IDCinference.py": "caption"}
    for script, *words in (adapt, finetune, trial):
        options = parse_options(words, tasks[script], "")
        assert options.run.do_train
        assert options.data.data_path == str(table)
        assert options.data.batch_size == 2  # of 8 pairs or 9 captions, at least three batches
        num_samples = 9 if script == "main_task_retrieval.py" else 8
        assert options.training.epochs * (num_samples // 2) >= 200
    assert options.model.init_model == Location("demo")
    assert options.training.patience == 0


@pytest.mark.parametrize(
    ("num_pairs", "batch_size", "epochs"), [(1, 1, 200), (12, 4, 67), (50, 16, 67), (9999, 16, 50)]
)
def test_batches_and_epochs_fit_the_number_of_pairs(num_pairs, batch_size, epochs) -> None:
    text = format_training_commands(["--datatype", "pairs"], num_pairs, num_pairs, longest=25)
    _, (_, *words), _ = commands_in(text)
    options = parse_options([*words, "--data_path", "x"], "caption", "")
    assert (options.data.batch_size, options.training.epochs) == (batch_size, epochs)
    assert options.data.max_words == 25


def test_bad_images_of_a_table_are_found(table: Path, capsys: pytest.CaptureFixture) -> None:
    images = table.parent / "img"
    (images / "8a.png").write_bytes((images / "8a.png").read_bytes()[:200])
    (images / "9b.jpg").unlink()
    (images / "10b.jpg").write_bytes((images / "10a.png").read_bytes())
    assert check_dataset.main(["--datatype", "pairs", "--data_path", str(table)]) == 1
    out = capsys.readouterr().out
    assert "WRONG: 1 images are missing" in out
    assert "9b.jpg" in out
    assert "WRONG: 1 images are broken" in out
    assert "8a.png" in out
    assert "1 images equal their pair's first" in out


def test_the_contact_sheet_shows_the_first_split_without_errors(
    table: Path, capsys: pytest.CaptureFixture
) -> None:
    sheet = table.parent / "sheet.png"
    words = ["--datatype", "pairs", "--data_path", str(table), "--contact_sheet", str(sheet)]
    (table.parent / "img" / "0b.jpg").unlink()  # of the train split
    assert check_dataset.main(words) == 1
    assert Image.open(sheet).size[0] > 900
    sheet.unlink()
    (table.parent / "img" / "8b.jpg").unlink()
    assert check_dataset.main(words) == 1
    assert not sheet.exists()
    assert "sheet.png is not drawn" in capsys.readouterr().out


def test_splits_that_overlap_or_are_absent_are_wrong(
    table: Path, capsys: pytest.CaptureFixture
) -> None:
    text = table.read_text()
    words = ["--datatype", "pairs", "--data_path"]
    table.write_text(text + "img/0a.png,img/0b.jpg,test,once more,,\n")
    assert check_dataset.main([*words, str(table)]) == 1
    assert "WRONG: 1 pairs are in another split too" in capsys.readouterr().out
    odd = {"before": "img/0a.png", "after": "img/0b.jpg", "split": ["train"], "caption": "x"}
    (table.parent / "odd.jsonl").write_text(json.dumps(odd))
    assert check_dataset.main([*words, str(table.parent / "odd.jsonl")]) == 1
    assert "the split is ['train'], expected one of" in capsys.readouterr().out
    table.write_text(text.replace(",test,", ",val,"))
    assert check_dataset.main([*words, str(table)]) == 1
    assert "WRONG: no test split" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["spot", "clevr"])
def test_the_papers_datasets_are_checked(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    make = {"spot": make_spot, "clevr": make_clevr}[name]
    data = make(tmp_path, {"train": 5, "val": 2, "test": 2})
    words = ["--datatype", name, "--data_path", str(data)]
    words += ["--features_path", str(data / "images_test")]
    assert check_dataset.main(words) == 0
    assert "train: 5 pairs" in capsys.readouterr().out
    next(data.rglob("*.png")).unlink()
    assert check_dataset.main(words) == 1
    assert "images are missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--datatype", "pairs", "--data_path", "none.csv"], "no file none.csv"),
        (["--datatype", "spot", "--data_path", "."], "--features_path is required"),
    ],
)
def test_a_check_that_cannot_begin_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit, match="2"):
        check_dataset.main(words)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_table_of_a_test_split_alone_is_evaluated(
    table: Path, tmp_path: Path, captioner_folder: Path
) -> None:
    lines = table.read_text().splitlines()
    kept = [lines[0], *(line for line in lines[1:] if ",test," in line)]
    alone = table.with_name("alone.csv")
    alone.write_text("\n".join(kept) + "\n")
    run = tmp_path / "run"
    words = ["--do_eval", "--datatype", "pairs", "--data_path", str(alone), "--batch_size_val", "2"]
    words += ["--output_dir", str(run), "--init_model", str(captioner_folder)]
    with pytest.MonkeyPatch.context() as patch:
        use_quick_scores(patch.setattr)
        skip_reports(patch.setattr)
        assert CLIP4IDCinference.main([*words, "--num_thread_reader", "0"]) == 0
    assert "there is no train split: the baselines are left out" in (run / "log.txt").read_text()
