"""Weights from every source through both scripts: model.json, sizes, URLs, runs continued."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import CLIP4IDCinference
import main_task_retrieval
from modules.model.bert import load_decoder_config
from modules.options import parse_options
from modules.pipeline.model import build_model
from modules.predictor import Predictor
from modules.weights.sources import read_released
from preprocess import convert_weights
from system import download
from tests.conftest import ROOT
from tests.runs import SCRIPTS, arguments, run_refused, same_weights
from tests.servers import s3, web_site

EXAMPLES = ROOT / "docs" / "examples"
DEMO = ROOT / "ckpts" / "demo"
ONE_EPOCH = ("--do_train", "--epochs", "1")


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)


def predict_options(name: str, *more: str) -> list[str]:
    """--do_predict for a pair of docs/examples."""
    before = str(EXAMPLES / f"{name}_before.png")
    after = str(EXAMPLES / f"{name}_after.png")
    return ["--do_predict", "--before", before, "--after", after, *more]


def caption(capsys: pytest.CaptureFixture, *more: str) -> str:
    """The caption that --do_predict prints; nothing else is on stdout."""
    capsys.readouterr()
    assert CLIP4IDCinference.main(predict_options("recolored", *more)) == 0
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    """The shipped captioner as a published pickle, as safetensors and as a Hugging Face folder.

    Published files have CLIP's matrices in float16.
    """
    folder = tmp_path_factory.mktemp("twins")
    state = load_file(DEMO / "model.safetensors")
    for key, value in state.items():
        is_matrix = key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key
        state[key] = value if is_matrix else value.float()
    released = folder / "released" / "pytorch_model.bin.spot"
    released.parent.mkdir()
    torch.save(state, released)
    shutil.copy(DEMO / "model.json", released.parent)
    converted = str(folder / "spot.safetensors")
    assert convert_weights.main([str(released), converted]) == 0
    assert convert_weights.main([converted, str(folder / "hf")]) == 0
    return folder


def test_a_published_file_and_its_twins_give_the_same_caption(twins, capsys):
    released = twins / "released" / "pytorch_model.bin.spot"
    assert read_released(released)["clip.visual.proj"].dtype == torch.float16
    expected = caption(capsys)
    for path in (released, twins / "spot.safetensors", twins / "hf"):
        assert caption(capsys, "--init_model", str(path)) == expected


def test_weights_at_a_url_are_resumed_and_give_the_same_caption(twins, tmp_path, capsys):
    expected = caption(capsys)
    content = (twins / "spot.safetensors").read_bytes()
    info = (twins / "released" / "model.json").read_bytes()
    with web_site({"m/spot.safetensors": content, "m/model.json": info}) as site:
        site.broken = {"m/spot.safetensors": [len(content) // 2]}
        source = f"{site.url}/m/spot.safetensors"
        more = ("--init_model", source, "--cache_dir", str(tmp_path / "cache"))
        assert caption(capsys, *more) == expected
        ranges = [asked for name, asked in site.asked if name == "m/spot.safetensors"]
        assert ranges[1] is not None, "the second request asks for the rest"


def test_weights_on_s3_give_the_same_caption(twins, tmp_path, capsys, monkeypatch):
    expected = caption(capsys)
    with s3(monkeypatch, "weights") as client:
        for name in ("config.json", "model.json", "model.safetensors"):
            client.upload_file(str(twins / "hf" / name), "weights", f"hf/{name}")
        source = "s3://weights/hf/model.safetensors"
        more = ("--init_model", source, "--cache_dir", str(tmp_path / "cache"))
        assert caption(capsys, *more) == expected


def write_page(path: Path) -> None:
    path.write_bytes(b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")


def write_part(path: Path) -> None:
    path.write_bytes((DEMO / "model.safetensors").read_bytes()[:100_000])


def write_adapted(path: Path) -> None:
    """Without a captioner."""
    weights = load_file(DEMO / "model.safetensors")
    save_file({key: value for key, value in weights.items() if key.startswith("clip.")}, path)
    shutil.copy(DEMO / "model.json", path.parent)


def write_resnet(path: Path) -> None:
    names = ("visual.layer1.0.conv1.weight", "visual.conv1.weight")
    torch.save({name: torch.zeros(2) for name in names}, path)


def write_nothing(path: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("write", "name", "reason"),
    [
        (write_page, "page.bin", "page.bin is a web page"),
        (write_part, "part.safetensors", "part.safetensors"),
        (write_adapted, "adapted.safetensors", "no captioner"),
        (write_resnet, "RN50.pt", "ResNet"),
        (write_nothing, "trained/none.bin", "no weights trained/none.bin"),
        (write_nothing, "http://127.0.0.1:9/x.bin", "Connection refused"),
    ],
)
def test_weights_that_cannot_be_used_end_in_one_line(
    write, name, reason, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / name)
    options = predict_options("added", "--init_model", name, "--cache_dir", "cache")
    assert reason in run_refused("caption", options, capsys)


def test_a_page_instead_of_weights_does_not_stay_in_the_cache(tmp_path, capsys):
    cache = tmp_path / "cache"
    write_page(tmp_path / "page")
    with web_site({"quota.bin": (tmp_path / "page").read_bytes()}) as site:
        more = ("--init_model", f"{site.url}/quota.bin", "--cache_dir", str(cache))
        line = run_refused("caption", predict_options("added", *more), capsys)
    assert "answers with a web page instead of the file" in line
    assert not [path for path in cache.rglob("*.bin") if path.is_file()]


def test_a_clip_that_cannot_be_downloaded_leaves_no_run_folder(clevr, tiny_sizes, tmp_path, capsys):
    run = tmp_path / "run"
    with web_site({}) as site:
        more = ("--do_train", "--pretrained_clip_name", f"{site.url}/gone.pt")
        options = arguments(clevr, run, tiny_sizes, "retrieval", *more)
        line = run_refused("retrieval", options, capsys)
    assert "gone.pt: the server answered 404" in line
    assert not run.exists()


def test_model_json_takes_precedence_over_the_options_and_the_log_says_so(
    clevr, tiny_sizes, tmp_path
):
    first = tmp_path / "first"
    second = tmp_path / "second"
    options = arguments(clevr, first, tiny_sizes, "retrieval", *ONE_EPOCH)
    changed = ["--intra_num_hidden_layers", "2", "--linear_patch", "3d"]
    assert main_task_retrieval.main([*options, *changed]) == 0
    info = json.loads((first / "model.json").read_text())
    assert info["intra_num_hidden_layers"] == 2
    assert info["linear_patch"] == "3d"
    assert info["head_width"] == 64
    # A run's folder stands for its best weights. These options say 1 and 2d.
    more = (*ONE_EPOCH, "--init_model", str(first))
    options = arguments(clevr, second, tiny_sizes, "retrieval", *more)
    assert main_task_retrieval.main(options) == 0
    log = (second / "log.txt").read_text()
    best = first / "pytorch_model.bin.best"
    assert f"intra_num_hidden_layers is 2, as {best} says (the option: 1)" in log
    assert f"linear_patch is 3d, as {best} says (the option: 2d)" in log
    started = json.loads((second / "model.json").read_text())
    start = f"random weights of the sizes in {tiny_sizes.name}"
    assert info.pop("started_from") == start
    assert started.pop("started_from") == (
        f"first/pytorch_model.bin.best, which itself started from {start}"
    )
    assert info.pop("trained_with").startswith("--seed 42 --datatype clevr --batch_size ")
    assert "--epochs 1 " in started.pop("trained_with")
    assert started == info
    resumed = [*options, "--epochs", "2", "--resume", "auto", "--resume_force"]
    assert main_task_retrieval.main(resumed) == 0, "a resumed run has the model of its state"
    resumed_info = json.loads((second / "model.json").read_text())
    assert resumed_info["started_from"].startswith("first/pytorch_model.bin.best, which")
    assert "--epochs 2 " in resumed_info["trained_with"]


def test_a_captioners_config_comes_from_model_json(twins, clevr, tiny_sizes, tmp_path, caplog):
    caplog.set_level("INFO")
    more = ("--do_eval", "--init_model", str(twins / "hf"))
    options = arguments(clevr, tmp_path, tiny_sizes, "caption", *more)
    model = build_model(parse_options(options, "caption", "")).model
    info = json.loads((twins / "hf" / "model.json").read_text())
    assert model.decoder.config == load_decoder_config(info["decoder_config"])
    assert model.backbone.info() == {
        "intra_num_hidden_layers": 0,
        "linear_patch": "3d",
        "head_width": 64,
    }
    assert "the captioner's config is the one next to" in caplog.text


def test_another_resolution_trains_and_resumes(clevr, tiny_sizes, tmp_path):
    first = tmp_path / "first"
    second = tmp_path / "second"
    options = arguments(clevr, first, tiny_sizes, "retrieval", *ONE_EPOCH)
    assert main_task_retrieval.main(options) == 0
    more = (*ONE_EPOCH, "--init_model", str(first), "--image_resolution", "128")
    options = arguments(clevr, second, tiny_sizes, "retrieval", *more)
    assert main_task_retrieval.main(options) == 0
    weights = torch.load(second / "pytorch_model.bin.0", weights_only=True)
    assert weights["clip.visual.positional_embedding"].shape == (17, 64)
    assert weights["clip.visual.joint_positional_embedding"].shape == (34, 64)
    assert "resized from images of 64 pixels to 128" in (second / "log.txt").read_text()
    resumed = [*options, "--epochs", "2", "--resume", "auto", "--resume_force"]
    assert main_task_retrieval.main(resumed) == 0


def test_a_resolution_that_patches_do_not_fill_is_refused(clevr, tiny_sizes, tmp_path, capsys):
    more = ("--do_train", "--image_resolution", "100")
    options = arguments(clevr, tmp_path / "run", tiny_sizes, "retrieval", *more)
    line = run_refused("retrieval", options, capsys)
    assert "image_resolution 100 is not a multiple of vision_patch_size 32" in line
    assert not (tmp_path / "run").exists()


def test_another_resolution_captions(capsys):
    own = str(Predictor.load(device="cpu").model.image_resolution)
    assert caption(capsys, "--image_resolution", own) == caption(capsys)
    caption(capsys, "--image_resolution", "160")


@pytest.mark.parametrize("task", ["retrieval", pytest.param("caption", marks=pytest.mark.slow)])
def test_a_run_is_continued_from_a_url_as_from_its_folder(
    task, clevr, tiny_sizes, tmp_path, capsys
):
    def options(run: str, *more: str) -> list[str]:
        common = ("--do_train", "--cache_dir", str(tmp_path / "cache"))
        return arguments(clevr, tmp_path / run, tiny_sizes, task, *common, *more)

    whole = tmp_path / "whole"
    assert SCRIPTS[task].main(options("whole")) == 0
    files = {f"run/{path.name}": path.read_bytes() for path in whole.iterdir() if path.is_file()}
    with web_site(files) as site:
        url = f"{site.url}/run"
        resumed = options("new", "--resume_model", f"{url}/training_state.bin.0")
        assert SCRIPTS[task].main(resumed) == 0
        new = tmp_path / "new"
        assert same_weights(whole / "pytorch_model.bin.1", new / "pytorch_model.bin.1")
        histories = [pd.read_csv(run / "history.csv") for run in (whole, new)]
        pd.testing.assert_frame_equal(*histories, rtol=1e-6)
        again = options("new", "--resume_model", f"{url}/pytorch_model.bin.0")
        line = run_refused(task, again, capsys)
        assert "holds states of a run already: --resume auto continues it" in line
        site.files["run/training_state.bin.0"] = files["run/training_state.bin.0"][::-1]
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        for name, reason in (
            ("training_state.bin.0", "SHA-256 mismatch"),
            ("training_state.bin.7", "404"),
            ("x.bin", "expected a file pytorch_model.bin.<epoch>"),
        ):
            wrong = options("other", "--resume_model", f"{url}/{name}")
            assert reason in run_refused(task, wrong, capsys)
    assert not (tmp_path / "other").exists()
