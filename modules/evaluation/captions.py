"""Evaluation of captions: pairs → captions → hyp_ep_<label>.json → scores, and the report."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from dataloaders.batches import Batches
from dataloaders.coco_files import write_references, write_results
from dataloaders.pairs import ALL_PAIRS, ImagePair
from modules.clip4idc import CLIP4IDC
from modules.evaluation import NUM_SAMPLES, RunDescription
from modules.evaluation.split_scorer import SplitScorer
from modules.generation import generate
from modules.model.explanation import Explanation
from modules.options.decoding import Decoding
from modules.predictor import Predictor
from modules.report.caption_page import ReportedPair, choose_shown_pairs, write_caption_page
from modules.report.page import Page
from modules.report.pictures import draw_pairs, space_evenly
from modules.tokenizer import decode
from modules.training.history import read_history
from system.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass
class CaptionEvaluator:
    """Captions every pair, writes the captions, scores them on the main process.

    The scorer's `selection`, which is CIDEr for published datasets, chooses the best epoch.
    """

    pairs: Sequence[ImagePair]
    loader: Batches  # this process's share of the pairs' images, in file order
    scorer: SplitScorer
    max_words: int
    decoding: Decoding
    run: RunDescription
    runtime: Runtime
    keeps_references: bool = False  # whether to write a copy of the references next to the report
    # Of the latest evaluation: by caption id, and by group.
    captions: dict[str, str] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def evaluate(self, model: CLIP4IDC, label: str) -> tuple[float, dict[str, float]]:
        """Return the selection score and all scores. The captions go into hyp_ep_<label>.json."""
        self.captions = generate_captions(
            model, self.pairs, self.loader, self.max_words, self.decoding, self.runtime
        )
        if self.runtime.is_main:
            path = write_results(self.run.folder, label, self.captions)
            log.info("captions in %s", path)
        self.scores = self.runtime.on_main(lambda: self.scorer.score(self.captions))
        scores = self.scores[ALL_PAIRS]
        return scores[self.scorer.selection], scores

    def draw_samples(self) -> Image.Image:
        """Some pairs of the latest evaluation, with the caption and a reference of each."""
        caption_ids = list(self.captions)
        images = self._find_images()
        samples = []
        for index in space_evenly(len(caption_ids), NUM_SAMPLES):
            caption_id = caption_ids[index]
            reference = self.scorer.references[caption_id][0]
            lines = [self.captions[caption_id], f"reference: {reference}"]
            samples.append((*images[caption_id], lines))
        return draw_pairs(samples)

    def write_report(self, model: CLIP4IDC, checkpoint: str) -> None:
        """report.html of the latest evaluation."""
        if self.keeps_references:
            write_references(self.run.folder, self.scorer.references, self.scorer.subsets)
        summary = (
            f"{len(self.pairs)} pairs of the {self.run.split} split, {len(self.captions)} "
            f"captions. Best and worst are ranked by {self.scorer.selection}."
        )
        page = Page(
            title=f"Captions: {self.run.data}",
            summary=summary,
            scores=self.scores,
            baselines=self.scorer.baselines,
            history=read_history(self.run.folder),
            facts=self.run.list_facts(checkpoint),
            defaults=self.run.defaults,
        )
        groups = self._group_reported_pairs()
        explanations = self._explain(model, groups)
        score_name = self.scorer.selection
        write_caption_page(self.run.report_path, page, groups, explanations, score_name)
        log.info("report in %s", self.run.report_path)

    def _group_reported_pairs(self) -> dict[str, list[ReportedPair]]:
        images = self._find_images()
        scores = self.scorer.scores_by_id()
        reported = {}
        for caption_id, caption in self.captions.items():
            before, after = images[caption_id]
            reported[caption_id] = ReportedPair(
                id=caption_id,
                before=before,
                after=after,
                caption=caption,
                references=self.scorer.references[caption_id],
                score=scores[caption_id],
            )
        groups = {}
        for name, ids in (self.scorer.subsets or {ALL_PAIRS: list(reported)}).items():
            if ids:
                groups[name] = [reported[caption_id] for caption_id in ids]
        return groups

    def _explain(
        self, model: CLIP4IDC, groups: Mapping[str, Sequence[ReportedPair]]
    ) -> dict[str, Explanation]:
        """Caption id → where the model looked, for the pairs that the page shows."""
        predictor = Predictor(model, self.max_words, self.runtime)
        indices = {caption_id: index for index, caption_id in enumerate(self.captions)}
        explanations = {}
        for pair in choose_shown_pairs(groups):
            images = (pair.before, pair.after)
            found = predictor.explanations([images], self.decoding, [indices[pair.id]])
            explanations[pair.id] = found[0][0]
        return explanations

    def _find_images(self) -> dict[str, tuple[str, str]]:
        """The two images of each caption id."""
        images = {pair.id: (pair.before, pair.after) for pair in self.pairs}
        for pair in self.pairs:
            if pair.distractor:
                images[pair.distractor_id] = pair.before, pair.distractor
        return images


# Not in inference mode: there autocast would convert each weight again for every word.
@torch.no_grad()
def generate_captions(
    model: CLIP4IDC,
    pairs: Sequence[ImagePair],
    loader: Batches,
    max_words: int,
    decoding: Decoding,
    runtime: Runtime,
) -> dict[str, str]:
    """Caption id → sentence: all change pairs in file order, then all distractors.

    Each process captions its share of the pairs, whose images its `loader` gives. A caption's
    index in this order seeds its random draws, so that the number of processes does not matter.
    """
    own: list[tuple[str, ...]] = []  # the captions of each pair: one, or two with a distractor
    own_indices = runtime.own_share(range(len(pairs)))
    with runtime.autocast():
        for batch in runtime.progress_bar(loader, "captions"):
            images = model.normalize_images(batch["images"].to(runtime.device))
            tokens = model.encode_against_first(images).tokens
            indices = list(own_indices[len(own) : len(own) + len(images)])
            if len(tokens) > len(images):  # distractors
                indices += [index + len(pairs) for index in indices]
            ids = generate(model, tokens, max_words, decoding, indices)[:, 0]
            sentences = [decode(token_ids) for token_ids in ids.tolist()]
            own += _group_by_pair(sentences, len(images))
    ordered = runtime.merge_shares(own)
    captions = {}
    for part in range(len(ordered[0])):  # 0: changes, 1: distractors
        for pair, texts in zip(pairs, ordered, strict=True):
            captions[pair.caption_ids[part]] = texts[part]
    return captions


def _group_by_pair(sentences: list[str], num_pairs: int) -> list[tuple[str, ...]]:
    """All pairs' first sentences, then all second ones → the sentences of each pair."""
    starts = range(0, len(sentences), num_pairs)
    parts = [sentences[start : start + num_pairs] for start in starts]
    return list(zip(*parts, strict=True))
