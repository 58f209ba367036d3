"""The paper's claims, and what may better the recipe, compared at equal compute over seeds on drawn scenes that stand still.

    python scripts/compare.py --seeds 1 2 3                   # everything that is not there yet, then the table
    python scripts/compare.py --seeds 2 --only base 2d        # some rows of one seed; such commands may run side by side
    python scripts/compare.py --table                         # the tables of what is there
    python scripts/compare.py --choice --seeds 1 2 3          # epochs chosen on val and on test: chosen_epoch.csv, beside --results

A row is a small CLIP of random weights, adapted and finetuned, judged on val after its last epoch. Its scores go into --results;
what stands there is not done again, nor are runs in --runs that rows share. Its rows that are not among ROWS tried options
that lost and were removed (docs/experiments.md names the commit that has them). The scenes are to be drawn before, into --data:
python preprocess/synthesize.py --seed 0 --jitter 0 --train 10000 --val 500 --test 1000 --output runs/compare/data
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
COMMON = """--datatype clevr --num_thread_reader 0 --max_words 24 --batch_size_val 100 --select_on val --eval_split val
  --pretrained_clip_name modules/clip-demo.json --precision bf16 --freeze_layer_num -1"""
JOINT = "--intra_num_hidden_layers 0 --linear_patch 3d"
ADAPT = "main_task_retrieval.py --do_train --batch_size 64 --lr 7e-4 --epochs 1"
CAPTION = "CLIP4IDCinference.py --decoder_model decoder-demo"
FINETUNE = f"{CAPTION} --do_train --batch_size 32 --lr 1e-3 --coef_lr 2"
CHOICE = "--epochs 6 --freeze_vision --keep_checkpoints -1"  # the run whose epochs are chosen in two ways


@dataclass(frozen=True)
class Row:
    """Options beyond the base's; adapt=None leaves stage 1 out, `more` continues the captioner with options of its own, `decode`
    captions again with others."""

    architecture: str = JOINT
    adapt: str | None = ""
    finetune: str = "--epochs 3"
    more: str | None = None
    decode: str | None = None


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
    "base, then an epoch of cross-entropy": Row(more="--epochs 1 --lr 1e-4"),
    "base, then five epochs of cross-entropy": Row(
        more="--epochs 5 --lr 1e-4"
    ),  # as long as the next was
    "base, then an epoch of --scst": Row(more="--epochs 1 --lr 1e-4 --scst"),
    "base, 5 beams": Row(decode="--beam_size 5"),
    "base, 5 beams, length penalty .7": Row(decode="--beam_size 5 --length_penalty .7"),
    "base, 5 beams, length penalty 1": Row(decode="--beam_size 5 --length_penalty 1"),
}
SCORES = {
    "text_to_pair_R10": "R@10",
    "CIDEr": "CIDEr",
    "no change recognised": "no change",
    "change recognised": "change",
    "type": "type",
    "color and shape": "colour and shape",
}


def run_row(row: Row, seed: int, data: Path, runs: Path) -> dict[str, float]:
    """All stages of a row, each left out where its result is there; its scores by their short names, shares in per cent."""
    common = [
        *COMMON.split(),
        *row.architecture.split(),
        "--seed",
        str(seed),
        "--data_path",
        str(data),
        "--image_cache",
        str(runs / "cache"),
    ]
    before: Path | None = None
    values: dict[str, float] = {}
    for folder, command in _stages(row, runs / str(seed)):
        if not (folder / "metrics.json").is_file():
            truth = ["--gt_dir", str(runs / "gt")] if command.startswith("CLIP4IDC") else []
            start = ["--init_model", str(_last_weights(before))] if before else []
            _call([*command.split(), *common, *truth, *start, "--output_dir", str(folder)], folder)
        values |= _scores(folder)
        before = folder if (folder / "history.csv").is_file() else before
    captions = max(
        folder.glob("hyp_ep_[0-9]*.json"), key=_number, default=folder / "hyp_ep_eval.json"
    )
    if not (folder / "changes.json").is_file():
        _call(
            [
                "gt/eval_utils.py",
                "changes",
                "--changed_object",
                str(data / "changed_object.json"),
                "--results",
                str(captions),
                "--output",
                str(folder / "changes.json"),
            ],
            folder,
        )
    shares = json.loads((folder / "changes.json").read_text())
    values |= {name: 100 * share["share"] for name, share in shares.items()}
    return {short: values[name] for name, short in SCORES.items() if name in values}


def _stages(row: Row, runs: Path) -> list[tuple[Path, str]]:
    """Folder and command of each stage; a folder's name tells all that led to it."""
    commands = [] if row.adapt is None else [f"{ADAPT} {row.adapt}"]
    commands += [f"{FINETUNE} {row.finetune}"] + ([f"{FINETUNE} {row.more}"] if row.more else [])
    commands += [f"{CAPTION} --do_eval {row.decode}"] if row.decode else []
    options = [
        row.architecture,
        "no-adaptation" if row.adapt is None else f"adapt {row.adapt}",
        row.finetune,
    ]
    first = 2 if row.adapt is not None else 3
    words = [
        "".join(part.replace("--", " ").split())
        for part in [*options, *filter(None, (row.more, row.decode))]
    ]
    return [
        (runs / "_".join(words[: first + number]), command)
        for number, command in enumerate(commands)
    ]


def _last_weights(folder: Path) -> Path:
    return max(folder.glob("pytorch_model.bin.[0-9]*"), key=_number)


def _number(path: Path) -> int:
    """The epoch in a file's name."""
    return int(re.findall(r"\d+", path.name)[-1])


def _call(command: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "terminal.log", "a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}: see {folder / 'terminal.log'}"
        )


def _scores(folder: Path) -> dict[str, float]:
    """The last epoch's scores of a training, those of an evaluation."""
    if (folder / "history.csv").is_file():
        return dict(pd.read_csv(folder / "history.csv").iloc[-1])
    return json.loads((folder / "metrics.json").read_text())


def judge_epochs(seed: int, data: Path, runs: Path) -> list[dict[str, float]]:
    """CIDEr of each epoch of one run on val, and on the test scenes."""
    run_row(Row(finetune=CHOICE), seed, data, runs)
    folder, _ = _stages(Row(finetune=CHOICE), runs / str(seed))[-1]
    judged = []
    for epoch, score in pd.read_csv(folder / "history.csv")[["epoch", "CIDEr"]].itertuples(
        index=False
    ):
        tested = folder / f"test-{epoch:.0f}"
        if not (tested / "metrics.json").is_file():
            _call(
                [
                    *CAPTION.split(),
                    "--do_eval",
                    *COMMON.replace("--eval_split val", "").split(),
                    *JOINT.split(),
                    "--data_path",
                    str(data),
                    "--image_cache",
                    str(runs / "cache"),
                    "--gt_dir",
                    str(runs / "gt"),
                    "--output_dir",
                    str(tested),
                    "--init_model",
                    str(folder / f"pytorch_model.bin.{epoch:.0f}"),
                ],
                tested,
            )
        judged.append(
            {"seed": seed, "epoch": epoch, "val": score, "test": _scores(tested)["CIDEr"]}
        )
    return judged


def choice_table(judged: pd.DataFrame) -> str:
    """Markdown: what the test scenes give to the epoch that val chooses, that they choose themselves, and to the last."""
    lines = [
        "| seed | epoch by val, its test | epoch by test, its test | the last's test | by test − by val |",
        "|" + "---|" * 5,
    ]
    gaps = []
    for seed, epochs in judged.groupby("seed"):
        chosen = [epochs.loc[epochs[split].idxmax()] for split in ("val", "test")]
        gaps.append(chosen[1]["test"] - chosen[0]["test"])
        cells = [
            f"{seed:.0f}",
            *(f"{row['epoch']:.0f}, {row['test']:.3f}" for row in chosen),
            f"{epochs['test'].iloc[-1]:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} | {gaps[-1]:.3f} |")
    return "\n".join([*lines, f"| mean | | | | {_spread(pd.Series(gaps))} |"])


def table(results: pd.DataFrame) -> str:
    """Markdown: mean ± standard deviation over the seeds, and the same of the difference from base's CIDEr of the same seed."""
    lines = [
        "| row | seeds | " + " | ".join(SCORES.values()) + " | CIDEr − base's |",
        "|" + "---|" * (len(SCORES) + 3),
    ]
    base = results[results["row"] == "base"].set_index("seed")["CIDEr"]
    for name in filter(set(results["row"]).__contains__, dict.fromkeys([*ROWS, *results["row"]])):
        found = results[results["row"] == name].sort_values("seed")
        gains = (found.set_index("seed")["CIDEr"] - base).dropna()
        cells = [
            name,
            ", ".join(map(str, found["seed"])),
            *(_spread(found[short].dropna()) for short in SCORES.values()),
            _spread(gains) if name != "base" else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: pd.Series) -> str:
    if values.empty:
        return "–"
    digits = 1 if values.abs().max() > 10 else 3
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def read_results(path: Path) -> pd.DataFrame:
    """A line for each row and seed that has been run."""
    return (
        pd.read_csv(path)
        if path.is_file()
        else pd.DataFrame(columns=["row", "seed", *SCORES.values()])
    )


def main() -> None:
    """Command line; see --help."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=ROOT / "runs/compare/data")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs/compare")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/compare.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument(
        "--choice",
        action="store_true",
        help="judge each epoch of one run on val and on test, in the rows' place",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the tables of what is there, run nothing"
    )
    args = parser.parse_args()
    truth, chosen = (
        args.runs / "gt" / "clevr_total_change_captions_reformat.json",
        args.results.with_name("chosen_epoch.csv"),
    )
    if not args.table and not truth.is_file():
        _call(
            [
                "gt/eval_utils.py",
                "--datatype",
                "clevr",
                "--data_path",
                str(args.data),
                "--output",
                str(truth),
            ],
            truth.parent,
        )
    for seed in args.seeds if args.choice and not args.table else []:
        if not chosen.is_file() or seed not in set(pd.read_csv(chosen)["seed"]):
            judged = pd.DataFrame(judge_epochs(seed, args.data, args.runs))
            judged.to_csv(
                chosen, mode="a", header=not chosen.is_file(), index=False, float_format="%.6g"
            )
    for seed, name in [] if args.table or args.choice else itertools.product(args.seeds, args.only):
        done = read_results(args.results)
        if ((done["row"] == name) & (done["seed"] == seed)).any():
            continue
        scores = {"row": name, "seed": seed, **run_row(ROWS[name], seed, args.data, args.runs)}
        line = pd.DataFrame([scores], columns=list(done.columns))
        line.to_csv(
            args.results,
            mode="a",
            header=not args.results.is_file(),
            index=False,
            float_format="%.6g",
        )
        print(f"seed {seed}: {name}", flush=True)
    print(table(read_results(args.results)))
    if chosen.is_file():
        print(choice_table(pd.read_csv(chosen)))


if __name__ == "__main__":
    main()
