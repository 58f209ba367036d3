"""TODO."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image

from dataloaders.batches import Batches
from dataloaders.coco_files import write_references, write_results
from dataloaders.images import normalize
from dataloaders.pairs import ImagePair
from modules.clip4idc import CLIP4IDC
from modules.evaluation import NUM_SAMPLES, REPORT_FILE, run_facts
from modules.evaluation.judge import CaptionJudge, own_references
from modules.generation.beam import beam_search
from modules.generation.greedy import greedy_search
from modules.options import Options
from modules.predictor import Predictor
from modules.report.caption_page import ReportedPair, write_caption_page
from modules.report.page import Page
from modules.report.pictures import draw_pairs, evenly_spaced
from modules.tokenizer import decode
from modules.training.states import HISTORY_FILE
from system.runtime import Runtime

log = logging.getLogger(__name__)


@torch.no_grad()  # in inference mode autocast would cast every weight anew at every word
def generate_captions(
    model: CLIP4IDC,
    scenes: Sequence[ImagePair],
    loader: Batches,
    options: Options,
    runtime: Runtime,
) -> dict[str, str]:
    """Caption id → sentence: all change pairs in file order, then all distractors. Every process takes its share of the scenes."""
    own = runtime.own_share(scenes)
    captions: list[
        tuple[str, ...]
    ] = []  # per own scene: the change's and, with a distractor, the distractor's
    max_words, decoding = options.data.max_words, options.decoding
    with runtime.autocast():
        for batch in runtime.progress(loader, "captions"):
            pairs = model.encode_against_first(normalize(batch["images"].to(runtime.device)))
            ids = (
                greedy_search(model, pairs.tokens, max_words)
                if decoding.beam_size == 1
                else beam_search(
                    model, pairs.tokens, max_words, decoding.beam_size, decoding.length_penalty
                )
            )
            sentences = [decode(row) for row in ids.tolist()]
            count = len(batch["images"])
            captions += zip(
                *(sentences[start : start + count] for start in range(0, len(sentences), count)),
                strict=True,
            )
    ordered = runtime.merge_shares(
        [((s.id, s.distractor_id), c) for s, c in zip(own, captions, strict=True)]
    )
    kinds = 2 if scenes[0].distractor else 1
    return {names[kind]: texts[kind] for kind in range(kinds) for names, texts in ordered}


@dataclass
class CaptionEvaluator:
    """Stage 2: captions to hyp_ep_<label>.json, scored on the main process; CIDEr chooses."""

    pairs: Sequence[ImagePair]
    loader: Batches
    judge: CaptionJudge
    options: Options
    runtime: Runtime
    captions: dict[str, str] = field(default_factory=dict)  # the latest, and their scores
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        self.captions = generate_captions(
            model, self.pairs, self.loader, self.options, self.runtime
        )
        if self.runtime.is_main:
            log.info("captions in %s", write_results(folder, label, self.captions))
        self.scores = self.runtime.on_main(lambda: self.judge.score(self.captions))
        return self.scores["all"]["CIDEr"], self.scores["all"]

    def samples(self) -> Image.Image:
        names, images = list(self.captions), self._images()
        chosen = (names[n] for n in evenly_spaced(len(names), NUM_SAMPLES))
        return draw_pairs(
            [
                (*images[name], [self.captions[name], f"wanted: {self.judge.references[name][0]}"])
                for name in chosen
            ]
        )

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        if own_references(self.options, split):
            write_references(folder, self.judge.references, self.judge.subsets)
        single, images = self.judge.cider_by_id(self.captions), self._images()
        shown = {
            key: ReportedPair(key, *images[key], text, self.judge.references[key], single[key])
            for key, text in self.captions.items()
        }
        groups = {
            name: [shown[key] for key in ids]
            for name, ids in (self.judge.subsets or {"all": list(shown)}).items()
            if ids
        }
        counts = f"{len(self.pairs)} scenes of the {split} split, {len(self.captions)} captions. Best and worst go by CIDEr."
        page = Page(
            f"Captions: {self.options.data.data_path}",
            counts,
            self.scores,
            self.judge.baselines,
            folder / HISTORY_FILE,
            **run_facts(checkpoint, self.options),
        )
        predictor = Predictor(model, self.options.data.max_words, self.runtime)
        write_caption_page(folder / REPORT_FILE, page, groups, predictor, self.options.decoding)
        log.info("report in %s", folder / REPORT_FILE)

    def _images(self) -> Mapping[str, tuple[str, str]]:
        """The two images of each caption id."""
        images = {scene.id: (scene.before, scene.after) for scene in self.pairs}
        return images | {
            scene.distractor_id: (scene.before, scene.distractor)
            for scene in self.pairs
            if scene.distractor
        }
