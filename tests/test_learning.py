"""A tiny model learns 16 drawn scenes by heart, in both stages, within a bound of steps; with a broken gradient path it does not."""

from functools import partial

import pytest
import torch

from dataloaders.batches import build_loader
from dataloaders.datasets import open_dataset
from dataloaders.images import ImageFiles, load_image, normalize
from dataloaders.samples import RetrievalSamples
from modules.clip4idc import CLIP4IDC
from modules.generation.greedy import greedy_search
from modules.losses import vocabulary_loss
from modules.model import decoder
from modules.model.backbone import Features
from modules.model.clip import CLIP
from modules.model.clip_sizes import ClipSizes
from modules.options import parse_options
from modules.tokenizer import decode, tokenize_caption
from modules.training.loop import train_epoch
from modules.training.objectives import SAMPLES
from modules.training.progress import Progress
from modules.training.trainer import build_trainer
from preprocess import synthesize
from system.runtime import Runtime
from tests.conftest import TINY

WORDS, SCENES = 16, 16
tokenize = partial(tokenize_caption, max_words=WORDS)
DECODER = {
    "hidden_size": 64,
    "num_attention_heads": 2,
    "intermediate_size": 256,
    "num_decoder_layers": 1,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.12,
}
STEPS = {"retrieval": 50, "caption": 250}
RATE, COEF = {"retrieval": "3e-3", "caption": "2e-3"}, {"retrieval": "1", "caption": "0.3"}
RIGHT = {"retrieval": 15, "caption": 10}  # of 16 sentences, at least
LOSS = {"retrieval": 0.2, "caption": 0.2}  # of the last step, at most


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("learning") / "data"
    assert (
        synthesize.main(
            [
                "--output",
                str(folder),
                "--train",
                str(SCENES),
                "--val",
                "0",
                "--test",
                "0",
                "--captions_per_image",
                "1",
                "--jitter",
                "0",
                "--seed",
                "3",
                "--workers",
                "1",
            ]
        )
        == 0
    )
    return open_dataset("clevr", folder).checked_pairs("train")


def train(model: CLIP4IDC, scenes, stage: str) -> float:
    """The mean loss of the last epoch; an epoch is a step, a batch all scenes."""
    words = [
        "--do_train",
        "--output_dir",
        "x",
        "--datatype",
        "clevr",
        "--data_path",
        "x",
        "--batch_size",
        str(SCENES),
        "--epochs",
        str(STEPS[stage]),
        "--lr",
        RATE[stage],
        "--coef_lr",
        COEF[stage],
        "--freeze_layer_num",
        "-1",
        "--max_words",
        str(WORDS),
    ]
    options = parse_options(words, stage, "", num_processes=1)
    kept = {
        path: load_image(path, 64) for scene in scenes for path in scene.image_paths
    }  # decoded once, not at every step
    samples = SAMPLES[stage](
        scenes, lambda paths: torch.stack([kept[path] for path in paths]), tokenize
    )
    loader = build_loader(samples, SCENES, True, 0, 0, 1, 0)
    trainer = build_trainer(model, loader, options, Runtime())
    return [train_epoch(trainer, Progress(epoch)) for epoch in range(STEPS[stage])][-1]


def learn(scenes, stage: str) -> tuple[float, int]:
    """The last loss, and how many scenes' sentences about the change are found or written rightly."""
    torch.manual_seed(0)
    clip = {
        f"clip.{key}": value
        for key, value in CLIP(ClipSizes(**{**TINY, "vision_patch_size": 16}), 0, "3d")
        .state_dict()
        .items()
    }
    model = CLIP4IDC.from_weights(
        clip, stage, 0, "3d", decoder_config=DECODER if stage == "caption" else None
    )
    loss = train(model, scenes, stage)
    model.eval()
    images = normalize(torch.stack([ImageFiles(64)(scene.image_paths) for scene in scenes]))
    with torch.no_grad():
        if stage == "retrieval":
            samples = RetrievalSamples(scenes, ImageFiles(64), tokenize)
            texts = torch.stack([samples[0, n]["text_ids"] for n in range(SCENES)])
            similarity = model.score_pairs(
                model.encode_text(texts), model.encode_pairs(images[:, :2])
            )
            return loss, int((similarity.argmax(dim=1) == torch.arange(SCENES)).sum())
        captions = [
            decode(ids)
            for ids in greedy_search(
                model, model.encode_against_first(images).tokens, WORDS
            ).tolist()
        ]
    return loss, sum(
        caption == scene.captions[0] for caption, scene in zip(captions, scenes, strict=False)
    )


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
def test_sixteen_scenes_are_learned_by_heart(stage, scenes):
    loss, right = learn(scenes, stage)
    assert loss < LOSS[stage]
    assert right >= RIGHT[stage]


@pytest.mark.parametrize("stage", ["retrieval", "caption"])
def test_with_a_broken_gradient_path_they_are_not(stage, scenes, monkeypatch):
    """Stage 1: none reaches the vision tower; stage 2: none comes from the vocabulary's loss into the captioner."""
    if stage == "retrieval":
        encode = CLIP4IDC.encode_pairs

        def cut(model: CLIP4IDC, images: torch.Tensor) -> Features:
            pairs = encode(model, images)
            return Features(pairs.tokens.detach(), pairs.pooled.detach())

        monkeypatch.setattr(CLIP4IDC, "encode_pairs", cut)
    else:
        monkeypatch.setattr(
            decoder,
            "vocabulary_loss",
            lambda hidden, *others: vocabulary_loss(hidden.detach(), *others),
        )
    loss, _ = learn(scenes, stage)
    assert loss > 2 * LOSS[stage]
