"""scripts/compare.py: rows share runs, and its tables have the right means and deviations."""

import subprocess
import sys

import pandas as pd

from scripts import compare
from tests.conftest import ROOT


def test_rows_share_their_first_stages(tmp_path):
    folders = {
        name: [folder for folder, _ in compare._stages(row, tmp_path)]
        for name, row in compare.ROWS.items()
    }
    base = folders["base"]
    assert folders["AdamW in stage 2"][0] == base[0]
    assert folders["AdamW in stage 2"][1] != base[1]
    assert folders["base, then an epoch of --scst"][:2] == folders["base, 5 beams"][:2] == base
    assert folders["2d patches"][0] != base[0]
    assert len({tuple(found) for found in folders.values()}) == len(folders)


def test_the_table_holds_means_deviations_and_differences_of_the_same_seed(tmp_path):
    rows = [
        ("base", 1, 80.0, 0.9),
        ("base", 2, 82.0, 1.0),
        ("2d patches", 1, 70.0, 0.8),
        ("2d patches", 2, None, 0.7),
        ("a row of an earlier commit", 2, None, 0.9),
    ]
    pd.DataFrame(
        [
            {"row": row, "seed": seed, "R@10": recall, "CIDEr": cider}
            for row, seed, recall, cider in rows
        ],
        columns=["row", "seed", *compare.SCORES.values()],
    ).to_csv(tmp_path / "found.csv", index=False)
    done = subprocess.run(
        [sys.executable, "scripts/compare.py", "--table", "--results", str(tmp_path / "found.csv")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[2:] == [
        "| base | 1, 2 | 81.0 ± 1.4 | 0.950 ± 0.071 | – | – | – | – |  |",
        "| 2d patches | 1, 2 | 70.0 | 0.750 ± 0.071 | – | – | – | – | -0.200 ± 0.141 |",
        "| a row of an earlier commit | 2 | – | 0.900 | – | – | – | – | -0.100 |",
    ]


def test_the_chosen_epoch_is_compared_with_the_best_on_the_test_scenes():
    judged = pd.DataFrame(
        {
            "seed": [1, 1, 1, 2, 2],
            "epoch": [0, 1, 2, 0, 1],
            "val": [0.5, 0.9, 0.8, 0.7, 0.6],
            "test": [0.4, 0.7, 0.8, 0.6, 0.5],
        }
    )
    assert compare.choice_table(judged).splitlines()[2:] == [
        "| 1 | 1, 0.700 | 2, 0.800 | 0.800 | 0.100 |",
        "| 2 | 0, 0.600 | 0, 0.600 | 0.500 | 0.000 |",
        "| mean | | | | 0.050 ± 0.071 |",
    ]
