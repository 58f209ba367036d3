"""The part of benchmarks/gpu.py that trains a small model on drawn scenes, and scores it."""

import time
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from benchmarks.gpu_parts.setting import STAGES, Row, Setting, attempt, draw_scenes
from benchmarks.steps import OBJECTIVE_OF, SEED
from dataloaders.batches import build_batches
from dataloaders.datasets import open_dataset
from dataloaders.pairs import ImagePair
from dataloaders.samples import EvaluationPairs, ImageReader
from dataloaders.storage.image_cache import open_image_cache
from modules.clip4idc import CLIP4IDC
from modules.evaluation.captions import generate_captions
from modules.metrics.cider_d import CiderD, reward_tokens
from modules.model.bert import load_decoder_config
from modules.options.decoding import Decoding
from modules.options.groups import TrainingOptions
from modules.registries import OBJECTIVES
from modules.tokenizer import tokenize_caption
from modules.training.loop import train_epoch
from modules.training.objectives import TrainingData
from modules.training.output import NoOutput
from modules.training.pace import Pace
from modules.training.progress import Progress
from modules.training.trainer import Trainer
from modules.weights.sources import random_clip, read_sizes
from system.places import ROOT
from system.runtime import Runtime
from system.signals import StopSignals

MAX_WORDS = 24
BATCHES = {"adaptation": 64, "finetuning": 32}
LEARNING_RATES = {"adaptation": 7e-4, "finetuning": 1e-3}
TEST_BATCH = 100


def train_demo(setting: Setting) -> Iterator[Row]:
    """Both stages on drawn scenes, in bf16 where there is a GPU, and CIDEr-D of test captions."""
    scale = setting.scale
    begin = time.perf_counter()
    folder = draw_scenes(setting, "scenes", scale.demo_scenes, scale.demo_test_scenes)
    dataset = open_dataset("clevr", folder)
    splits = {split: dataset.checked_pairs(split) for split in ("train", "test")}
    drawn = time.perf_counter() - begin
    yield attempt("demo training", partial(_train_and_score, setting, splits), drawing=round(drawn))


def _train_and_score(setting: Setting, splits: dict[str, Sequence[ImagePair]]) -> Row:
    torch.manual_seed(SEED)
    runtime = setting.runtime("auto")
    sizes = read_sizes(ROOT / "modules" / "clip-demo.json")
    paths = [path for pairs in splits.values() for pair in pairs for path in pair.image_paths]
    images = open_image_cache(
        setting.folder / "cache", paths, sizes.image_resolution, runtime.progress_bar
    )
    begin = time.perf_counter()
    weights = random_clip(sizes)
    for stage, epochs in zip(STAGES, setting.scale.demo_epochs, strict=True):
        model = _build_model(weights, STAGES[stage])
        loss = _train(stage, model, splits["train"], images, epochs, runtime)
        weights = {name: value.cpu() for name, value in model.state_dict().items()}
    seconds = time.perf_counter() - begin
    score = _score(model.eval(), splits["test"], images, runtime)
    return {"seconds": round(seconds, 1), "last_loss": round(loss, 3), "cider_d": round(score, 1)}


def _build_model(weights: dict[str, torch.Tensor], task: str) -> CLIP4IDC:
    decoder = load_decoder_config("decoder-demo") if task == "caption" else None
    return CLIP4IDC.from_weights(weights, task, 0, "3d", decoder_config=decoder)


def _train(
    stage: str,
    model: CLIP4IDC,
    pairs: Sequence[ImagePair],
    images: ImageReader,
    epochs: int,
    runtime: Runtime,
) -> float:
    """Train a model; returns the last epoch's mean loss."""
    objective = OBJECTIVES[OBJECTIVE_OF[STAGES[stage]]]
    tokenize = partial(tokenize_caption, max_words=MAX_WORDS)
    samples = objective.samples(pairs, images, tokenize, SEED)
    size = min(BATCHES[stage], len(pairs))
    loader = build_batches(samples, size, training=True, num_workers=0, seed=SEED)
    is_finetuning = stage == "finetuning"
    options = TrainingOptions(
        epochs=epochs,
        lr=LEARNING_RATES[stage],
        coef_lr=2.0 if is_finetuning else 1.0,
        freeze_layer_num=-1,
        freeze_vision=is_finetuning,
    )
    trainer = Trainer.build(
        model,
        objective(model, TrainingData(pairs, MAX_WORDS)),
        loader,
        options,
        SEED,
        runtime,
        StopSignals(),
        train_token_embedding=is_finetuning,
    )
    for epoch in range(epochs):
        loss = train_epoch(trainer, NoOutput(), Progress(epoch), Pace(), log_every=10**6)
    return loss


def _score(
    model: CLIP4IDC, pairs: Sequence[ImagePair], images: ImageReader, runtime: Runtime
) -> float:
    """CIDEr-D times 100, as tables show it, of greedy captions of changes and distractors."""
    samples = EvaluationPairs(pairs, images, distractors=True)
    loader = build_batches(samples, TEST_BATCH, training=False, num_workers=0)
    captions = generate_captions(model, pairs, loader, MAX_WORDS, Decoding(), runtime)
    references: dict[str, list[str]] = {}
    for pair in pairs:
        for key, texts in pair.captions_by_id.items():
            references[key] = [reward_tokens(text) for text in texts]
    scorer = CiderD(references)
    scores = [scorer.score(key, reward_tokens(text)) for key, text in captions.items()]
    return 100 * sum(scores) / len(scores)
