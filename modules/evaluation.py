"""Evaluation of either stage, epoch after epoch: scores, sample pictures, and at the end the report."""

import logging
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from dataloaders.pairs import Batches, Scene
from modules.captioning import (
    CaptionJudge,
    generate_captions,
    own_references,
    write_hypotheses,
    write_references,
)
from modules.checkpoint import HISTORY
from modules.clip4idc import CLIP4IDC
from modules.options import Options
from modules.predictor import Decoding, Predictor
from modules.report import Page, Shown, write_caption_report, write_retrieval_report
from modules.retrieval import chance, compare_split, retrieval_metrics
from modules.runtime import Runtime
from modules.tables import format_table
from modules.visualization import draw_pairs, spread

log = logging.getLogger(__name__)

SAMPLES = 6  # pairs on the picture of an epoch
REPORT = "report.html"


class Evaluator(Protocol):
    """Evaluates one split, epoch after epoch. What it tells of the latest evaluation is the main process' alone."""

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        """The score that chooses epochs, and all scores; `label` names the epoch in files."""

    def samples(self) -> Image.Image:
        """Some pairs of the latest evaluation, the same in every epoch, with what the model made of them."""

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        """Write report.html of the latest evaluation."""


@dataclass
class RetrievalEvaluator:
    """Stage 1: R@k both ways; text→pair R@1 chooses."""

    scenes: Sequence[Scene]
    loader: Batches
    options: Options
    runtime: Runtime
    similarity: Tensor | None = None  # the latest: (N_text, N_pair)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.scenes) < self.runtime.world_size:
            raise ValueError(
                f"{len(self.scenes)} pairs to evaluate on are fewer than {self.runtime.world_size} processes"
            )

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        self.similarity = compare_split(
            model, self.scenes, self.loader, self.options.data.max_words, self.runtime
        )
        self.metrics = retrieval_metrics(
            self.similarity, [len(scene.captions) for scene in self.scenes]
        )
        log.info(
            "retrieval among %d pairs\n%s",
            len(self.scenes),
            format_table(list(self._rows().items()), digits=1),
        )
        scores = {
            f"{way}_{name}": value
            for way, row in self.metrics.items()
            for name, value in row.items()
        }
        return self.metrics["text_to_pair"]["R1"], scores

    def samples(self) -> Image.Image:
        texts = [caption for scene in self.scenes for caption in scene.captions]
        chosen = spread(len(texts), SAMPLES)
        nearest = [self.scenes[n] for n in self.similarity[chosen].argmax(dim=1).tolist()]
        return draw_pairs(
            [
                (scene.before, scene.after, [f"nearest: {scene.id}", texts[n]])
                for n, scene in zip(chosen, nearest, strict=True)
            ]
        )

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        counts = (
            f"{len(self.similarity)} sentences and {len(self.scenes)} pairs of the {split} split. R1, R5, R10: per cent of "
            "the queries whose own is among the first 1, 5, 10 found."
        )
        page = Page(
            f"Retrieval: {self.options.data.data_path}",
            counts,
            self._rows(),
            [("chance", chance(len(self.scenes)))],
            folder / HISTORY,
            **_origin(checkpoint, self.options),
        )
        write_retrieval_report(folder / REPORT, page, self.scenes, self.similarity)
        log.info("report in %s", folder / REPORT)

    def _rows(self) -> dict[str, dict[str, float]]:
        return {
            "text → pair": self.metrics["text_to_pair"],
            "pair → text": self.metrics["pair_to_text"],
        }


@dataclass
class CaptionEvaluator:
    """Stage 2: captions to hyp_ep_<label>.json, scored on the main process; CIDEr chooses."""

    scenes: Sequence[Scene]
    loader: Batches
    judge: CaptionJudge
    options: Options
    runtime: Runtime
    captions: dict[str, str] = field(default_factory=dict)  # the latest, and their scores
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        self.captions = generate_captions(
            model, self.scenes, self.loader, self.options, self.runtime
        )
        if self.runtime.is_main:
            log.info("captions in %s", write_hypotheses(folder, label, self.captions))
        self.scores = self.runtime.from_main(lambda: self.judge.score(self.captions))
        return self.scores["all"]["CIDEr"], self.scores["all"]

    def samples(self) -> Image.Image:
        names, images = list(self.captions), self._images()
        chosen = (names[n] for n in spread(len(names), SAMPLES))
        return draw_pairs(
            [
                (*images[name], [self.captions[name], f"wanted: {self.judge.truth[name][0]}"])
                for name in chosen
            ]
        )

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        if own_references(self.options, split):
            write_references(folder, self.judge)
        single, images = self.judge.cider_by_id(self.captions), self._images()
        shown = {
            key: Shown(key, *images[key], text, self.judge.truth[key], single[key])
            for key, text in self.captions.items()
        }
        groups = {
            name: [shown[key] for key in ids]
            for name, ids in (self.judge.subsets or {"all": list(shown)}).items()
            if ids
        }
        counts = f"{len(self.scenes)} scenes of the {split} split, {len(self.captions)} captions. Best and worst go by CIDEr."
        page = Page(
            f"Captions: {self.options.data.data_path}",
            counts,
            self.scores,
            self.judge.baselines,
            folder / HISTORY,
            **_origin(checkpoint, self.options),
        )
        predictor = Predictor(model, self.options.data.max_words, self.runtime)
        how = Decoding(self.options.caption.beam_size, self.options.caption.length_penalty)
        write_caption_report(folder / REPORT, page, groups, predictor, how)
        log.info("report in %s", folder / REPORT)

    def _images(self) -> Mapping[str, tuple[str, str]]:
        """The two images of each caption id."""
        images = {scene.id: (scene.before, scene.after) for scene in self.scenes}
        return images | {
            scene.distractor_id: (scene.before, scene.distractor)
            for scene in self.scenes
            if scene.distractor
        }


def _origin(checkpoint: str, options: Options) -> dict[str, Mapping[str, Any]]:
    """What made the evaluated weights and scores: `facts`, and options left at their `defaults`."""
    versions = {
        "checkpoint": checkpoint,
        "torch": torch.__version__,
        "Python": platform.python_version(),
    }
    given, defaults = (
        {f"--{name}": value for name, value in options.items(changed)} for changed in (True, False)
    )
    return {"facts": {**versions, **given}, "defaults": defaults}
