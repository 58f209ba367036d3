"""Weights from every source through both scripts: cards before options, other sizes, addresses, runs continued from elsewhere."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

import CLIP4IDCinference
import main_task_retrieval
from modules.clip4idc import CLIP4IDC
from modules.model.bert import load_decoder_config
from modules.options import parse_options
from modules.pipeline.model import build_model
from modules.predictor import Predictor
from modules.tokenizer import tokenize_caption
from modules.training.objectives import TrainingData
from modules.training.objectives.contrastive import Contrastive
from modules.training.objectives.cross_entropy import CrossEntropy
from modules.weights.sources import random_clip, read_released, read_sizes
from preprocess import convert_weights, export_model
from system import download
from tests.conftest import ROOT, TINY
from tests.runs import SCRIPTS, refused, same_weights, words
from tests.servers import s3, web_site

EXAMPLES = ROOT / "docs" / "examples"


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch):
    monkeypatch.setattr(download, "FIRST_DELAY", 0.0)


def sizes_file(folder: Path, **changes: int) -> Path:
    path = folder / "sizes.json"
    path.write_text(json.dumps({**TINY, **changes}))
    return path


def caption(capsys, *options: str) -> str:
    """What --do_predict says of a shipped pair; nothing else is on stdout."""
    assert (
        CLIP4IDCinference.main(
            [
                "--do_predict",
                "--before",
                str(EXAMPLES / "recolored_before.png"),
                "--after",
                str(EXAMPLES / "recolored_after.png"),
                *options,
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.count("\n") == 1
    return said


@pytest.fixture(scope="module")
def twins(tmp_path_factory) -> Path:
    """The shipped captioner as a released-style file (CLIP's matrices in float16), as safetensors and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("twins")
    state = {
        key: value
        if key.startswith("clip.") and value.ndim >= 2 and "embedding" not in key
        else value.float()
        for key, value in load_file(ROOT / "ckpts" / "demo" / "model.safetensors").items()
    }
    (folder / "released").mkdir()
    torch.save(state, folder / "released" / "pytorch_model.bin.spot")
    shutil.copy(ROOT / "ckpts" / "demo" / "model.json", folder / "released")
    assert (
        convert_weights.main(
            [str(folder / "released" / "pytorch_model.bin.spot"), str(folder / "spot.safetensors")]
        )
        == 0
    )
    assert convert_weights.main([str(folder / "spot.safetensors"), str(folder / "hf")]) == 0
    return folder


def test_a_released_file_and_its_twins_give_the_same_caption(twins, capsys):
    released = twins / "released" / "pytorch_model.bin.spot"
    assert read_released(released)["clip.visual.proj"].dtype == torch.float16
    said = {
        caption(capsys, "--init_model", str(path))
        for path in (released, twins / "spot.safetensors", twins / "hf")
    }
    assert said == {caption(capsys)}


def test_captions_with_weights_at_addresses(twins, tmp_path, capsys, monkeypatch):
    expected = caption(capsys)
    card = (twins / "released" / "model.json").read_bytes()
    whole = (twins / "spot.safetensors").read_bytes()
    cache = ("--cache_dir", str(tmp_path / "cache"))
    with web_site({"m/spot.safetensors": whole, "m/model.json": card}) as site:
        site.broken = {"m/spot.safetensors": [len(whole) // 2]}
        assert (
            caption(capsys, "--init_model", f"{site.address}/m/spot.safetensors", *cache)
            == expected
        )
        assert [asked for name, asked in site.asked if name == "m/spot.safetensors"][
            1
        ] is not None, "it went on where it had stopped"
    with s3(monkeypatch, "weights") as client:
        for name in ("config.json", "model.json", "model.safetensors"):
            client.upload_file(str(twins / "hf" / name), "weights", f"hf/{name}")
        assert (
            caption(capsys, "--init_model", "s3://weights/hf/model.safetensors", *cache) == expected
        )


def test_what_cannot_be_used_is_one_line_and_nothing_is_left_under_its_name(
    twins, tmp_path, capsys, clevr, tiny_sizes
):
    page = tmp_path / "page.bin"
    page.write_bytes(b"<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    short = tmp_path / "short.bin"
    short.write_bytes((twins / "released" / "pytorch_model.bin.spot").read_bytes()[:100_000])
    adapted = tmp_path / "adapted.safetensors"
    save_file(
        {
            key: value
            for key, value in load_file(twins / "spot.safetensors").items()
            if key.startswith("clip.")
        },
        adapted,
    )
    shutil.copy(twins / "released" / "model.json", tmp_path)
    torch.save(
        {"visual.layer1.0.conv1.weight": torch.zeros(2), "visual.conv1.weight": torch.zeros(2)},
        tmp_path / "RN50.pt",
    )
    pair = [
        "--do_predict",
        "--before",
        str(EXAMPLES / "added_before.png"),
        "--after",
        str(EXAMPLES / "added_after.png"),
    ]
    cases = {
        str(page): "page.bin is a web page",
        str(short): "short.bin",
        str(adapted): "no captioner",
        str(tmp_path / "RN50.pt"): "ResNet",
        "http://127.0.0.1:9/x.bin": "Connection refused",
        "trained/none.bin": "no weights trained/none.bin",
    }
    for name, expected in cases.items():
        assert expected in refused(
            "caption", [*pair, "--init_model", name, "--cache_dir", str(tmp_path / "cache")], capsys
        )
    with web_site({"quota.bin": page.read_bytes()}) as site:
        line = refused(
            "caption",
            [
                *pair,
                "--init_model",
                f"{site.address}/quota.bin",
                "--cache_dir",
                str(tmp_path / "cache"),
            ],
            capsys,
        )
        assert "web page instead of the file" in line
        options = words(
            clevr,
            tmp_path / "run",
            tiny_sizes,
            "retrieval",
            "--do_train",
            "--pretrained_clip_name",
            f"{site.address}/gone.pt",
        )
        assert "gone.pt: the server answers 404" in refused("retrieval", options, capsys)
    assert not [path for path in (tmp_path / "cache").rglob("*.bin") if path.is_file()]
    assert not (tmp_path / "run").exists()


def test_a_card_goes_before_the_options_and_says_so(clevr, tiny_sizes, tmp_path, caplog):
    first, second = tmp_path / "first", tmp_path / "second"
    once = ("--do_train", "--epochs", "1")
    assert (
        main_task_retrieval.main(
            [
                *words(clevr, first, tiny_sizes, "retrieval", *once),
                "--intra_num_hidden_layers",
                "2",
                "--linear_patch",
                "3d",
            ]
        )
        == 0
    )
    card = json.loads((first / "model.json").read_text())
    assert (card["intra_num_hidden_layers"], card["linear_patch"], card["head_width"]) == (
        2,
        "3d",
        64,
    )
    best = first / "pytorch_model.bin.best"
    options = words(
        clevr, second, tiny_sizes, "retrieval", *once, "--init_model", str(first)
    )  # a run's folder: its best weights
    assert main_task_retrieval.main(options) == 0  # though they say 1 and 2d
    log = (second / "log.txt").read_text()
    assert f"intra_num_hidden_layers is 2, as {best} says (the option: 1)" in log
    assert f"linear_patch is 3d, as {best} says (the option: 2d)" in log
    assert json.loads((second / "model.json").read_text()) == card
    again = [*options, "--epochs", "2", "--resume", "auto", "--resume_force"]
    assert main_task_retrieval.main(again) == 0, "a resumed run has its architecture from its state"


def test_a_captioners_card_brings_its_config(twins, clevr, tiny_sizes, tmp_path, caplog):
    caplog.set_level("INFO")
    options = words(
        clevr, tmp_path, tiny_sizes, "caption", "--do_eval", "--init_model", str(twins / "hf")
    )
    model = build_model(parse_options(options, "caption", ""))
    card = json.loads((twins / "hf" / "model.json").read_text())
    assert model.decoder.config == load_decoder_config(card["decoder_config"])
    assert (model.clip.visual.intra_layers, model.clip.visual.linear_patch) == (0, "3d")
    assert "the captioner's config is the one beside" in caplog.text


def test_another_resolution_trains_resumes_and_captions(twins, clevr, tiny_sizes, tmp_path, capsys):
    first, second = tmp_path / "first", tmp_path / "second"
    assert (
        main_task_retrieval.main(
            words(clevr, first, tiny_sizes, "retrieval", "--do_train", "--epochs", "1")
        )
        == 0
    )
    options = words(
        clevr,
        second,
        tiny_sizes,
        "retrieval",
        "--do_train",
        "--epochs",
        "1",
        "--init_model",
        str(first),
        "--image_resolution",
        "128",
    )
    assert main_task_retrieval.main(options) == 0
    weights = torch.load(second / "pytorch_model.bin.0", weights_only=True)
    assert weights["clip.visual.positional_embedding"].shape == (17, 64)
    assert weights["clip.visual.joint_positional_embedding"].shape == (34, 64)
    assert "resized from images of 64 pixels to 128" in (second / "log.txt").read_text()
    assert (
        main_task_retrieval.main([*options, "--epochs", "2", "--resume", "auto", "--resume_force"])
        == 0
    )
    line = refused(
        "retrieval",
        [
            *words(clevr, tmp_path / "third", tiny_sizes, "retrieval", "--do_train"),
            "--image_resolution",
            "100",
        ],
        capsys,
    )
    assert "image_resolution 100 is not a multiple of vision_patch_size 32" in line
    assert not (tmp_path / "third").exists()
    shipped = Predictor.load(device="cpu").model.image_resolution
    assert caption(capsys, "--image_resolution", str(shipped)) == caption(capsys), (
        "its own resolution changes nothing"
    )
    caption(capsys, "--image_resolution", "160")


def test_a_published_folder_is_read_back_and_tells_its_scores(
    twins, clevr, tiny_sizes, tmp_path, capsys
):
    expected = caption(capsys)
    metrics = tmp_path / "metrics.json"
    metrics.write_text(
        json.dumps(
            {
                "stage": "caption",
                "datatype": "spot",
                "split": "val",
                "CIDEr": 1.25,
                "METEOR": None,
                "Bleu_1": 0.5,
            }
        )
    )
    folder = tmp_path / "published"
    assert (
        export_model.main(
            [
                str(twins / "hf"),
                str(folder),
                "--trained_on",
                "drawn scenes",
                "--name",
                "someone/drawn",
                "--metrics",
                str(metrics),
            ]
        )
        == 0
    )
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "model.json",
        "model.safetensors",
    }
    page = (folder / "README.md").read_text()
    for text in (
        "# someone/drawn",
        "Trained on: drawn scenes.",
        'Predictor.load("someone/drawn")',
        "on the val split of Spot-the-Diff:",
        "| | METEOR | CIDEr |",
        "| captions | – | 1.2500 |",
    ):
        assert text in page
    capsys.readouterr()
    assert caption(capsys, "--init_model", str(folder)) == expected
    assert Predictor.load(folder).trained_on == "drawn scenes"

    run = tmp_path / "run"
    assert (
        main_task_retrieval.main(
            words(clevr, run, tiny_sizes, "retrieval", "--do_train", "--epochs", "1")
        )
        == 0
    )
    assert export_model.main([str(run), str(tmp_path / "adapted"), "--trained_on", "squares"]) == 0
    page = (tmp_path / "adapted" / "README.md").read_text()
    recall = json.loads((run / "metrics.json").read_text())["text_to_pair_R10"]
    assert f"| {recall:.1f} |" in next(
        line for line in page.splitlines() if line.startswith("| text → pair")
    )
    for options in ([str(run), str(run)], [str(run), str(folder)]):  # nothing is written over
        with pytest.raises(SystemExit) as stop:
            export_model.main([*options, "--trained_on", "squares"])
        assert stop.value.code == 2
        assert "exists already" in capsys.readouterr().err
    again = words(
        clevr,
        tmp_path / "again",
        tiny_sizes,
        "retrieval",
        "--do_eval",
        "--init_model",
        str(tmp_path / "adapted"),
    )
    assert main_task_retrieval.main(again) == 0


PROPORTIONS = {
    "B/16": {"vision_patch_size": 16, "vision_width": 128},
    "L/14": {
        "embed_dim": 128,
        "transformer_width": 128,
        "vision_width": 192,
        "vision_patch_size": 8,
    },
}


@pytest.mark.parametrize("name", PROPORTIONS)
def test_other_proportions_take_a_step_of_either_stage(name, tmp_path):
    weights = random_clip(read_sizes(sizes_file(tmp_path, **PROPORTIONS[name])))
    images = torch.randint(0, 256, (2, 3, 3, 64, 64), dtype=torch.uint8)
    arrays = [tokenize_caption(text, 12) for text in ("a box is gone", "nothing has changed")]
    batch = {
        "images": images,
        "text_ids": torch.tensor(np.stack([words["retrieval_text_ids"] for words in arrays])),
    }
    for key in ("input_ids", "mask", "target_ids"):
        batch[f"caption_{key}"] = torch.tensor(
            np.stack([[words[f"caption_{key}"] for words in arrays]] * 2)
        )
    for task, step in (("retrieval", Contrastive), ("caption", CrossEntropy)):
        model = CLIP4IDC.from_weights(weights, task, intra_layers=1)
        step(model, TrainingData([], 12))(batch).backward()
        assert model.clip.visual.proj.grad.abs().sum() > 0
        weights = model.state_dict()


WHOLE = {
    "B/16": {
        "embed_dim": 512,
        "image_resolution": 224,
        "vision_layers": 12,
        "vision_width": 768,
        "vision_patch_size": 16,
        "transformer_width": 512,
        "transformer_layers": 12,
    },
    "L/14": {
        "embed_dim": 768,
        "image_resolution": 224,
        "vision_layers": 24,
        "vision_width": 1024,
        "vision_patch_size": 14,
        "transformer_width": 768,
        "transformer_layers": 12,
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE)
def test_openais_other_sizes_run_both_stages(name, clevr, tmp_path):
    """At full size, from random weights; L/14 takes 12 GB."""
    path = sizes_file(tmp_path, **WHOLE[name])
    once = ("--do_train", "--epochs", "1", "--precision", "bf16", "--keep_checkpoints", "1")
    assert main_task_retrieval.main(words(clevr, tmp_path / "first", path, "retrieval", *once)) == 0
    more = (*once, "--init_model", str(tmp_path / "first"))
    assert CLIP4IDCinference.main(words(clevr, tmp_path / "second", path, "caption", *more)) == 0
    assert (tmp_path / "second" / "report.html").is_file()


@pytest.mark.parametrize("stage", ["retrieval", pytest.param("caption", marks=pytest.mark.slow)])
def test_a_run_is_continued_from_an_address_as_from_its_folder(
    stage, clevr, tiny_sizes, tmp_path, capsys
):
    def options(run: str, *more: str) -> list[str]:
        return words(
            clevr,
            tmp_path / run,
            tiny_sizes,
            stage,
            "--do_train",
            "--cache_dir",
            str(tmp_path / "cache"),
            *more,
        )

    assert SCRIPTS[stage].main(options("whole")) == 0
    files = {
        f"run/{path.name}": path.read_bytes()
        for path in (tmp_path / "whole").iterdir()
        if path.is_file()
    }
    with web_site(files) as site:
        at = f"{site.address}/run"
        assert (
            SCRIPTS[stage].main(options("new", "--resume_model", f"{at}/training_state.bin.0")) == 0
        )
        assert same_weights(
            tmp_path / "whole" / "pytorch_model.bin.1", tmp_path / "new" / "pytorch_model.bin.1"
        )
        pd.testing.assert_frame_equal(
            *(pd.read_csv(tmp_path / run / "history.csv") for run in ("whole", "new")), rtol=1e-6
        )
        again = options("new", "--resume_model", f"{at}/pytorch_model.bin.0")
        assert "holds states of a run already: --resume auto continues it" in refused(
            stage, again, capsys
        )
        site.files["run/training_state.bin.0"] = files["run/training_state.bin.0"][::-1]
        (tmp_path / "cache").rename(tmp_path / "elsewhere")
        for name, expected in (
            ("training_state.bin.0", "SHA-256 mismatch"),
            ("training_state.bin.7", "404"),
            ("x.bin", "expected a file pytorch_model.bin.<epoch>"),
        ):
            assert expected in refused(
                stage, options("other", "--resume_model", f"{at}/{name}"), capsys
            )
    assert not (tmp_path / "other").exists()
