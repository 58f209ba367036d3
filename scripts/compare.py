"""The paper's claims, and what may better the recipe, compared at equal compute over seeds on drawn scenes that stand still.

    python scripts/compare.py --seeds 1 2 3                   # everything that is not there yet, then the table
    python scripts/compare.py --seeds 2 --only base 2d        # some rows of one seed; such commands may run side by side
    python scripts/compare.py --table                         # the table of what is there

A row is a small CLIP of random weights, adapted and finetuned, judged on val after its last epoch. Runs lie in --runs; rows share
what they have in common, and what is there is not done again. The scenes are to be drawn before, into --data:
python preprocess/synthesize.py --seed 0 --jitter 0 --train 10000 --val 500 --test 1000 --output runs/compare/data
"""

import argparse
import json
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
COMMON = """--do_train --datatype clevr --num_thread_reader 0 --max_words 24 --batch_size_val 100 --select_on val --eval_split val
  --pretrained_clip_name modules/clip-demo.json --precision bf16 --freeze_layer_num -1"""
JOINT = "--intra_num_hidden_layers 0 --linear_patch 3d"
ADAPT = "main_task_retrieval.py --batch_size 64 --lr 7e-4 --epochs 1"
FINETUNE = "CLIP4IDCinference.py --decoder_model decoder-demo --batch_size 32 --lr 1e-3 --coef_lr 2"
MORE = "--epochs 1 --lr 1e-4"


@dataclass(frozen=True)
class Row:
    """Options beyond the base's; adapt=None leaves stage 1 out, `more` continues the captioner with options of its own."""

    architecture: str = JOINT
    adapt: str | None = ""
    finetune: str = "--epochs 3"
    more: str | None = None


ROWS = {
    "base": Row(),
    "no adaptation, stage 2 twice as long": Row(adapt=None, finetune="--epochs 6"),
    "half of the blocks see each image alone": Row("--intra_num_hidden_layers 1 --linear_patch 3d"),
    "2d patches": Row("--intra_num_hidden_layers 0 --linear_patch 2d"),
    "2d patches, half of the blocks alone": Row("--intra_num_hidden_layers 1 --linear_patch 2d"),
    "2d patches, all blocks alone": Row("--intra_num_hidden_layers 2 --linear_patch 2d"),
    "vision frozen in stage 2": Row(finetune="--epochs 3 --freeze_vision"),
    "AdamW in stage 1": Row(adapt="--optimizer adamw"),
    "AdamW in stage 2": Row(finetune="--epochs 3 --optimizer adamw"),
    "stage 1 twice as long": Row(adapt="--epochs 2"),
    "distractor as negative (a step of stage 1 takes twice as long)": Row(adapt="--distractor_negatives"),
    "drop-path .1 in stage 2": Row(finetune="--epochs 3 --drop_path .1"),
    "label smoothing .1": Row(finetune="--epochs 3 --label_smoothing .1"),
    "averaged weights, decay .99": Row(finetune="--epochs 3 --ema .99"),
    "base, then an epoch of cross-entropy": Row(more=MORE),
    "base, then an epoch of --scst": Row(more=MORE + " --scst"),
}
SCORES = {"text_to_pair_R10": "R@10", "CIDEr": "CIDEr", "no change recognised": "no change", "change recognised": "change",
          "type": "type", "color and shape": "colour and shape"}


def run_row(row: Row, seed: int, data: Path, runs: Path) -> None:
    """All stages of a row, each left out where its result is there."""
    common = [*COMMON.split(), *row.architecture.split(), "--seed", str(seed), "--data_path", str(data), "--image_cache",
              str(runs / "cache")]
    before: Path | None = None
    for folder, command in _stages(row, runs / str(seed)):
        if not (folder / "metrics.json").is_file():
            truth = ["--gt_dir", str(runs / "gt")] if command.startswith("CLIP4IDC") else []
            start = ["--init_model", str(_last_weights(before))] if before else []
            _call([*command.split(), *common, *truth, *start, "--output_dir", str(folder)], folder)
        before = folder
    if not (before / "changes.json").is_file():
        captions = max(before.glob("hyp_ep_[0-9]*.json"), key=lambda path: int(path.stem.split("_")[-1]))
        _call(["gt/eval_utils.py", "changes", "--changed_object", str(data / "changed_object.json"), "--results", str(captions),
               "--output", str(before / "changes.json")], before)


def _stages(row: Row, runs: Path) -> list[tuple[Path, str]]:
    """Folder and command of each stage; a folder's name tells all that led to it."""
    commands = [] if row.adapt is None else [f"{ADAPT} {row.adapt}"]
    commands += [f"{FINETUNE} {row.finetune}"] + ([f"{FINETUNE} {row.more}"] if row.more else [])
    options = [row.architecture, "no-adaptation" if row.adapt is None else f"adapt {row.adapt}", row.finetune, row.more or ""]
    first = 2 if row.adapt is not None else 3
    words = ["".join(part.replace("--", " ").split()) for part in options]
    return [(runs / "_".join(words[: first + number]), command) for number, command in enumerate(commands)]


def _last_weights(folder: Path) -> Path:
    return max(folder.glob("pytorch_model.bin.[0-9]*"), key=lambda path: int(path.suffix[1:]))


def _call(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "terminal.log", "a", encoding="utf-8") as file:
        done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: see {folder / 'terminal.log'}")


def read_row(row: Row, runs: Path) -> dict[str, float] | None:
    """The scores of a finished run by their short names, shares in per cent; None where it is not finished."""
    folders = [folder for folder, _ in _stages(row, runs)]
    if not (folders[-1] / "changes.json").is_file():
        return None
    values = {name: value for folder in folders for name, value in pd.read_csv(folder / "history.csv").iloc[-1].items()}
    values |= {name: 100 * share["share"] for name, share in json.loads((folders[-1] / "changes.json").read_text()).items()}
    return {short: values[name] for name, short in SCORES.items() if name in values}


def table(runs: Path, seeds: list[int]) -> str:
    """Markdown: mean ± standard deviation over the seeds, and the same of the difference from base's CIDEr of the same seed."""
    lines = ["| row | seeds | " + " | ".join(SCORES.values()) + " | CIDEr − base's |", "|" + "---|" * (len(SCORES) + 3)]
    found = {name: {seed: scores for seed in seeds if (scores := read_row(row, runs / str(seed)))} for name, row in ROWS.items()}
    for name, by_seed in found.items():
        if by_seed:
            cells = [_spread([scores[short] for scores in by_seed.values() if short in scores]) for short in SCORES.values()]
            gains = [scores["CIDEr"] - found["base"][seed]["CIDEr"] for seed, scores in by_seed.items() if seed in found["base"]]
            cells = [name, ", ".join(map(str, by_seed)), *cells, _spread(gains) if name != "base" else ""]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if not values:
        return "–"
    digits = 1 if max(map(abs, values)) > 10 else 3
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "runs/compare/data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/compare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--table", action="store_true", help="print the table of what is there, run nothing")
    args = parser.parse_args()
    if not args.table:
        truth = args.runs / "gt" / "clevr_total_change_captions_reformat.json"
        if not truth.is_file():
            _call(["gt/eval_utils.py", "--datatype", "clevr", "--data_path", str(args.data), "--output", str(truth)], truth.parent)
        for seed in args.seeds:
            for name in args.only:
                run_row(ROWS[name], seed, args.data, args.runs)
                print(f"seed {seed}: {name}", flush=True)
    print(table(args.runs, args.seeds))


if __name__ == "__main__":
    main()
