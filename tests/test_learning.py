"""A tiny model memorizes 16 drawn pairs in a bounded number of steps, in both tasks.

With a broken path of gradients it does not, so that the bound proves something.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from dataloaders.batches import build_batches
from dataloaders.datasets import open_dataset
from dataloaders.images import load_image
from modules.clip4idc import CLIP4IDC
from modules.generation import greedy_search
from modules.losses import vocabulary_loss
from modules.model import decoder
from modules.model.backbone import Features
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.options.groups import TrainingOptions
from modules.registries import OBJECTIVES
from modules.tokenizer import decode, tokenize_caption
from modules.training.loop import train_epoch
from modules.training.objectives import TrainingData
from modules.training.output import NoOutput
from modules.training.pace import Pace
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from preprocess import synthesize
from system.runtime import Runtime
from system.signals import StopSignals
from tests.conftest import TINY

MAX_WORDS = 16
NUM_PAIRS = 16
DECODER = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "num_decoder_layers": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.12,
}
OBJECTIVE = {"retrieval": "contrastive", "caption": "cross_entropy"}
OPTIONS = {  # an epoch is a step, since a batch has all pairs
    "retrieval": TrainingOptions(epochs=50, lr=3e-3, coef_lr=1.0, freeze_layer_num=-1),
    "caption": TrainingOptions(epochs=250, lr=2e-3, coef_lr=0.3, freeze_layer_num=-1),
}
LEAST_RIGHT = {"retrieval": 15, "caption": 10}  # of 16 sentences
LARGEST_LOSS = {"retrieval": 0.2, "caption": 0.2}  # of the last step


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning") / "data"
    words = [
        *("--output", str(folder), "--train", str(NUM_PAIRS), "--val", "0", "--test", "0"),
        *("--captions_per_image", "1", "--jitter", "0", "--seed", "3", "--workers", "1"),
    ]
    assert synthesize.main(words) == 0
    return open_dataset("clevr", folder).checked_pairs("train")


@pytest.fixture(scope="module")
def images(pairs) -> dict[str, Tensor]:
    """By path, decoded once and not at every step."""
    return {path: load_image(path, 64) for pair in pairs for path in pair.image_paths}


def learn(pairs, images, task: str) -> tuple[float, int]:
    """The last loss, and how many sentences about the changes are found or written correctly."""
    model = tiny_model(task)
    loss = train(model, pairs, images, task)
    model.eval()
    inputs = torch.stack(
        [torch.stack([images[path] for path in pair.image_paths]) for pair in pairs]
    )
    count = count_found if task == "retrieval" else count_written
    with torch.no_grad():
        return loss, count(model, pairs, model.normalize_images(inputs))


def tiny_model(task: str) -> CLIP4IDC:
    torch.manual_seed(0)
    clip = CLIP(ClipSizes(**{**TINY, "vision_patch_size": 16}), 0, "3d")
    weights = {f"clip.{key}": value for key, value in clip.state_dict().items()}
    decoder_config = DECODER if task == "caption" else None
    return CLIP4IDC.from_weights(weights, task, 0, "3d", decoder_config=decoder_config)


def train(model: CLIP4IDC, pairs, images, task: str) -> float:
    """The loss of the last step."""
    objective_class = OBJECTIVES[OBJECTIVE[task]]
    samples = objective_class.samples(
        pairs,
        lambda paths: torch.stack([images[path] for path in paths]),
        partial(tokenize_caption, max_words=MAX_WORDS),
    )
    trainer = Trainer.build(
        model,
        objective_class(model, TrainingData(pairs, MAX_WORDS)),
        build_batches(samples, NUM_PAIRS, training=True, num_workers=0),
        OPTIONS[task],
        seed=42,
        runtime=Runtime(),
        stop=StopSignals(),
    )
    for epoch in range(OPTIONS[task].epochs):
        loss = train_epoch(trainer, NoOutput(), Progress(epoch), Pace(), log_every=100)
    return loss


def count_found(model: CLIP4IDC, pairs, inputs: Tensor) -> int:
    """How many sentences are nearest to their own pair."""
    arrays = [tokenize_caption(pair.captions[0], MAX_WORDS) for pair in pairs]
    texts = torch.stack([torch.from_numpy(one["retrieval_text_ids"]) for one in arrays])
    text = model.encode_text(texts)
    similarity = model.score_pairs(text, model.encode_pairs(inputs[:, :2]))
    return int((similarity.argmax(dim=1) == torch.arange(len(pairs))).sum())


def count_written(model: CLIP4IDC, pairs, inputs: Tensor) -> int:
    """How many captions of the changes are the sentence that was learned."""
    tokens = model.encode_against_first(inputs).tokens[: len(pairs)]
    captions = map(decode, greedy_search(model, tokens, MAX_WORDS).tolist())
    return sum(text == pair.captions[0] for text, pair in zip(captions, pairs, strict=True))


@pytest.mark.parametrize("task", ["retrieval", "caption"])
def test_sixteen_pairs_are_learned_by_heart(task, pairs, images):
    loss, right = learn(pairs, images, task)
    assert loss < LARGEST_LOSS[task]
    assert right >= LEAST_RIGHT[task]


def test_retrieval_is_not_learned_without_gradients_in_the_vision_tower(pairs, images, monkeypatch):
    encode = CLIP4IDC.encode_pairs

    def detached(model: CLIP4IDC, inputs: Tensor) -> Features:
        found = encode(model, inputs)
        return Features(found.tokens.detach(), found.pooled.detach())

    monkeypatch.setattr(CLIP4IDC, "encode_pairs", detached)
    loss, _ = learn(pairs, images, "retrieval")
    assert loss > 2 * LARGEST_LOSS["retrieval"]


@pytest.mark.slow
def test_captions_are_not_learned_without_gradients_in_the_captioner(pairs, images, monkeypatch):
    def detached(hidden: Tensor, *others: Tensor) -> Tensor:
        return vocabulary_loss(hidden.detach(), *others)

    monkeypatch.setattr(decoder, "vocabulary_loss", detached)
    loss, _ = learn(pairs, images, "caption")
    assert loss > 2 * LARGEST_LOSS["caption"]
