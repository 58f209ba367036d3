"""Both entry scripts from start to end: on tiny drawn data, under torchrun, on real scenes."""

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

from dataloaders.datasets import open_dataset
from gt.eval_utils import make_ground_truth
from modules.model.clip_sizes import ClipSizes
from modules.weights.sources import random_clip
from scripts.compare import read_scores
from system.parser import find_program_name
from tests.conftest import ROOT, make_spot, tiny_weights
from tests.runs import FILES, SCORE, SCRIPTS, arguments, check_tensorboard, run_refused, succeed

TASKS = ["retrieval", "caption"]
IN_REPORT = {
    "caption": ("best constant (all", ": best pairs", ": worst pairs", "summary of after"),
    "retrieval": (
        "chance",
        "Sentence → pairs",
        "Pair → sentences",
        "found at rank",
        'class="right"',
    ),
}
CURVES = {"caption": 2, "retrieval": 3}
IN_LOG = (
    "--lr = 0.001",
    "loss",
    "lr ",
    "s/step",
    "pairs/s",
    "best epoch",
    "test split, as in the paper",
)


def train(task: str, data: Path, run: Path, sizes: Path, *more: str) -> None:
    assert SCRIPTS[task].main(arguments(data, run, sizes, task, "--do_train", *more)) == 0


def evaluate(task: str, data: Path, run: Path, sizes: Path, weights: Path, *more: str) -> None:
    command = arguments(data, run, sizes, task, "--do_eval", "--init_model", str(weights), *more)
    assert SCRIPTS[task].main(command) == 0


def read_history(run: Path) -> list[dict[str, str]]:
    with open(run / "history.csv") as file:
        return list(csv.DictReader(file))


def read_metrics(run: Path) -> dict:
    return json.loads((run / "metrics.json").read_text())


def read_captions(run: Path, label: str = "eval") -> dict[str, str]:
    rows = json.loads((run / f"hyp_ep_{label}.json").read_text())
    return {row["image_id"]: row["caption"] for row in rows}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("dataset", ["spot", "clevr"])
def test_train_then_evaluate(task, dataset, tiny_sizes, tmp_path, request):
    data = request.getfixturevalue(dataset)
    run, again = tmp_path / "run", tmp_path / "eval"
    train(task, data, run, tiny_sizes)
    assert [row["epoch"] for row in read_history(run)] == ["0", "1"]
    for epoch in range(2):
        assert (run / f"pytorch_model.bin.{epoch}").is_file()
    log = (run / "log.txt").read_text()
    for text in IN_LOG:
        assert text in log
    trained = read_metrics(run)
    assert trained["datatype"] == dataset
    assert trained["stage"] == task
    evaluate(task, data, again, tiny_sizes, run / "pytorch_model.bin.best")
    assert read_metrics(again) == trained
    assert SCORE[task] in read_scores(again), "as comparisons read it"
    if task == "caption":
        check_captions(run, dataset, log)
        assert read_captions(again) == read_captions(run)
    check_report(run / "report.html", IN_REPORT[task], CURVES[task])
    check_report(again / "report.html", IN_REPORT[task], curves=0)
    check_tensorboard(run, epochs=2, score=SCORE[task])


def check_captions(run: Path, dataset: str, log: str) -> None:
    """All change pairs, then all distractors; some are in the report, and baselines in the log."""
    captions = read_captions(run)
    numbers = range(11, 16)
    expected = [f"{number}.png" for number in numbers]
    if dataset == "clevr":
        expected = [f"{number:06d}.png{end}" for end in ("", "_n") for number in numbers]
    assert list(captions) == expected
    report = (run / "report.html").read_text()
    assert any(html.escape(caption) in report for caption in captions.values())
    assert log.count("best constant (all") == log.count("random training caption (all") == 1


def check_report(path: Path, needed: tuple[str, ...], curves: int) -> None:
    """One file that loads nothing from elsewhere, with the task's own parts and the options."""
    page = path.read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)="(?!data:image/jpeg;base64,)', page)
    for text in (*needed, "--max_words", "square"):
        assert text in page
    assert page.count("<polyline") == curves


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("task", [pytest.param("retrieval", marks=pytest.mark.slow), "caption"])
def test_compiled_training_has_the_losses_of_plain_training(task, clevr, tiny_sizes, tmp_path):
    losses, weights = {}, {}
    for name, more in (("plain", ()), ("compiled", ("--compile",))):
        run = tmp_path / name
        train(task, clevr, run, tiny_sizes, *more)
        losses[name] = [float(row["loss"]) for row in read_history(run)]
        weights[name] = torch.load(run / "pytorch_model.bin.1", weights_only=True)
    tolerance = 1e-5 if task == "retrieval" else 1e-2  # the captioner's dropout draws other numbers
    assert losses["compiled"] == pytest.approx(losses["plain"], rel=tolerance)
    assert losses["plain"][0] != losses["plain"][1]
    assert weights["plain"].keys() == weights["compiled"].keys()


def test_compiling_without_a_compiler_is_refused(clevr, tiny_sizes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("shutil.which", lambda name: None)
    run = tmp_path / "run"
    command = arguments(clevr, run, tiny_sizes, "retrieval", "--do_train", "--compile")
    assert "--compile needs a C++ compiler" in run_refused("retrieval", command, capsys)
    assert not run.exists()


def test_tight_header_trains_and_evaluates(spot, tiny_sizes, tmp_path):
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 1, "max_position_embeddings": 30}
    (tmp_path / "cross_config.json").write_text(json.dumps(sizes))
    more = ("--sim_header", "tight", "--cross_model", str(tmp_path), "--epochs", "2")
    run = tmp_path / "run"
    train("retrieval", spot, run, tiny_sizes, *more)
    first, second = (
        torch.load(run / f"pytorch_model.bin.{epoch}", weights_only=True) for epoch in range(2)
    )
    head = "similarity_dense.weight"
    assert first[head].shape == (1, 64)
    assert not torch.equal(first[head], second[head]), "the cross encoder learns"
    assert len({row["loss"] for row in read_history(run)}) == 2
    again = tmp_path / "again"
    evaluate("retrieval", spot, again, tiny_sizes, run / "pytorch_model.bin.best", *more)
    assert read_metrics(again) == read_metrics(run)


def test_a_frozen_vision_tower_stays_as_it_was(clevr, tiny_sizes, tmp_path):
    train("retrieval", clevr, tmp_path / "first", tiny_sizes, "--epochs", "1")
    adapted = tmp_path / "first" / "pytorch_model.bin.0"
    more = ("--epochs", "1", "--init_model", str(adapted), "--freeze_layer_num", "-1")
    train("caption", clevr, tmp_path / "second", tiny_sizes, *more, "--freeze_vision")
    before = torch.load(adapted, weights_only=True)
    after = torch.load(tmp_path / "second" / "pytorch_model.bin.0", weights_only=True)
    vision = [key for key in before if key.startswith("clip.visual.")]
    assert len(vision) > 20
    assert all(torch.equal(before[key], after[key]) for key in vision)
    words_key = "clip.token_embedding.weight"
    assert not torch.equal(before[words_key], after[words_key])


def test_choosing_on_val_reports_on_test(spot, tiny_sizes, tmp_path):
    run = tmp_path / "run"
    train("caption", spot, run, tiny_sizes, "--select_on", "val", "--epochs", "1")
    assert list(read_captions(run, "0")) == ["8.png", "9.png", "10.png"]
    assert list(read_captions(run)) == [f"{number}.png" for number in range(11, 16)]
    assert "epochs are chosen on the val split" in (run / "log.txt").read_text()


@pytest.mark.parametrize("action", [["--do_eval"], ["--do_train", "--scst"]])
def test_evaluation_and_self_critical_training_need_a_captioner(
    action, spot, tiny_sizes, tmp_path, capsys
):
    command = arguments(spot, tmp_path / "run", tiny_sizes, "caption", *action)
    assert "needs the weights of a captioner" in run_refused("caption", command, capsys)
    assert not (tmp_path / "run").exists()


def test_accumulation_equals_one_batch(spot, tiny_sizes, tmp_path):
    """In finetuning, without dropout and with captions of one length, two halves make the whole."""
    sizes = {"hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 64}
    sizes |= {"num_decoder_layers": 1}
    sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    config = tmp_path / "decoder_config.json"
    config.write_text(json.dumps(sizes))
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(spot / "reformat_test.json", data)
    entries = json.loads((spot / "reformat_train.json").read_text())
    for entry in entries:
        entry["sentences"] = ["a red square is here"]
    (data / "reformat_train.json").write_text(json.dumps(entries))
    more = ("--decoder_model", str(config), "--epochs", "1", "--data_path", str(data))
    saved = []
    for steps in ("1", "2"):
        run = tmp_path / f"run{steps}"
        train("caption", spot, run, tiny_sizes, *more, "--gradient_accumulation_steps", steps)
        saved.append(torch.load(run / "pytorch_model.bin.0", weights_only=True))
    for key, value in saved[0].items():
        found = saved[1][key]
        torch.testing.assert_close(
            found, value, atol=2e-5, rtol=1e-4, msg=lambda text, key=key: f"{key}: {text}"
        )


def test_an_epoch_that_cannot_fill_one_accumulated_batch_is_refused(
    spot, tiny_sizes, tmp_path, capsys
):
    """Eight pairs, two at a time, are four parts of a batch that has five."""
    more = ("--batch_size", "10", "--gradient_accumulation_steps", "5")
    command = arguments(spot, tmp_path / "run", tiny_sizes, "caption", "--do_train", *more)
    line = run_refused("caption", command, capsys)
    assert "8 samples, fewer than one batch of 10: use --batch_size 5 or less" in line


@pytest.mark.parametrize("task", TASKS)
def test_two_processes_under_torchrun(task, clevr, tiny_sizes, tmp_path):
    """Both want to build one image cache. One process then evaluates what they trained."""
    two, one, cache = tmp_path / "two", tmp_path / "one", tmp_path / "cache"
    command = arguments(clevr, two, tiny_sizes, task, "--do_train", "--image_cache", str(cache))
    succeed([FILES[task], *command], processes=2)
    assert len(json.loads((cache / "images-64.json").read_text())["images"]) == 3 * (8 + 5)
    evaluate(task, clevr, one, tiny_sizes, two / "pytorch_model.bin.best")
    expected = read_metrics(two)
    found = read_metrics(one)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        if isinstance(value, float):
            assert value == pytest.approx(expected[name], abs=1e-6), name
        else:
            assert value == expected[name], name
    if task == "caption":
        assert read_captions(one) == read_captions(two)


@pytest.mark.parametrize("task", TASKS)
def test_real_scenes(task, real_data, tiny_sizes, tmp_path):
    """One epoch on 48 real scenes of CLEVR-Change: every caption of the test split is scored."""
    root = real_data / "clevr-change" / "real48"
    truth = tmp_path / "gt" / "clevr_total_change_captions_reformat.json"
    make_ground_truth(open_dataset("clevr", root), "test", truth)
    test_ids = [
        f"{number:06d}.png" for number in json.loads((root / "splits.json").read_text())["test"]
    ]
    more = ("--batch_size", "24" if task == "retrieval" else "8", "--epochs", "1")
    if task == "caption":
        more += ("--gt_dir", str(tmp_path / "gt"))
    run = tmp_path / "run"
    train(task, root, run, tiny_sizes, *more)
    metrics = read_metrics(run)
    assert (metrics["stage"], metrics["datatype"], metrics["split"]) == (task, "clevr", "test")
    if task == "retrieval":
        assert 1 <= metrics["pair_to_text_MedianR"] <= len(test_ids)
        assert 1 <= metrics["text_to_pair_MeanR"] <= len(test_ids)
    else:
        captions = read_captions(run)
        assert list(captions) == [*test_ids, *(f"{name}_n" for name in test_ids)]
        assert all(metrics[name] >= 0 for name in ("Bleu_1", "METEOR", "ROUGE_L", "CIDEr"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--init_model", "nowhere.bin"], "no weights nowhere.bin"),
        (["--intra_num_hidden_layers", "9"], "give 0 to 2"),
        (["--freeze_layer_num", "5"], "freeze_layer_num is 5"),
        (
            ["--batch_size", "40"],
            "8 samples, fewer than one batch of 40: use --batch_size 8 or less",
        ),
        (["--gt_dir", "nowhere"], "make it with python gt/eval_utils.py"),
        (["--data_path", "nowhere"], "nowhere"),
        (["--decoder_model", "nowhere"], "no config 'nowhere'"),
        (["--pretrained_clip_name", "ViT-X"], "no weights ViT-X"),
    ],
)
def test_what_a_user_can_correct_is_one_line_and_nothing_is_written(
    more, message, spot, tiny_sizes, tmp_path, capsys
):
    run = tmp_path / "run"
    line = run_refused(
        "caption", arguments(spot, run, tiny_sizes, "caption", "--do_train", *more), capsys
    )
    assert message in line
    assert line.startswith(f"{find_program_name()}: ")
    assert not run.exists()


def test_ground_truth_without_the_ids_is_found_before_training(spot, tiny_sizes, tmp_path, capsys):
    truth = tmp_path / "gt" / "spot_total_change_captions_reformat.json"
    truth.parent.mkdir()
    truth.write_text('{"annotations": []}')
    more = ("--do_train", "--gt_dir", str(truth.parent))
    command = arguments(spot, tmp_path / "run", tiny_sizes, "caption", *more)
    line = run_refused("caption", command, capsys)
    assert str(truth) in line
    assert "11.png" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"clip.visual.proj": torch.zeros(64, 32)}, "clip."), ({}, "has 50 token ids")],
)
def test_weights_of_another_size_are_refused(changes, message, spot, tiny_sizes, tmp_path, capsys):
    torch.save(tiny_weights() | changes, tmp_path / "other.bin")
    more = ("--do_eval", "--init_model", str(tmp_path / "other.bin"))
    command = arguments(spot, tmp_path / "run", tiny_sizes, "retrieval", *more)
    assert message in run_refused("retrieval", command, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_published_commands_word_for_word(processes, tmp_path):
    """Adaptation, then finetuning, of a random ViT-B/32 on a drawn Spot-the-Diff.

    Takes minutes and about 12 GB of memory.
    """
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
    make_spot(clone / "images", {"train": 130, "val": 4, "test": 9})
    truth = "spot_total_change_captions_reformat.json"
    (clone / "images" / "gt" / truth).rename(clone / "gt" / truth)
    torch.manual_seed(1)
    clip = random_clip(ClipSizes(512, 224, 12, 768, 32, 77, 49408, 512, 12))
    torch.save(clip, clone / "modules" / "ViT-B-32.pt")
    python = sys.executable
    if processes > 1:
        python += f" -m torch.distributed.run --standalone --nproc_per_node={processes}"
    for script in ("adapt_spot", "finetune_spot"):
        text = (ROOT / "scripts" / f"{script}.sh").read_text()
        text = text.replace("${PYTHON:-python}", python).replace('cd "$(dirname "$0")/.."', "")
        command = ["bash", "-c", text, script, "--epochs", "1"]
        done = subprocess.run(command, cwd=clone, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        if script == "adapt_spot":
            adapted = clone / "ckpts" / "ckpt_spot_retrieval" / "pytorch_model.bin.0"
            adapted.rename(clone / "ckpts" / "pretrained" / "pytorch_model.bin.30")
    assert len(read_captions(clone / "ckpts" / "ckpt_spot_caption")) == 9
