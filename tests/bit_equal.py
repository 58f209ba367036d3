"""Do two states of the code compute the same? `python tests/bit_equal.py REPO [--expect FILE]`

Trains, evaluates and predicts in tiny runs of the repository at REPO, through its command line,
and prints one JSON with hashes of the weights, scores, captions and file names. Run it on the old
state and keep what it prints, then run it on the new one on the same machine: with --expect the
exit code is 1 where the two differ, and the names of the runs that differ go to stderr.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

EPOCHS = 2
SIZES = {"train": 8, "val": 3, "test": 5}  # pairs
SCRIPTS = {"retrieval": "main_task_retrieval.py", "caption": "CLIP4IDCinference.py"}
TRAINING = (
    *("--do_train", "--epochs", str(EPOCHS), "--lr", "1e-3", "--max_words", "12"),
    *("--batch_size", "4", "--batch_size_val", "2", "--num_thread_reader", "0"),
    *("--n_display", "1", "--intra_num_hidden_layers", "1"),
)
PREDICTIONS = {
    "greedy": (),
    "beam": ("--beam_size", "3"),
    "sampled": ("--num_captions", "3", "--top_p", "0.9"),
}


class Training(NamedTuple):
    """A training run of one script on one drawn dataset."""

    name: str
    task: str
    data: str  # spot or clevr
    more: tuple[str, ...] = ()
    processes: int = 1
    init_from: str | None = None  # the name of an earlier run, whose first weights it starts from


TRAININGS = (
    Training("spot retrieval", "retrieval", "spot"),
    Training("spot caption", "caption", "spot"),
    Training("clevr retrieval", "retrieval", "clevr", ("--linear_patch", "3d")),
    Training("clevr caption", "caption", "clevr", ("--linear_patch", "3d")),
    Training(
        "clevr caption self-critical",
        "caption",
        "clevr",
        ("--linear_patch", "3d", "--scst"),
        init_from="clevr caption",
    ),
    Training("clevr retrieval, two processes", "retrieval", "clevr", processes=2),
    Training("clevr caption, two processes", "caption", "clevr", processes=2),
    Training(
        "spot caption accumulated, two processes",
        "caption",
        "spot",
        ("--gradient_accumulation_steps", "2", "--save_every_steps", "1"),
        processes=2,
    ),
)


class CheckoutRunner:
    """A repository to try, and a folder for what its runs read and write."""

    def __init__(self, repo: Path, folder: Path) -> None:
        self.repo = repo
        self.folder = folder

    def prepare(self) -> None:
        """Draw both datasets and write the sizes of a tiny CLIP, by the repository's own tests."""
        sys.path.insert(0, str(self.repo))
        from tests.conftest import TINY, make_clevr, make_spot

        (self.folder / "tiny.json").write_text(json.dumps(TINY))
        make_spot(self.folder / "spot", SIZES)
        make_clevr(self.folder / "clevr", SIZES)

    def train(self, training: Training) -> dict[str, Any]:
        """Hashes of all that a training leaves behind."""
        data = self.folder / training.data
        run = self.folder / training.name
        words = [
            *("--datatype", training.data, "--data_path", str(data)),
            *("--features_path", str(data / "images_test")),
            *("--pretrained_clip_name", str(self.folder / "tiny.json")),
            *("--output_dir", str(run), *TRAINING, *training.more),
        ]
        if training.task == "caption":
            words += ["--gt_dir", str(data / "gt"), "--decoder_num_hidden_layers", "1"]
        if training.init_from:
            first = self.folder / training.init_from / "pytorch_model.bin.0"
            words += ["--init_model", str(first)]
        self._run_script(SCRIPTS[training.task], *words, processes=training.processes)
        return _describe_run(run)

    def predict(self, words: tuple[str, ...]) -> list[str]:
        """The captions of an example pair by the small model that comes with the code."""
        examples = self.repo / "docs" / "examples"
        pair = [str(examples / f"removed_{side}.png") for side in ("before", "after")]
        words = ("--do_predict", "--before", pair[0], "--after", pair[1], *words)
        return self._run_script(SCRIPTS["caption"], *words).splitlines()

    def _run_script(self, script: str, *words: str, processes: int = 1) -> str:
        """What a script of the repository prints; ends this program where it fails."""
        launcher = []
        if processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            launcher += [f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, str(self.repo / script), *words]
        environment = {**os.environ, "XDG_CACHE_HOME": str(self.folder / "cache")}
        if processes > 1:
            environment["OMP_NUM_THREADS"] = "1"
        done = subprocess.run(
            command, cwd=self.repo, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)}\nended with {done.returncode}:\n{done.stderr[-3000:]}")
        return done.stdout


def _describe_run(run: Path) -> dict[str, Any]:
    found = {
        "weights": [_hash_weights(run / f"pytorch_model.bin.{n}") for n in range(EPOCHS)],
        "history": (run / "history.csv").read_text().splitlines(),
        "metrics": json.loads((run / "metrics.json").read_text()),
        "files": sorted(path.name for path in run.iterdir() if not path.name.startswith(".")),
    }
    for captions in sorted(run.glob("hyp_ep_*.json")):
        rows = json.loads(captions.read_text())
        found[captions.name] = {row["image_id"]: row["caption"] for row in rows}
    return found


def _hash_weights(path: Path) -> str:
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(torch.load(path, weights_only=True).items()):
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()[:16]


def collect(repo: Path, folder: Path) -> Iterator[tuple[str, Any]]:
    """(name, result) of each run, as it ends."""
    runner = CheckoutRunner(repo, folder)
    runner.prepare()
    jobs: list[tuple[str, Callable[[], Any]]] = []
    for training in TRAININGS:
        jobs.append((training.name, lambda training=training: runner.train(training)))
    for name, words in PREDICTIONS.items():
        jobs.append((f"predict {name}", lambda words=words: runner.predict(words)))
    for name, job in jobs:
        print(name, file=sys.stderr, flush=True)
        yield name, job()


def main() -> int:
    """The command line; see the top of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("repo", type=Path, help="the repository to run")
    parser.add_argument("--expect", type=Path, help="what this program printed for another state")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(collect(options.repo.resolve(), Path(folder)))
    print(json.dumps(found, indent=1, sort_keys=True))
    if not options.expect:
        return 0
    expected = json.loads(options.expect.read_text())
    names = sorted(expected.keys() | found.keys())
    differing = [name for name in names if expected.get(name) != found.get(name)]
    for name in differing:
        print(f"differs: {name}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
