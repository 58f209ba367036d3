"""--do_predict: all forms of input and output, resuming, several processes, and what is refused."""

import csv
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import CLIP4IDCinference
from dataloaders.pairs import ImagePair
from modules.pipeline.results import COLUMNS, check_settings, origin_path, read_finished
from modules.predictor import Predictor
from preprocess import export_model
from system.command import run_command
from system.locks import hold_lock
from tests import quick_python
from tests.conftest import ROOT
from tests.runs import finish, start

RED, BLUE = (200, 30, 30), (30, 30, 200)
COLD = ("--temperature", "0.2", "--top_p", "0.9")  # keeps rounding from deciding among rare words
DEMO = ROOT / "ckpts" / "demo"


def draw(path: Path, color: tuple[int, int, int] | None, seed: int = 0) -> Path:
    """A gray picture of 150×120 with a square of a color."""
    pixels = np.random.default_rng(seed).integers(90, 110, (120, 150, 3), dtype=np.uint8)
    if color:
        pixels[30:80, 40:90] = color
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven pairs in Spot-the-Diff's naming, one of them JPEG."""
    for number in range(7):
        ending = "jpg" if number == 3 else "png"
        draw(tmp_path / "own" / f"p{number}.{ending}", RED if number % 2 else None, number)
        draw(tmp_path / "own" / f"p{number}_2.{ending}", BLUE, number)
    return tmp_path / "own"


@pytest.fixture
def tiny(captioner_folder: Path) -> tuple[str, ...]:
    """The words that make a run use a tiny captioner."""
    return ("--init_model", str(captioner_folder), "--precision", "fp32")


def run(*words: object) -> int:
    return CLIP4IDCinference.main(["--do_predict", *map(str, words)])


def refused(capsys: pytest.CaptureFixture, *words: object) -> str:
    """The last line on stderr of a run that ends with 2 and prints nothing on stdout."""
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.strip().splitlines()[-1]


def read_results(path: Path) -> list[tuple[str, str, float]]:
    """(id, caption, score) of each caption in a file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix == ".csv":
        rows = csv.DictReader(lines)
        return [(row["id"], row["caption"], float(row["score"])) for row in rows]
    found = [json.loads(line) for line in lines]
    return [(row["id"], one["caption"], one["score"]) for row in found for one in row["captions"]]


def printed_rows(capsys: pytest.CaptureFixture) -> list[dict[str, str]]:
    return list(csv.DictReader(capsys.readouterr().out.splitlines()))


def test_one_pair_prints_its_caption_and_nothing_else_on_stdout(folder, capsys):
    pair = (folder / "p1.png", folder / "p1_2.png")
    assert run("--before", pair[0], "--after", pair[1], "--precision", "fp32") == 0
    out, err = capsys.readouterr()
    assert out == Predictor.load(device="cpu", precision="fp32").caption(*pair) + "\n"
    assert len(out.split()) > 2
    assert "using the bundled model, demo. It knows only drawn scenes" in err
    assert "expect nonsense on photographs" in err


def test_a_table_of_one_pair_prints_a_table(folder, tiny, tmp_path, capsys):
    (tmp_path / "one.csv").write_text("before,after\nown/p0.png,own/p0_2.png\n")
    assert run("--pairs", tmp_path / "one.csv", *tiny) == 0
    assert capsys.readouterr().out.startswith("id,caption,score,before,after\n0,")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
@pytest.mark.parametrize("num_captions", [1, 3])
def test_an_interrupted_run_is_resumed_without_losing_or_doubling(
    suffix, num_captions, folder, tiny, tmp_path, monkeypatch
):
    monkeypatch.setattr("modules.pipeline.predict.BATCH_SIZE", 2)
    words = ["--before", folder, *tiny, "--num_captions", num_captions]
    words += COLD if num_captions > 1 else []
    whole = tmp_path / f"whole.{suffix}"
    assert run(*words, "--predictions", whole) == 0
    content = whole.read_bytes()
    origin = (tmp_path / f"{whole.name}.origin.json").read_bytes()
    expected = read_results(whole)
    assert [row[0] for row in expected] == [f"p{n}" for n in range(7) for _ in range(num_captions)]
    for cut in (0, 40, len(content) // 2, len(content) - 1, len(content)):
        part = tmp_path / f"part{cut}.{suffix}"
        part.write_bytes(content[:cut])
        (tmp_path / f"{part.name}.origin.json").write_bytes(origin)
        assert run(*words, "--predictions", part) == 0
        for ours, theirs in zip(read_results(part), expected, strict=True):
            assert ours[:2] == theirs[:2], f"cut at {cut} of {len(content)} bytes"
            assert ours[2] == pytest.approx(theirs[2], abs=2e-4)


def test_the_number_of_finished_pairs_is_said(folder, tiny, tmp_path, caplog):
    path = tmp_path / "out.csv"
    words = ["--before", folder, *tiny, "--predictions", path]
    assert run(*words) == 0
    assert run(*words) == 0
    assert f"resuming {path} after 7 finished pairs" in caplog.text


def test_results_of_other_settings_are_not_continued(folder, tiny, tmp_path, capsys):
    path = tmp_path / "out.csv"
    words = ["--before", folder, "--predictions", path]
    assert run(*words, *tiny) == 0
    content = path.read_bytes()
    assert "was made with beam_size 1" in refused(capsys, *words, *tiny, "--beam_size", "2")
    assert "was made with checkpoint_sha256" in refused(capsys, *words)
    named = refused(capsys, *words, *tiny, "--decoding", "greedy")
    assert f"{path} was made with decoding None" in named
    (tmp_path / "out.csv.origin.json").unlink()
    assert "has no out.csv.origin.json next to it" in refused(capsys, *words, *tiny)
    assert path.read_bytes() == content


def test_results_of_another_precision_are_not_continued_but_those_of_older_versions_are(tmp_path):
    path = tmp_path / "out.csv"
    older = {"max_words": 20}
    newer = {**older, "precision": "fp32", "model": {"max_words": 20}}
    origin_path(path).write_text(json.dumps(older))
    check_settings(path, newer)
    origin_path(path).write_text(json.dumps(newer))
    check_settings(path, newer)
    with pytest.raises(ValueError, match="was made with precision fp32"):
        check_settings(path, {**newer, "precision": "bf16"})


def test_weights_are_known_by_their_content(folder, tmp_path, capsys):
    """A folder and the file in it are one model; the same file with other numbers is another."""
    path = tmp_path / "out.csv"
    words = ["--before", folder, "--predictions", path]
    other = tmp_path / "other"
    assert export_model.main([str(DEMO), str(other), "--trained_on", "the same"]) == 0
    assert run(*words) == 0
    content = path.read_bytes()
    assert run(*words, "--init_model", DEMO) == 0
    weights = load_file(other / "model.safetensors")
    for name in weights:
        if name.endswith("predictions.bias"):
            weights[name] = weights[name] + 1
    save_file(weights, other / "model.safetensors")
    capsys.readouterr()
    assert "checkpoint_sha256" in refused(capsys, *words, "--init_model", other)
    assert path.read_bytes() == content


def test_results_of_other_pairs_are_not_continued(folder, tiny, tmp_path, capsys):
    path = tmp_path / "out.csv"
    for content in ("id,caption,score,before,after\nelse,x,0,a,b\n", "some,other,table\n"):
        path.write_text(content)
        error = refused(capsys, "--before", folder, *tiny, "--predictions", path)
        assert f"{path} holds the results of other pairs" in error
        assert path.read_text() == content


def test_results_of_another_number_of_captions_are_not_called_those_of_other_pairs(tmp_path):
    pairs = [ImagePair(name, "a.png", "b.png") for name in ("0", "1")]
    path = tmp_path / "out.csv"
    path.write_text(",".join(COLUMNS) + "\n0,x,0,a.png,b.png\n1,x,0,a.png,b.png\n")
    assert read_finished(path, pairs, 1).num_done == 2
    with pytest.raises(ValueError, match="or of another --num_captions"):
        read_finished(path, pairs, 2)


def test_a_reader_that_stops_early_and_ctrl_c_cause_no_traceback(folder, tiny):
    command = ["CLIP4IDCinference.py", "--do_predict", "--before", str(folder), *tiny]
    reader = f"set -o pipefail; {quick_python.executable()} {' '.join(command)} | head -c 1"
    done = subprocess.run(
        ["bash", "-c", reader], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout == "i", "of the header"
    assert "Traceback" not in done.stderr
    assert "Broken pipe" not in done.stderr

    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        run_command("x.py", interrupt)


def test_processes_share_the_pairs(folder, tiny, tmp_path):
    alone, shared = tmp_path / "alone.jsonl", tmp_path / "shared.jsonl"
    assert run("--before", folder, *tiny, "--predictions", alone) == 0
    words = ["--do_predict", "--before", str(folder), *tiny, "--predictions", str(shared)]
    code, errors = finish(start(["CLIP4IDCinference.py", *words], processes=2))
    assert code == 0, errors[-3000:]
    assert [row[:2] for row in read_results(alone)] == [row[:2] for row in read_results(shared)]


def test_tables_and_parallel_folders_are_the_same_pairs(folder, tiny, tmp_path, capsys):
    for side, ending in (("before", ""), ("after", "_2")):
        (tmp_path / side).mkdir()
        for number in (0, 1):
            content = (folder / f"p{number}{ending}.png").read_bytes()
            (tmp_path / side / f"p{number}.png").write_bytes(content)
    table = tmp_path / "pairs.csv"
    rows = "own/p0.png,own/p0_2.png,p0\nown/p1.png,own/p1_2.png,p1\n"
    table.write_text(f"\ufeffbefore,after,id\n{rows}", encoding="utf-8")
    lines = tmp_path / "pairs.jsonl"
    lines.write_text(
        '{"before": "own/p0.png", "after": "own/p0_2.png", "id": "p0"}\n\n'
        '{"before": "own/p1.png", "after": "own/p1_2.png", "id": "p1"}\n'
    )
    folders = ("--before", tmp_path / "before", "--after", tmp_path / "after")
    found = []
    for words in (folders, ("--pairs", table), ("--pairs", lines)):
        assert run(*words, *tiny) == 0
        rows = printed_rows(capsys)
        found.append([(row["id"], row["caption"], row["score"]) for row in rows])
    assert found[0] == found[1] == found[2]
    assert [row[0] for row in found[0]] == ["p0", "p1"]


def test_pictures_of_attention_do_not_change_the_captions(folder, tiny, tmp_path, capsys):
    """--save_attention draws one picture for each caption."""
    words = ["--before", folder, *tiny, "--num_captions", 2, *COLD]
    seen = tmp_path / "seen"
    found = []
    for more in ([], ["--save_attention", seen]):
        assert run(*words, *more) == 0
        found.append([(row["id"], row["caption"]) for row in printed_rows(capsys)])
    assert found[0] == found[1]
    names = [f"{number:05d}-p{number}-{place}.png" for number in range(7) for place in range(2)]
    assert sorted(path.name for path in seen.iterdir()) == names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--before", "{own}/p0.png"], "p0.png is one image: give a second one"),
        (["--before", "{own}/nowhere"], "no image or folder "),
        (["--before", "{own}/p0.png", "--after", "{own}/none.png"], "no image"),
        (["--before", "{own}/none.png", "--after", "{own}/p0.png"], "no image"),
        ([], "give two images, or a folder after --before, or a table after --pairs"),
        (["--before", "{own}", "--pairs", "x.csv"], "give either --before or --pairs"),
        (["--pairs", "{own}/none.csv"], "no file"),
        (["--pairs", "{own}/p0.png"], ".csv or .jsonl"),
        (["--before", "{own}", "--predictions", "out.txt"], ".csv or .jsonl"),
        (["--before", "{own}", "--top_p", "0"], "--top_p"),
        (["--before", "{own}", "--temperature", "-1"], "--temperature"),
        (["--before", "{own}", "--num_captions", "0"], "--num_captions"),
        (["--before", "{own}", "--num_captions", "2", "--beam_size", "2"], "cannot be combined"),
        (["--before", "{own}", "--do_train"], "exactly one"),
        (["--before", "{own}", "--after", "{own}/p0.png"], "must both be"),
        (["--before", "{own}", "--after", "{own}/typo"], "no file or folder"),
        (["--before", "{own}", "--beam_size", "101"], "expected 1 to 100"),
        (["--before", "{own}", "--init_model", "{own}"], "is a folder without"),
        (["--before", "{own}", "--init_model", "none.bin"], "no weights"),
    ],
)
def test_wrong_input_is_one_line(words, message, folder, capsys):
    assert message in refused(capsys, *(word.format(own=folder) for word in words))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", "before,after\na.png\n", "line 2: no after"),
        ("t.csv", "x,y\n1,2\n", "has the columns x, y; expected at least before and after"),
        ("t.csv", "before,after\na.png,b, c.png\n", "line 2 has 3 fields, the header 2"),
        ("t.csv", "", "no pairs"),
        ("t.jsonl", "{]\n", "line 1 is not JSON"),
        ("t.jsonl", "[1]\n", "not a JSON object"),
        ("t.jsonl", '{"before": 3}', "no before"),
        ("t.csv", "before,after,id\na.png,b.png,x\nb.png,a.png,x\n", "occurs twice"),
        ("t.csv", "before,after\na.png,c.png\n", "no image"),
    ],
)
def test_wrong_tables_are_one_line(name, content, message, tmp_path, capsys):
    draw(tmp_path / "a.png", RED)
    draw(tmp_path / "b.png", BLUE)
    (tmp_path / name).write_text(content)
    assert message in refused(capsys, "--pairs", tmp_path / name)


def test_no_image_of_a_folder_is_skipped(folder, capsys):
    draw(folder / "p7.png", RED)
    assert "p7 has no counterpart in" in refused(capsys, "--before", folder)
    (folder / "p7.png").unlink()
    draw(folder / "p0.jpg", RED)
    assert "have the same name, apart from the extension" in refused(capsys, "--before", folder)


def test_a_broken_image_leaves_no_file(folder, tiny, tmp_path, capsys):
    (folder / "p0.png").write_bytes(b"no image at all")
    path = tmp_path / "out.csv"
    error = refused(capsys, "--before", folder, *tiny, "--predictions", path)
    assert "cannot read the image" in error
    assert not path.exists()


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_files_of_others_are_not_overwritten(ending, folder, tiny, tmp_path, capsys):
    for content in (
        b"my notes",
        b"id,caption of mine",
        b'{"id": "p0", "before": "a"}',
        b"id,notes",
    ):
        path = tmp_path / f"mine.{ending}"
        path.write_bytes(content)
        assert "holds the results of other pairs" in refused(
            capsys, "--before", folder, "--predictions", path, *tiny
        )
        assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("ending", "begun"), [("csv", b"id,capt"), ("jsonl", b'{"id": "p0", "bef'), ("csv", b"")]
)
def test_what_a_killed_run_began_is_continued(ending, begun, folder, tiny, tmp_path):
    path = tmp_path / f"out.{ending}"
    path.write_bytes(begun)
    assert run("--before", folder, "--predictions", path, *tiny) == 0
    assert len(read_results(path)) == 7
    assert [one.name for one in tmp_path.iterdir() if one.name.startswith(".")] == []


def test_two_predictions_into_one_file(folder, tiny, tmp_path, capsys):
    path = tmp_path / "out.csv"
    with hold_lock(tmp_path / ".out.csv.lock"):
        line = refused(capsys, "--before", folder, "--predictions", path, *tiny)
    assert "out.csv is being written by another run" in line
    assert not path.exists()
