"""Names of files in any form: not UTF-8, é in one letter or two, capitals, addresses, devices."""

import csv
import os
import shutil
import tempfile
import unicodedata
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dataloaders.file_names import find_file, refuse_address
from dataloaders.images import load_image
from dataloaders.storage.image_cache import open_image_cache
from dataloaders.storage.image_check import unreadable_images
from dataloaders.user_pairs import find_pairs
from modules.model.explanation import Caption
from modules.pipeline.results import append_captions, read_finished
from modules.weights.tensor_files import read_weights, write_safetensors
from system import command
from system.command import quote_command, quote_script
from system.escaping import has_control_characters, name_as_text
from system.file_names import find_unportable, fold_name, normalize_name
from system.files import refuse_overwriting
from system.json_files import parse_json, to_json
from system.runtime import Runtime
from tests.conftest import draw_pair
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import SCRIPTS, arguments, log_of, run_refused

LATIN_1 = os.fsdecode(b"caf\xe9")
CAFE = {form: unicodedata.normalize(form, "café") for form in ("NFC", "NFD")}


def no_progress(iterable, *_):
    return iterable


# ---- names that are not UTF-8 ----


@pytest.fixture
def odd_folder(tmp_path) -> Path:
    """A folder whose name is not UTF-8; skips where there are none."""
    folder = tmp_path / LATIN_1
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has no names that are not UTF-8")
    return folder


def test_names_as_text():
    assert name_as_text("café") == "café"
    assert name_as_text(Path(LATIN_1) / "x") == "caf\\xe9/x"


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_runs_in_such_a_folder(task, spot, tiny_sizes, odd_folder, tmp_path, monkeypatch):
    if task == "caption":  # whose report needs slow scores
        use_quick_scores(monkeypatch.setattr)
        skip_reports(monkeypatch.setattr)
    data = shutil.copytree(spot, odd_folder / "data")
    cached = ["--image_cache", str(odd_folder / "cache")]
    words = arguments(data, odd_folder / "run", tiny_sizes, task, "--do_train", *cached)
    assert SCRIPTS[task].main([*words, "--epochs", "1", "--resume", "auto"]) == 0
    assert SCRIPTS[task].main([*words, "--resume", "auto", "--resume_force"]) == 0
    log = log_of(odd_folder / "run")
    assert "continuing from" in log
    assert "nothing is written for TensorBoard" in log
    assert (odd_folder / "run" / "report.html").is_file() == (task == "retrieval")


def draw_odd_pair(folder: Path, before: bytes, after: bytes) -> list[str]:
    """Two pictures of these names; OpenCV, which draws them, crashes on such names."""
    drawn = folder.parent / "drawn"
    drawn.mkdir()
    draw_pair(drawn, ["before.png", "after.png"], "red", 0)
    paths = []
    for name, own in (("before.png", before), ("after.png", after)):
        paths.append(str((drawn / name).rename(folder / os.fsdecode(own))))
    return paths


def test_the_image_cache_and_check_know_such_pictures_again(odd_folder):
    paths = draw_odd_pair(odd_folder, b"a.png", b"\xff.png")
    for _ in range(2):
        cache = open_image_cache(odd_folder / "cache", paths, 32, no_progress)
        assert cache(paths).equal(stack_images(paths))
        assert unreadable_images(paths, str(odd_folder / "checked"), no_progress) == {}
    data = odd_folder / "cache" / "images-32.uint8"
    assert data.stat().st_size == 2 * 3 * 32 * 32


def stack_images(paths):
    import torch

    return torch.stack([load_image(path, 32) for path in paths])


def test_weights_in_such_a_folder(odd_folder):
    tensors = {"a": torch.arange(3.0)}
    write_safetensors(odd_folder / "x.safetensors", tensors)
    assert torch.equal(read_weights(odd_folder / "x.safetensors")["a"], tensors["a"])


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".CSV", ".JSONL"])
def test_captions_of_such_pictures_are_written_and_continued(ending, odd_folder):
    draw_odd_pair(odd_folder, b"\xe9.png", b"\xe9_2.png")
    (pair,) = find_pairs(str(odd_folder), None, None)
    assert pair.id == "\\xe9"
    assert Path(pair.before).is_file()
    path = odd_folder / f"results{ending}"
    batches = [[(pair, [Caption("a dog", -1.0)])]]
    append_captions(batches, path, read_finished(path, [pair], 1), {}, Runtime())
    assert read_finished(path, [pair], 1).num_done == 1
    text = path.read_text(encoding="utf-8")
    if ending.lower() == ".csv":
        (row,) = csv.DictReader(text.splitlines())
        before = row["before"]
    else:
        before = parse_json(text)["before"]
    assert before == name_as_text(pair.before)


# Any bytes that may be in a name on Linux, and are no hidden file.
NAMES = st.binary(min_size=1, max_size=40).filter(
    lambda name: not set(name) & {0, ord("/")} and not name.startswith(b".")
)


@given(NAMES)
def test_pictures_of_any_name_are_paired_or_refused_in_a_line(name):
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        stem = os.fsdecode(name)
        for ending in (".png", "_2.png"):
            try:
                (folder / f"{stem}{ending}").touch()
            except OSError:  # this file system has no such name
                return
        if has_control_characters(name_as_text(stem)):
            with pytest.raises(ValueError, match="control character"):
                find_pairs(place, None, None)
            return
        (pair,) = find_pairs(place, None, None)
        assert os.fsencode(pair.before) == os.fsencode(folder / f"{stem}.png")
        pair.id.encode()
        text = name_as_text(pair.before)
        assert parse_json(to_json(text)) == text


# ---- names that look the same ----


def test_names_that_look_the_same_are_one_pair(tmp_path):
    one, two, table = tmp_path / "one", tmp_path / "two", tmp_path / "pairs.csv"
    for form, place in (("NFC", "before"), ("NFD", "after")):
        (two / place).mkdir(parents=True)
        draw_pair(two / place, [f"{CAFE[form]}.png"], "red", 0)
    one.mkdir()
    draw_pair(one, [f"{CAFE['NFD']}.png", f"{CAFE['NFC']}_2.png"], "red", 0)
    name = f"{CAFE['NFC']}.png"
    table.write_text(f"before,after\ntwo/before/{name},two\\after\\{name}\n", encoding="utf-8")
    for found in (
        find_pairs(str(one), None, None),
        find_pairs(str(two / "before"), str(two / "after"), None),
        find_pairs(None, None, str(table)),
    ):
        (pair,) = found
        assert Path(pair.before).is_file()
        assert Path(pair.after).is_file()
        assert pair.id in (CAFE["NFC"], "0")


def test_a_folder_of_a_table_may_be_written_in_the_other_form(tmp_path):
    folder = tmp_path / CAFE["NFD"]
    folder.mkdir()
    (folder / "a.png").touch()
    assert find_file(tmp_path / CAFE["NFC"] / "a.png") == folder / "a.png"
    assert find_file(tmp_path / CAFE["NFC"] / "b.png") == tmp_path / CAFE["NFC"] / "b.png"
    (folder / CAFE["NFD"]).touch()  # the folder is read again
    assert find_file(folder / CAFE["NFC"]).name == CAFE["NFD"]


def test_a_name_in_both_forms_is_taken_as_it_is_written(tmp_path):
    for form in CAFE.values():
        (tmp_path / form).touch()
    for form in CAFE.values():
        assert find_file(tmp_path / form).name == form


def test_names_that_differ_in_capitals_are_told(tmp_path):
    draw_pair(tmp_path, ["IMG_1.PNG", "IMG_2.PNG"], "red", 0)
    table = tmp_path / "pairs.csv"
    table.write_text("before,after\nimg_1.png,IMG_2.PNG\n")
    with pytest.raises(FileNotFoundError, match=r"img_1\.png .*; IMG_1\.PNG differs from it only"):
        find_pairs(None, None, str(table))
    for place, name in (("b", "x.png"), ("a", "X.png")):
        (tmp_path / place).mkdir()
        draw_pair(tmp_path / place, [name], "red", 0)
    with pytest.raises(ValueError, match=r"X has no counterpart .*\(x differs from it only"):
        find_pairs(str(tmp_path / "b"), str(tmp_path / "a"), None)


def test_pictures_of_one_name_are_refused(tmp_path):
    for name in (f"{CAFE['NFC']}.png", f"{CAFE['NFD']}.png"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match="have the same name, apart from the extension"):
        find_pairs(str(tmp_path), None, None)


@given(st.text(max_size=20))
def test_what_looks_the_same_is_the_same(name):
    assert normalize_name(unicodedata.normalize("NFD", name)) == normalize_name(name)
    assert fold_name(fold_name(name)) == fold_name(name)


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["a.png", "b/a.png", "A2.png"], []),
        (["../a.png", "./../b.png", "/c/d.png"], []),
        (["a.png", "A.png", "a.PNG"], ["A.png", "a.PNG"]),
        (["con.png", "x/NUL", "lpt1.tar.gz", "console.png", "com.png"], ["con.png", "x/NUL"]),
        (["a:b.png", "a?.png", "a. ", "b.", "..c", " d"], ["a:b.png", "a?.png", "a. ", "b."]),
        ([f"{CAFE['NFC']}.png", f"{CAFE['NFD']}.png"], [f"{CAFE['NFD']}.png"]),
    ],
)
def test_names_that_windows_cannot_have(names, found):
    expected = [*found, "lpt1.tar.gz"] if "lpt1.tar.gz" in names else found
    assert find_unportable(names) == expected


# ---- addresses and commands ----


@pytest.mark.parametrize(
    "address",
    ["https://a.example/x.png", "s3://b/x.png", "https:/a.example/x.png", "FTP://a/x", "file:///x"],
)
def test_addresses_are_refused(address, tmp_path):
    message = "is an address, expected the path of a file: download it first"
    with pytest.raises(ValueError, match=message):
        refuse_address(address)
    with pytest.raises(ValueError, match=message):
        find_pairs(address, address, None)
    with pytest.raises(ValueError, match=message):
        load_image(address)
    table = tmp_path / "pairs.csv"
    table.write_text(f"before,after\n{address},{address}\n")
    with pytest.raises(ValueError, match=f"line 2: .*{message}"):
        find_pairs(None, None, str(table))


def test_an_address_is_shown_without_its_secrets():
    with pytest.raises(ValueError, match="address") as error:
        refuse_address("https://me:secret@a.example/x.png?token=hidden")
    assert "secret" not in str(error.value)
    assert "hidden" not in str(error.value)


@pytest.mark.parametrize("path", ["C:/x.png", "c:\\x.png", "x.png", "a/b:c/x.png", "/https"])
def test_other_paths_are_no_addresses(path):
    refuse_address(path)


def test_commands_can_be_pasted():
    assert quote_command("python", "x.py", Path("my  data")) == "python x.py 'my  data'"


def test_commands_of_messages_run_where_pip_installed_the_code(monkeypatch):
    assert quote_script("gt/eval_utils.py", "--split", "my val") == (
        "python gt/eval_utils.py --split 'my val'"
    )
    monkeypatch.setattr(command, "IS_PACKAGED", True)
    assert quote_script("gt/eval_utils.py", "--split", "val") == (
        "python -m clip4idc.gt.eval_utils --split val"
    )


@pytest.mark.parametrize("flag", ["--output_dir", "--image_cache", "--resume_model"])
def test_names_that_are_too_long_are_one_line(flag, spot, tiny_sizes, tmp_path, capsys):
    words = arguments(spot, tmp_path / "run", tiny_sizes, "retrieval", "--do_train")
    assert "x" * 300 in run_refused(
        "retrieval", [*words, flag, str(tmp_path / ("x" * 300))], capsys
    )


def test_outputs_that_are_inputs_are_refused(tmp_path):
    (tmp_path / "a.json").touch()
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    with pytest.raises(ValueError, match=r"b\.json is a file that is read"):
        refuse_overwriting(tmp_path / "b.json", [None, tmp_path / "a.json"])
    refuse_overwriting(None, [tmp_path / "a.json"])
    refuse_overwriting(tmp_path / "c.json", [tmp_path / "a.json"])
