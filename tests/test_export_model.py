"""export_model.py: a folder that is read back, with a README that shows the scores."""

import json

import pytest
import yaml

import main_task_retrieval
from modules.predictor import Predictor
from modules.weights.sources import load_weights
from preprocess import export_model
from tests.conftest import ROOT, TINY
from tests.runs import arguments
from tests.test_sources import DEMO, caption


@pytest.fixture(scope="module")
def adapted(clevr, tmp_path_factory):
    """A run of adaptation, one epoch."""
    folder = tmp_path_factory.mktemp("adaptation")
    sizes = folder / "tiny.json"
    sizes.write_text(json.dumps(TINY))
    options = arguments(clevr, folder / "run", sizes, "retrieval", "--do_train", "--epochs", "1")
    assert main_task_retrieval.main(options) == 0
    return folder / "run"


def test_an_exported_captioner_writes_the_same_caption(tmp_path, capsys):
    folder = tmp_path / "exported"
    assert export_model.main([str(DEMO), str(folder), "--trained_on", "drawn scenes"]) == 0
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "model.json", "model.safetensors"}
    assert caption(capsys, "--init_model", str(folder)) == caption(capsys)
    assert Predictor.load(folder).trained_on == "drawn scenes"


def test_the_readme_says_how_to_use_the_model_and_what_it_scored(tmp_path):
    scores = {"CIDEr": 1.25, "METEOR": None, "Bleu_1": 0.5}
    facts = {"stage": "caption", "datatype": "spot", "split": "val"}
    metrics = tmp_path / "metrics.json"
    metrics.write_text(json.dumps({**facts, **scores}))
    options = [str(DEMO), str(tmp_path / "exported"), "--trained_on", "drawn scenes"]
    options += ["--name", "someone/drawn", "--metrics", str(metrics)]
    assert export_model.main(options) == 0
    page = (tmp_path / "exported" / "README.md").read_text()
    for text in (
        "# someone/drawn\n",
        "Trained on: drawn scenes.\n",
        'Predictor.load("someone/drawn")',
        "on the val split of Spot-the-Diff:\n",
        "| | METEOR | CIDEr |\n",
        "| captions | – | 1.2500 |\n",
    ):
        assert text in page, text


def test_the_best_weights_of_a_run_have_its_scores(adapted, tmp_path):
    folder = tmp_path / "exported"
    assert export_model.main([str(adapted), str(folder), "--trained_on", "squares"]) == 0
    recall = json.loads((adapted / "metrics.json").read_text())["text_to_pair_R10"]
    lines = (folder / "README.md").read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| text → pair")]
    assert f"| {recall:.1f} |" in row


def test_the_readme_says_what_the_model_started_from_and_how_it_was_trained(adapted, tmp_path):
    folder = tmp_path / "exported"
    assert export_model.main([str(adapted), str(folder), "--trained_on", "twelve squares"]) == 0
    page = (folder / "README.md").read_text().replace("\\", "")
    assert "It started from: random weights of the sizes in tiny.json.\n" in page
    assert "The options of its training: --seed 42 --datatype clevr --batch_size " in page
    _, metadata, _ = page.split("---\n", 2)
    (result,) = yaml.safe_load(metadata)["model-index"][0]["results"]
    assert result["task"] == {"type": "feature-extraction"}
    assert result["dataset"]["split"] == "test"
    scores = json.loads((adapted / "metrics.json").read_text())
    shown = {one["name"]: one["value"] for one in result["metrics"]}
    assert shown["R1 (text → pair)"] == scores["text_to_pair_R1"]
    # The next model says where it began, however it is named; older files without it still load.
    loaded = load_weights(str(folder), "no CLIP is looked for")
    assert loaded.started_from == (
        "exported/model.safetensors, trained on twelve squares, which itself started from random "
        "weights of the sizes in tiny.json"
    )
    demo = load_weights(str(ROOT / "ckpts" / "demo"), "no CLIP is looked for")
    assert demo.started_from.startswith("demo, trained on 50,000 drawn scenes")
    assert "started_from" not in demo.info


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--license", "MIT License"], "the license is 'MIT License', expected the hub's name"),
        (["--datasets", "a b"], "'a b' is no name of a dataset on the hub"),
        (["--trained_on", " "], "--trained_on is empty"),
    ],
)
def test_wrong_facts_are_refused_before_anything_is_written(options, expected, tmp_path, capsys):
    folder = tmp_path / "exported"
    with pytest.raises(SystemExit) as stop:
        export_model.main([str(DEMO), str(folder), "--trained_on", "drawn scenes", *options])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert expected in line
    assert line.count("\n") == 1
    assert not folder.exists()


def test_an_exported_adaptation_is_evaluated(adapted, clevr, tiny_sizes, tmp_path):
    folder = tmp_path / "exported"
    assert export_model.main([str(adapted), str(folder), "--trained_on", "squares"]) == 0
    more = ("--do_eval", "--init_model", str(folder))
    options = arguments(clevr, tmp_path / "again", tiny_sizes, "retrieval", *more)
    assert main_task_retrieval.main(options) == 0


def test_weights_without_model_json_are_refused(adapted, tmp_path, capsys):
    weights = tmp_path / "pytorch_model.bin.0"
    weights.write_bytes((adapted / "pytorch_model.bin.0").read_bytes())
    with pytest.raises(SystemExit) as stop:
        export_model.main([str(weights), str(tmp_path / "exported"), "--trained_on", "squares"])
    assert stop.value.code == 2
    assert f"no model.json next to {weights}" in capsys.readouterr().err
    assert not (tmp_path / "exported").exists()


def test_existing_folders_are_not_overwritten(adapted, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    for folder in (adapted, tmp_path):
        with pytest.raises(SystemExit) as stop:
            export_model.main([str(adapted), str(folder), "--trained_on", "squares"])
        assert stop.value.code == 2
        assert "exists already" in capsys.readouterr().err
