"""Compare recipes at equal compute, over seeds, on drawn scenes in which nothing moves by itself.

    python scripts/compare.py --seeds 1 2 3             # all rows that are missing, and the table
    python scripts/compare.py --seeds 2 --only base     # some rows of one seed
    python scripts/compare.py --table                   # the tables of the results so far
    python scripts/compare.py --choice --seeds 1 2 3    # epochs chosen on val and on test

For a row of the table, a small CLIP with random weights is adapted and finetuned, and scored on val
after its last epoch. Scores go into --results, those of --choice into chosen_epoch.csv next to it.
Finished rows, and finished runs in --runs that several rows share, are not repeated, so several
commands can run at the same time. Rows of --results that are not in ROWS tried options that lost
and were removed: docs/experiments.md names the commit that has them. Draw the scenes first, into
--data:

    python preprocess/synthesize.py --seed 0 --jitter 0 --train 10000 --val 500 --test 1000 \\
        --output runs/compare/data
"""

import argparse
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from system.requirements import report_missing

    report_missing()

import pandas as pd

ROOT = Path(__file__).resolve().parents[1]
COMMON = """--datatype clevr --num_thread_reader 0 --max_words 24 --batch_size_val 100
  --select_on val --pretrained_clip_name modules/clip-demo.json --precision bf16
  --freeze_layer_num -1"""
ON_VAL = "--eval_split val"
JOINT = "--intra_num_hidden_layers 0 --linear_patch 3d"
ADAPT = "main_task_retrieval.py --do_train --batch_size 64 --lr 7e-4 --epochs 1"
CAPTION = "CLIP4IDCinference.py --decoder_model decoder-demo"
FINETUNE = f"{CAPTION} --do_train --batch_size 32 --lr 1e-3 --coef_lr 2"
# The run whose epochs are chosen in two ways.
CHOOSE_EPOCH = "--epochs 6 --freeze_vision --keep_checkpoints -1"
GROUND_TRUTH = "clevr_total_change_captions_reformat.json"


@dataclass(frozen=True)
class Row:
    """Options that differ from the base."""

    architecture: str = JOINT
    """Options of all stages."""
    adapt: str | None = ""
    """Options of the adaptation; None skips it."""
    finetune: str = "--epochs 3"
    """Options of the finetuning."""
    more: str | None = None
    """Options of a second finetuning, which starts from the weights of the first."""
    decode: str | None = None
    """Options of another evaluation of the last weights."""


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
    # Takes as long as the next row.
    "base, then five epochs of cross-entropy": Row(more="--epochs 5 --lr 1e-4"),
    "base, then an epoch of --scst": Row(more="--epochs 1 --lr 1e-4 --scst"),
    "base, 5 beams": Row(decode="--beam_size 5"),
    "base, 5 beams, length penalty .7": Row(decode="--beam_size 5 --length_penalty .7"),
    "base, 5 beams, length penalty 1": Row(decode="--beam_size 5 --length_penalty 1"),
}
# Score → its column in --results.
COLUMNS = {
    "text_to_pair_R10": "R@10",
    "CIDEr": "CIDEr",
    "no change recognised": "no change",
    "change recognised": "change",
    "type": "type",
    "color and shape": "color and shape",
}


@dataclass(frozen=True)
class Stage:
    """A command of a row, and the folder that it writes, which is named after all stages so far."""

    folder: Path
    command: str


def stages_of(row: Row, runs: Path) -> list[Stage]:
    """A row's commands in order; rows with the same first stages share their folders."""
    steps: list[tuple[str, str | None]] = [(row.architecture, None)]
    if row.adapt is None:
        steps.append(("no-adaptation", None))
    else:
        steps.append((f"adapt {row.adapt}", f"{ADAPT} {row.adapt}"))
    steps.append((row.finetune, f"{FINETUNE} {row.finetune}"))
    if row.more:
        steps.append((row.more, f"{FINETUNE} {row.more}"))
    if row.decode:
        steps.append((row.decode, f"{CAPTION} --do_eval {row.decode}"))
    names: list[str] = []
    stages: list[Stage] = []
    for options, command in steps:
        names.append("".join(options.replace("--", " ").split()))
        if command:
            stages.append(Stage(runs / "_".join(names), command))
    return stages


@dataclass(frozen=True)
class Comparison:
    """The folder of the scenes, and the folder of the runs."""

    data: Path
    runs: Path

    @property
    def ground_truth(self) -> Path:
        """The folder of the references."""
        return self.runs / "gt"

    def make_ground_truth(self) -> None:
        """Write the references if they are not there yet."""
        path = self.ground_truth / GROUND_TRUTH
        if not path.is_file():
            options = ["--datatype", "clevr", "--data_path", str(self.data), "--output", str(path)]
            run_script(["gt/eval_utils.py", *options], path.parent)

    def run_row(self, row: Row, seed: int) -> dict[str, float]:
        """Run the stages without results. Returns column → score, accuracies in percent."""
        values: dict[str, float] = {}
        weights: Path | None = None
        folder = self.runs
        for stage in stages_of(row, self.runs / str(seed)):
            folder = stage.folder
            if not (folder / "metrics.json").is_file():
                options = [*ON_VAL.split(), *row.architecture.split(), "--seed", str(seed)]
                self._run(stage, options, weights)
            values |= read_scores(folder)
            if (folder / "history.csv").is_file():
                weights = last_weights(folder)
        values |= self._accuracies(folder)
        return {column: values[name] for name, column in COLUMNS.items() if name in values}

    def _run(self, stage: Stage, options: list[str], weights: Path | None) -> None:
        """Run a stage, starting from the weights of the stage before it."""
        words = [*stage.command.split(), *COMMON.split(), *options]
        words += ["--data_path", str(self.data), "--image_cache", str(self.runs / "cache")]
        if stage.command.startswith(CAPTION.split()[0]):
            words += ["--gt_dir", str(self.ground_truth)]
        if weights:
            words += ["--init_model", str(weights)]
        run_script([*words, "--output_dir", str(stage.folder)], stage.folder)

    def _accuracies(self, folder: Path) -> dict[str, float]:
        """Question → correct answers in a run's last captions, in percent."""
        path = folder / "changes.json"
        if not path.is_file():
            by_epoch = folder.glob("hyp_ep_[0-9]*.json")
            captions = max(by_epoch, key=number_in, default=folder / "hyp_ep_eval.json")
            truth = ["--changed_object", str(self.data / "changed_object.json")]
            files = ["--results", str(captions), "--output", str(path)]
            run_script(["gt/eval_utils.py", "changes", *truth, *files], folder)
        shares = json.loads(path.read_text())
        return {name: 100 * row["share"] for name, row in shares.items()}

    def judge_epochs(self, seed: int) -> list[dict[str, float]]:
        """CIDEr of each epoch of one run, on the val scenes and on the test scenes."""
        row = Row(finetune=CHOOSE_EPOCH)
        self.run_row(row, seed)
        folder = stages_of(row, self.runs / str(seed))[-1].folder
        history = pd.read_csv(folder / "history.csv")
        judged = []
        for epoch, score in history[["epoch", "CIDEr"]].itertuples(index=False):
            tested = Stage(folder / f"test-{epoch:.0f}", f"{CAPTION} --do_eval")
            if not (tested.folder / "metrics.json").is_file():
                weights = folder / f"pytorch_model.bin.{epoch:.0f}"
                self._run(tested, JOINT.split(), weights)
            test = read_scores(tested.folder)["CIDEr"]
            judged.append({"seed": seed, "epoch": epoch, "val": score, "test": test})
        return judged


def run_script(command: list[str], folder: Path) -> None:
    """Run one of our scripts; its output goes into terminal.log. Raises SystemExit if it fails."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "terminal.log"
    with open(log, "a", encoding="utf-8") as file:
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}: see {log}")


def read_scores(folder: Path) -> dict[str, float]:
    """The scores of a training's last epoch, or those of an evaluation."""
    history = folder / "history.csv"
    if history.is_file():
        return dict(pd.read_csv(history).iloc[-1])
    return json.loads((folder / "metrics.json").read_text())


def last_weights(folder: Path) -> Path:
    """A training's weights after its last epoch."""
    return max(folder.glob("pytorch_model.bin.[0-9]*"), key=number_in)


def number_in(path: Path) -> int:
    """The epoch in a file's name."""
    return int(re.findall(r"\d+", path.name)[-1])


def format_epoch_choice(judged: pd.DataFrame) -> str:
    """A Markdown table: test scores of the epochs that val and test choose, and of the last."""
    lines = [
        "| seed | epoch by val, its test | epoch by test, its test | the last's test "
        "| by test − by val |",
        "|" + "---|" * 5,
    ]
    gaps = []
    for seed, epochs in judged.groupby("seed"):
        by_val = epochs.loc[epochs["val"].idxmax()]
        by_test = epochs.loc[epochs["test"].idxmax()]
        gap = by_test["test"] - by_val["test"]
        gaps.append(gap)
        cells = [f"{row['epoch']:.0f}, {row['test']:.3f}" for row in (by_val, by_test)]
        last = epochs["test"].iloc[-1]
        lines.append(f"| {seed:.0f} | {' | '.join(cells)} | {last:.3f} | {gap:.3f} |")
    return "\n".join([*lines, f"| mean | | | | {format_mean_and_deviation(pd.Series(gaps))} |"])


def format_results(results: pd.DataFrame) -> str:
    """A Markdown table: mean ± standard deviation over the seeds.

    The last column is the difference to base's CIDEr with the same seed.
    """
    headings = ["row", "seeds", *COLUMNS.values(), "CIDEr − base's"]
    lines = [f"| {' | '.join(headings)} |", "|" + "---|" * len(headings)]
    base = results[results["row"] == "base"].set_index("seed")["CIDEr"]
    known = [name for name in ROWS if name in set(results["row"])]
    for name in dict.fromkeys([*known, *results["row"]]):
        found = results[results["row"] == name].sort_values("seed")
        gains = (found.set_index("seed")["CIDEr"] - base).dropna()
        cells = [name, ", ".join(map(str, found["seed"]))]
        cells += [format_mean_and_deviation(found[column].dropna()) for column in COLUMNS.values()]
        cells.append("" if name == "base" else format_mean_and_deviation(gains))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_mean_and_deviation(values: pd.Series, digits: int | None = None) -> str:
    """Mean ± standard deviation; – if there is no value. None: as many digits as usual."""
    if values.empty:
        return "–"
    if digits is None:
        digits = 1 if values.abs().max() > 10 else 3
    deviation = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
    return f"{values.mean():.{digits}f}{deviation}"


def read_results(path: Path) -> pd.DataFrame:
    """The table of results so far: a line for each row and seed."""
    if path.is_file():
        return pd.read_csv(path)
    return pd.DataFrame(columns=["row", "seed", *COLUMNS.values()])


def append_lines(path: Path, lines: pd.DataFrame) -> None:
    """Add lines to a CSV file; a new file gets a header."""
    header = not path.is_file()
    lines.to_csv(path, mode="a", header=header, index=False, float_format="%.6g")


def run_rows(comparison: Comparison, seeds: list[int], names: list[str], results: Path) -> None:
    """Run the rows that have no line in `results`, seed by seed."""
    for seed in seeds:
        for name in names:
            done = read_results(results)
            if ((done["row"] == name) & (done["seed"] == seed)).any():
                continue
            scores = comparison.run_row(ROWS[name], seed)
            line = {"row": name, "seed": seed, **scores}
            append_lines(results, pd.DataFrame([line], columns=list(done.columns)))
            print(f"seed {seed}: {name}", flush=True)


def choose_epochs(comparison: Comparison, seeds: list[int], chosen: Path) -> None:
    """Judge the epochs of the seeds that have no line in `chosen`."""
    for seed in seeds:
        if not chosen.is_file() or seed not in set(pd.read_csv(chosen)["seed"]):
            append_lines(chosen, pd.DataFrame(comparison.judge_epochs(seed)))


def main(argv: list[str] | None = None) -> None:
    """Command line; see --help."""
    args = _build_parser().parse_args(argv)
    comparison = Comparison(args.data, args.runs)
    chosen = args.results.with_name("chosen_epoch.csv")
    if not args.table:
        comparison.make_ground_truth()
        if args.choice:
            choose_epochs(comparison, args.seeds, chosen)
        else:
            run_rows(comparison, args.seeds, args.only, args.results)
    print(format_results(read_results(args.results)))
    if chosen.is_file():
        print(format_epoch_choice(pd.read_csv(chosen)))


def _build_parser() -> argparse.ArgumentParser:
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
        help="judge each epoch of one run on val and on test, instead of the rows",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the tables of the results so far, run nothing"
    )
    return parser


if __name__ == "__main__":
    main()
