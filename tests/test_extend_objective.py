"""A custom objective is one class and one line in the registry.

The one below goes through training with gradient accumulation, resuming, the final evaluation and
--help. Another training runs without any files, into an output that keeps everything in memory.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

import CLIP4IDCinference
from dataloaders.batches import build_batches
from dataloaders.datasets import open_dataset
from dataloaders.images import ImageFiles
from modules.clip4idc import CLIP4IDC
from modules.options.groups import TrainingOptions
from modules.registries import OBJECTIVES
from modules.tokenizer import VOCAB_SIZE, tokenize_caption
from modules.training.loop import fit
from modules.training.objectives import Objective, TrainingData
from modules.training.objectives.cross_entropy import CrossEntropy
from modules.training.progress import Progress
from modules.training.states import newest_state
from modules.training.trainer import Trainer
from system.runtime import Runtime
from system.signals import StopSignals
from tests.conftest import tiny_weights
from tests.quick_scores import skip_reports, use_quick_scores
from tests.runs import SAVED_OFTEN, Killed, arguments, die_at, log_of, run_refused, same_weights

MAX_WORDS = 12


class NoDistractor(CrossEntropy):
    """Cross-entropy on the change pairs alone, at a rate that does not fall."""

    recipe = CrossEntropy.recipe._replace(schedule="constant", patience=2)

    def forward(self, batch):
        names = [name for name in batch if name.startswith("caption_")]
        first = {name: batch[name][:, :1] for name in names}
        return super().forward({**batch, **first, "images": batch["images"][:, :2]})


class WithoutRecipe(Objective):
    task = "caption"
    samples = CrossEntropy.samples


@pytest.fixture(autouse=True, scope="module")
def _registered():
    """The one line, undone after this file's tests; no Java, no reports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OBJECTIVES, "targets", dict(OBJECTIVES.targets))
        OBJECTIVES.register("no_distractor", NoDistractor)
        OBJECTIVES.register("without_recipe", WithoutRecipe)
        use_quick_scores(patch.setattr)
        skip_reports(patch.setattr)
        yield


def options_of(data: Path, run: Path, sizes: Path, *more: str) -> list[str]:
    """Two steps of two accumulated batches in each of two epochs, each step saved."""
    steps = ("--gradient_accumulation_steps", "2", *SAVED_OFTEN)
    return arguments(
        data, run, sizes, "caption", "--do_train", "--objective", "no_distractor", *steps, *more
    )


@pytest.fixture(scope="module")
def whole(clevr, tiny_sizes, tmp_path_factory) -> Path:
    """A training that ran to its end; tests copy it."""
    run = tmp_path_factory.mktemp("objective") / "run"
    assert CLIP4IDCinference.main(options_of(clevr, run, tiny_sizes)) == 0
    return run


@pytest.fixture(scope="module")
def pairs(clevr):
    return open_dataset("clevr", clevr).checked_pairs("train")


def load_batches(pairs, objective: type[Objective]):
    """Two pairs a batch, as training reads them."""
    tokenize = partial(tokenize_caption, max_words=MAX_WORDS)
    samples = objective.samples(pairs, ImageFiles(64), tokenize)
    return build_batches(samples, 2, training=True, num_workers=0)


def tiny_model() -> CLIP4IDC:
    return CLIP4IDC.from_weights(tiny_weights(vocab_size=VOCAB_SIZE), "caption", 1)


def test_its_loss_is_that_of_the_first_pair_of_each_sample(pairs):
    model = tiny_model().eval()
    data = TrainingData(pairs, MAX_WORDS)
    batch = next(iter(load_batches(pairs, NoDistractor)))
    with torch.no_grad():
        loss = NoDistractor(model, data)(batch)
        both = CrossEntropy(model, data)(batch)
        second = {name: part[:, 1:] for name, part in batch.items() if name.startswith("caption_")}
        second["images"] = batch["images"][:, [0, 2]]
        distractors_only = CrossEntropy(model, data)(second)
    assert loss + distractors_only == pytest.approx(both.item(), rel=1e-5)
    assert 5 < loss < 30


def test_it_accumulates_gradients_at_its_own_rate_and_is_evaluated(whole):
    log = log_of(whole)
    assert "--objective = no_distractor" in log
    assert "4 steps in 2 epochs" in log
    # The rate of the step after the logged one; the published schedule would end at 0.
    assert log.count("lr 1.000e-03") == 4
    metrics = json.loads((whole / "metrics.json").read_text())
    assert metrics["stage"] == "caption"
    assert 0 < metrics["CIDEr"] < 1
    assert len(json.loads((whole / "hyp_ep_eval.json").read_text())) == 10


def test_a_run_that_broke_off_resumes_to_the_same_weights(
    whole, clevr, tiny_sizes, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    options = options_of(clevr, run, tiny_sizes, "--resume", "auto")
    with monkeypatch.context() as patch:
        die_at(patch, Trainer, "step", call=2)
        with pytest.raises(Killed):
            CLIP4IDCinference.main(options)
    assert newest_state(run).path.name == "training_state.bin.0.1"
    assert CLIP4IDCinference.main(options) == 0
    for epoch in range(2):
        name = f"pytorch_model.bin.{epoch}"
        assert same_weights(whole / name, run / name)
    assert (run / "history.csv").read_text() == (whole / "history.csv").read_text()


def test_another_objective_does_not_continue_it(whole, clevr, tiny_sizes, tmp_path, capsys):
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    more = ("--objective", "cross_entropy", "--resume", "auto")
    line = run_refused("caption", options_of(clevr, run, tiny_sizes, *more), capsys)
    assert "--objective is cross_entropy, was no_distractor" in line


@pytest.mark.parametrize(
    ("task", "name", "said"),
    [
        ("caption", "no_such", "invalid choice: 'no_such'"),
        ("caption", "without_recipe", "objective 'without_recipe' lacks recipe"),
        ("caption", "contrastive", "--objective contrastive is for the retrieval task"),
        ("retrieval", "no_distractor", "--objective no_distractor is for the caption task"),
        ("caption", "self_critical", "--objective self_critical needs the weights of a captioner"),
    ],
)
def test_what_cannot_be_an_objective_is_refused_in_one_line(
    task, name, said, clevr, tiny_sizes, tmp_path, capsys
):
    run = tmp_path / "run"
    options = arguments(clevr, run, tiny_sizes, task, "--do_train", "--objective", name)
    assert said in run_refused(task, options, capsys)
    assert not run.exists()


def test_an_objective_without_a_loss_is_refused():
    class WithoutLoss(CrossEntropy):
        forward = Objective.forward

    OBJECTIVES.register("without_loss", WithoutLoss)
    with pytest.raises(ValueError, match="objective 'without_loss' lacks forward"):
        OBJECTIVES["without_loss"]


def test_a_name_is_registered_once():
    with pytest.raises(ValueError, match="objective 'cross_entropy' is registered already"):
        OBJECTIVES.register("cross_entropy", NoDistractor)


def test_help_lists_it(capsys):
    with pytest.raises(SystemExit):
        CLIP4IDCinference.main(["--help"])
    assert "no_distractor" in capsys.readouterr().out


class InMemory:
    """A run's output that keeps what it is given."""

    def __init__(self) -> None:
        self.events = []
        self.losses = []

    def record_step(self, number, values):
        self.events.append(f"step {number}")
        self.losses.append(values["loss"])

    def save_within_epoch(self, tensors, progress, steps):
        assert tensors.keys() == {"model", "optimizer", "scaler"}
        self.events.append(f"state {progress.epoch}.{steps}")

    def save_trained_epoch(self, tensors, progress):
        self.events.append(f"trained {progress.epoch}")

    def record_epoch(self, result, progress, draw_samples):
        assert draw_samples().size == (1, 1)
        self.events.append(f"judged {result.epoch} at step {result.last_step}")


class OneScore:
    """An evaluator whose scores get worse after the first."""

    def __init__(self) -> None:
        self.labels = []

    def evaluate(self, model, label):
        assert not model.training
        self.labels.append(label)
        return 1 / len(self.labels), {"score": 1 / len(self.labels)}

    def draw_samples(self):
        return Image.new("RGB", (1, 1))


def test_a_training_runs_without_files(pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    options = TrainingOptions(
        epochs=9, lr=3e-3, gradient_accumulation_steps=2, freeze_layer_num=-1, save_every_steps=1
    )
    trainer = Trainer.build(
        model,
        NoDistractor(model, TrainingData(pairs, MAX_WORDS)),
        load_batches(pairs, NoDistractor),
        options,
        seed=1,
        runtime=Runtime(),
        stop=StopSignals(),
    )
    output = InMemory()
    progress = Progress()
    evaluator = OneScore()
    fit(trainer, output, progress, evaluator, log_every=1)
    # Two epochs without a better score are the recipe's patience.
    assert evaluator.labels == ["0", "1", "2"]
    assert output.events == [
        *("step 1", "state 0.1", "step 2", "trained 0", "judged 0 at step 2"),
        *("step 3", "state 1.1", "step 4", "trained 1", "judged 1 at step 4"),
        *("step 5", "state 2.1", "step 6", "trained 2", "judged 2 at step 6"),
    ]
    assert output.losses[-1] < output.losses[0]
    expected = Progress(epoch=3, best_score=1.0, best_epoch=0, epochs_without=2)
    assert progress == expected
    assert list(tmp_path.iterdir()) == []
