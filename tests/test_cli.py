"""Both entry scripts from end to end on tiny drawn data, alone, under torchrun, and on real scenes."""

import csv
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import CLIP4IDCinference
import main_task_retrieval
from scripts.compare import read_scores
from tests.conftest import ROOT, make_spot
from tests.runs import FILES, SCRIPTS, check_board, finish, refused, start, words


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
@pytest.mark.parametrize("dataset", ["spot", "clevr"])
def test_train_then_evaluate(stage, dataset, tiny_sizes, tmp_path, request):
    data, run = request.getfixturevalue(dataset), tmp_path / "run"
    assert SCRIPTS[stage].main(words(data, run, tiny_sizes, stage, "--do_train")) == 0
    for epoch in range(2):
        assert (run / f"pytorch_model.bin.{epoch}").is_file()
    log = (run / "log.txt").read_text()
    for needed in (
        "--coef_lr = 1.0",
        "loss",
        "lr ",
        "s/step",
        "pairs/s",
        "best epoch",
        "test split, as in the paper",
    ):
        assert needed in log
    with open(run / "history.csv") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["0", "1"]
    trained = json.loads((run / "metrics.json").read_text())
    assert trained["datatype"] == dataset
    best = str(run / "pytorch_model.bin.best")
    assert (
        SCRIPTS[stage].main(
            words(data, tmp_path / "eval", tiny_sizes, stage, "--do_eval", "--init_model", best)
        )
        == 0
    )
    assert json.loads((tmp_path / "eval" / "metrics.json").read_text()) == trained
    assert {"retrieval": "text_to_pair_R10", "caption": "CIDEr"}[stage] in read_scores(
        tmp_path / "eval"
    )  # as comparisons read it
    if stage == "caption":
        captions = json.loads((run / "hyp_ep_eval.json").read_text())
        expected = (
            [f"{n:06d}.png{kind}" for kind in ("", "_n") for n in range(11, 16)]
            if dataset == "clevr"
            else [f"{n}.png" for n in range(11, 16)]
        )
        assert [row["image_id"] for row in captions] == expected
        assert captions == json.loads((tmp_path / "eval" / "hyp_ep_eval.json").read_text())
        assert log.count("best constant (all") == log.count("random training caption (all") == 1
        assert any(
            html.escape(row["caption"]) in (run / "report.html").read_text() for row in captions
        )
    needed = {
        "caption": ("best constant (all", ": the best", ": the worst", "class token of after"),
        "retrieval": (
            "chance",
            "Sentence → pairs",
            "Pair → sentences",
            "found at rank",
            'class="right"',
        ),
    }[stage]
    check_report(run / "report.html", needed, curves={"caption": 2, "retrieval": 3}[stage])
    check_report(tmp_path / "eval" / "report.html", needed, curves=0)
    check_board(run, epochs=2, score={"caption": "CIDEr", "retrieval": "text_to_pair_R1"}[stage])


def check_report(path: Path, needed: tuple[str, ...], curves: int) -> None:
    """One file that loads nothing from elsewhere, with what its stage shows and the options in it."""
    page = path.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,)', page)
    for text in (*needed, "--max_words", "square"):
        assert text in page
    assert page.count("<polyline") == curves


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("stage", [pytest.param("retrieval", marks=pytest.mark.slow), "caption"])
def test_compiled_training_loses_what_plain_training_does(stage, clevr, tiny_sizes, tmp_path):
    losses = {}
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        assert (
            SCRIPTS[stage].main(
                words(clevr, tmp_path / name, tiny_sizes, stage, "--do_train", *more)
            )
            == 0
        )
        with open(tmp_path / name / "history.csv") as file:
            losses[name] = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses["compiled"] == pytest.approx(
        losses["plain"], rel=1e-5 if stage == "retrieval" else 1e-2
    )  # dropout draws anew
    assert losses["plain"][0] != losses["plain"][1]
    plain, compiled = (
        torch.load(tmp_path / name / "pytorch_model.bin.1", weights_only=True) for name in losses
    )
    assert plain.keys() == compiled.keys()


def test_compiling_without_a_compiler_is_refused_in_one_line(
    clevr, tiny_sizes, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(SystemExit) as exit_:
        main_task_retrieval.main(
            words(clevr, tmp_path / "run", tiny_sizes, "retrieval", "--do_train", "--compile")
        )
    assert exit_.value.code == 2
    assert "--compile needs a C++ compiler" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_tight_header_trains_and_evaluates(spot, tiny_sizes, tmp_path):
    config = tmp_path / "cross_config.json"
    config.write_text(
        json.dumps(
            {
                "hidden_size": 64,
                "num_attention_heads": 1,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "max_position_embeddings": 30,
            }
        )
    )
    more = ("--sim_header", "tight", "--cross_model", str(tmp_path), "--epochs", "1")
    assert (
        main_task_retrieval.main(
            words(spot, tmp_path / "run", tiny_sizes, "retrieval", "--do_train", *more)
        )
        == 0
    )
    saved = torch.load(tmp_path / "run" / "pytorch_model.bin.0", weights_only=True)
    assert "similarity_dense.weight" in saved


def test_a_frozen_vision_tower_stays_as_it_was(clevr, tiny_sizes, tmp_path):
    main_task_retrieval.main(
        words(clevr, tmp_path / "first", tiny_sizes, "retrieval", "--do_train", "--epochs", "1")
    )
    adapted = tmp_path / "first" / "pytorch_model.bin.0"
    CLIP4IDCinference.main(
        words(
            clevr,
            tmp_path / "second",
            tiny_sizes,
            "caption",
            "--do_train",
            "--epochs",
            "1",
            "--init_model",
            str(adapted),
            "--freeze_layer_num",
            "-1",
            "--freeze_vision",
        )
    )
    before, after = (
        torch.load(file, weights_only=True)
        for file in (adapted, tmp_path / "second" / "pytorch_model.bin.0")
    )
    assert all(
        torch.equal(value, after[key])
        for key, value in before.items()
        if key.startswith("clip.visual.")
    )
    assert not torch.equal(
        before["clip.token_embedding.weight"], after["clip.token_embedding.weight"]
    )


def test_choosing_on_val_reports_on_test(spot, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    CLIP4IDCinference.main(
        words(spot, run, tiny_sizes, "caption", "--do_train", "--select_on", "val", "--epochs", "1")
    )
    assert [row["image_id"] for row in json.loads((run / "hyp_ep_0.json").read_text())] == [
        "8.png",
        "9.png",
        "10.png",
    ]
    assert len(json.loads((run / "hyp_ep_eval.json").read_text())) == 5
    assert "epochs are chosen on the val split" in (run / "log.txt").read_text()


@pytest.mark.parametrize("task", [["--do_eval"], ["--do_train", "--scst"]])
def test_evaluating_and_self_critical_training_need_a_captioner(
    task, spot, tiny_sizes, tmp_path, capsys
):
    options = words(spot, tmp_path / "run", tiny_sizes, "caption", *task)
    assert f"{task[-1]} needs the weights of a captioner" in refused("caption", options, capsys)
    assert not (tmp_path / "run").exists()


def test_accumulation_equals_one_batch_and_drops_the_incomplete(spot, tiny_sizes, tmp_path):
    """In stage 2 without dropout and with captions of one length, two halves make the whole."""
    config = tmp_path / "decoder_config.json"
    config.write_text(
        json.dumps(
            {
                "hidden_size": 64,
                "num_attention_heads": 1,
                "intermediate_size": 64,
                "num_decoder_layers": 1,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }
        )
    )
    entries = json.loads((spot / "reformat_train.json").read_text())
    data = tmp_path / "data"
    data.mkdir()
    (data / "reformat_test.json").write_text((spot / "reformat_test.json").read_text())
    (data / "reformat_train.json").write_text(
        json.dumps([{**e, "sentences": ["a red square is here"]} for e in entries])
    )
    saved = []
    for parts in (1, 2):
        run = tmp_path / f"run{parts}"
        CLIP4IDCinference.main(
            [
                *words(
                    spot,
                    run,
                    tiny_sizes,
                    "caption",
                    "--do_train",
                    "--decoder_model",
                    str(config),
                    "--epochs",
                    "1",
                    "--gradient_accumulation_steps",
                    str(parts),
                ),
                "--data_path",
                str(data),
                "--features_path",
                str(spot / "images_test"),
            ]
        )
        saved.append(torch.load(run / "pytorch_model.bin.0", weights_only=True))
    for key, value in saved[0].items():
        torch.testing.assert_close(
            saved[1][key], value, atol=2e-5, rtol=1e-4, msg=lambda m, k=key: f"{k}: {m}"
        )
    with pytest.raises(SystemExit):  # 8 pairs, 2 a batch: 4 batches an epoch can never fill 5 parts
        CLIP4IDCinference.main(
            words(
                spot,
                tmp_path / "x",
                tiny_sizes,
                "caption",
                "--do_train",
                "--batch_size",
                "10",
                "--gradient_accumulation_steps",
                "5",
            )
        )


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
def test_two_processes_under_torchrun(stage, clevr, tiny_sizes, tmp_path):
    cache = (
        tmp_path / "cache"
    )  # two processes want to build it at once; one process then evaluates without it
    code, errors = finish(
        start(
            [
                FILES[stage],
                *words(
                    clevr,
                    tmp_path / "two",
                    tiny_sizes,
                    stage,
                    "--do_train",
                    "--image_cache",
                    str(cache),
                ),
            ],
            2,
        )
    )
    assert code == 0, errors[-3000:]
    assert len(json.loads((cache / "images-64.json").read_text())["images"]) == 3 * (8 + 5)
    best = str(tmp_path / "two" / "pytorch_model.bin.best")
    two = json.loads((tmp_path / "two" / "metrics.json").read_text())
    SCRIPTS[stage].main(
        words(clevr, tmp_path / "one", tiny_sizes, stage, "--do_eval", "--init_model", best)
    )
    one = json.loads((tmp_path / "one" / "metrics.json").read_text())
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value == (
            pytest.approx(two[name], abs=1e-6) if isinstance(value, float) else two[name]
        )
    if stage == "caption":
        assert (tmp_path / "one" / "hyp_ep_eval.json").read_text() == (
            tmp_path / "two" / "hyp_ep_eval.json"
        ).read_text()


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
def test_real_scenes(stage, real_data, tiny_sizes, tmp_path):
    from dataloaders.datasets import open_dataset
    from gt.eval_utils import make_ground_truth

    root = real_data / "clevr-change" / "real48"
    output = tmp_path / "gt" / "clevr_total_change_captions_reformat.json"
    make_ground_truth(open_dataset("clevr", root), "test", output)
    more = ["--batch_size", "24" if stage == "retrieval" else "8", "--epochs", "1"]
    more += ["--gt_dir", str(tmp_path / "gt")] if stage == "caption" else []
    assert (
        SCRIPTS[stage].main(
            [*words(root, tmp_path / "run", tiny_sizes, stage, "--do_train"), *more]
        )
        == 0
    )
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["split"] == "test"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init_model", "nowhere.bin"], "no weights nowhere.bin"),
        (["--intra_num_hidden_layers", "9"], "give 0 to 2"),
        (["--freeze_layer_num", "5"], "freeze_layer_num is 5"),
        (["--batch_size", "40"], "8 samples, fewer than one batch of 40"),
        (["--gt_dir", "nowhere"], "make it with python gt/eval_utils.py"),
        (["--data_path", "nowhere"], "nowhere"),
        (["--decoder_model", "nowhere"], "no config 'nowhere'"),
        (["--pretrained_clip_name", "ViT-X"], "no weights ViT-X"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_nothing_is_written(
    more, message, spot, tiny_sizes, tmp_path, capsys
):
    run = tmp_path / "run"
    line = refused("caption", words(spot, run, tiny_sizes, "caption", "--do_train", *more), capsys)
    assert message in line
    assert line.startswith("CLIP4IDCinference.py: ")
    assert not run.exists()


def test_ground_truth_without_the_ids_is_found_before_training(spot, tiny_sizes, tmp_path, capsys):
    (tmp_path / "gt").mkdir()
    (tmp_path / "gt" / "spot_total_change_captions_reformat.json").write_text('{"annotations": []}')
    line = refused(
        "caption",
        words(
            spot,
            tmp_path / "run",
            tiny_sizes,
            "caption",
            "--do_train",
            "--gt_dir",
            str(tmp_path / "gt"),
        ),
        capsys,
    )
    assert "11.png" in line
    assert not (tmp_path / "run").exists()


def test_weights_of_another_size_are_refused(spot, tiny_sizes, tmp_path, capsys):
    from tests.conftest import tiny_weights

    weights = tiny_weights()
    weights["clip.visual.proj"] = torch.zeros(64, 32)
    torch.save(weights, tmp_path / "other.bin")
    assert "clip." in refused(
        "retrieval",
        words(
            spot,
            tmp_path / "run",
            tiny_sizes,
            "retrieval",
            "--do_eval",
            "--init_model",
            str(tmp_path / "other.bin"),
        ),
        capsys,
    )


def test_a_clip_of_another_vocabulary_is_refused(spot, tiny_sizes, tmp_path, capsys):
    from tests.conftest import tiny_weights

    torch.save(tiny_weights(), tmp_path / "small.bin")
    options = words(
        spot,
        tmp_path / "run",
        tiny_sizes,
        "retrieval",
        "--do_eval",
        "--init_model",
        str(tmp_path / "small.bin"),
    )
    assert "vocabulary of 50" in refused("retrieval", options, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_published_commands_word_for_word(processes, tmp_path):
    """Stage 1, then stage 2, on a seeded random ViT-B/32 and a drawn Spot-the-Diff; minutes and about 12 GB of memory."""
    from modules.model.clip_sizes import ClipSizes
    from modules.weights.sources import random_clip

    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    make_spot(clone / "images", {"train": 130, "val": 4, "test": 9})
    (clone / "images" / "gt" / "spot_total_change_captions_reformat.json").rename(
        clone / "gt" / "spot_total_change_captions_reformat.json"
    )
    torch.manual_seed(1)
    clip = random_clip(ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12))
    torch.save(clip, clone / "modules" / "ViT-B-32.pt")
    python = (
        sys.executable
        if processes == 1
        else f"{sys.executable} -m torch.distributed.run --standalone --nproc_per_node={processes}"
    )
    for script in ("adapt_spot", "finetune_spot"):
        text = (
            (ROOT / "scripts" / f"{script}.sh")
            .read_text()
            .replace("${PYTHON:-python}", python)
            .replace('cd "$(dirname "$0")/.."', "")
        )
        done = subprocess.run(
            ["bash", "-c", text, script, "--epochs", "1"],
            cwd=clone,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if script == "adapt_spot":
            (clone / "ckpts" / "ckpt_spot_retrieval" / "pytorch_model.bin.0").rename(
                clone / "ckpts" / "pretrained" / "pytorch_model.bin.30"
            )
    assert (
        len(json.loads((clone / "ckpts" / "ckpt_spot_caption" / "hyp_ep_eval.json").read_text()))
        == 9
    )
