"""scripts/compare.py: rows share runs, what is there is not run again, tables are right."""

import json
from pathlib import Path

import pandas as pd

from scripts import compare


def test_rows_share_their_first_stages(tmp_path):
    folders = {
        name: [stage.folder for stage in compare.stages_of(row, tmp_path)]
        for name, row in compare.ROWS.items()
    }
    base = folders["base"]
    assert folders["AdamW in stage 2"][0] == base[0]
    assert folders["AdamW in stage 2"][1] != base[1]
    assert folders["base, then an epoch of --scst"][:2] == folders["base, 5 beams"][:2] == base
    assert folders["2d patches"][0] != base[0]
    assert len({tuple(found) for found in folders.values()}) == len(folders)


def test_the_table_has_means_deviations_and_differences_of_the_same_seed(tmp_path, capsys):
    rows = [
        ("base", 1, 80.0, 0.9),
        ("base", 2, 82.0, 1.0),
        ("2d patches", 1, 70.0, 0.8),
        ("2d patches", 2, None, 0.7),
        ("a row of an earlier commit", 2, None, 0.9),
    ]
    found = pd.DataFrame(rows, columns=["row", "seed", "R@10", "CIDEr"])
    columns = ["row", "seed", *compare.COLUMNS.values()]
    found.reindex(columns=columns).to_csv(tmp_path / "found.csv", index=False)
    compare.main(["--table", "--results", str(tmp_path / "found.csv")])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| base | 1, 2 | 81.0 ± 1.4 | 0.950 ± 0.071 | – | – | – | – |  |",
        "| 2d patches | 1, 2 | 70.0 | 0.750 ± 0.071 | – | – | – | – | -0.200 ± 0.141 |",
        "| a row of an earlier commit | 2 | – | 0.900 | – | – | – | – | -0.100 |",
    ]


def test_the_choice_of_epochs_is_judged_by_the_test_scenes():
    judged = pd.DataFrame(
        {
            "seed": [1, 1, 1, 2, 2],
            "epoch": [0, 1, 2, 0, 1],
            "val": [0.5, 0.9, 0.8, 0.7, 0.6],
            "test": [0.4, 0.7, 0.8, 0.6, 0.5],
        }
    )
    assert compare.format_epoch_choice(judged).splitlines()[2:] == [
        "| 1 | 1, 0.700 | 2, 0.800 | 0.800 | 0.100 |",
        "| 2 | 0, 0.600 | 0, 0.600 | 0.500 | 0.000 |",
        "| mean | | | | 0.050 ± 0.071 |",
    ]


def test_rows_are_run_once_and_start_from_the_weights_before(tmp_path, monkeypatch):
    commands = []

    def pretend(command: list[str], folder: Path) -> None:
        """Leave the files that a stage would write."""
        commands.append(command)
        folder.mkdir(parents=True, exist_ok=True)
        scores = {"epoch": 0, "text_to_pair_R10": 50.0, "CIDEr": 0.5}
        if "--do_train" in command:
            pd.DataFrame([scores]).to_csv(folder / "history.csv", index=False)
            (folder / "pytorch_model.bin.0").touch()
        if "--output" in command:
            output = Path(command[command.index("--output") + 1])
            output.write_text(json.dumps({"type": {"share": 0.25}}))
        (folder / "metrics.json").write_text(json.dumps(scores))

    monkeypatch.setattr(compare, "run_script", pretend)
    options = ["--data", str(tmp_path / "data"), "--runs", str(tmp_path / "runs")]
    options += ["--results", str(tmp_path / "found.csv"), "--seeds", "7"]
    compare.main([*options, "--only", "base", "base, 5 beams"])
    scripts = [command[0] for command in commands]
    captions, gt, adaptation = "CLIP4IDCinference.py", "gt/eval_utils.py", "main_task_retrieval.py"
    assert scripts == [gt, adaptation, captions, gt, captions, gt]
    finetuned, decoded = commands[2], commands[4]
    for command, folder in ((finetuned, "adapt"), (decoded, "epochs3")):
        weights = Path(command[command.index("--init_model") + 1])
        assert weights.parent.name.endswith(folder)
    found = pd.read_csv(tmp_path / "found.csv")
    assert found["row"].tolist() == ["base", "base, 5 beams"]
    assert found["type"].tolist() == [25.0, 25.0]
    compare.main([*options, "--only", "base"])
    assert len(commands) == len(scripts), "nothing is run again"
