"""Evaluation of retrieval: features → similarity → ranks → R@k, both ways."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataloaders.batches import Batches, trim_padding
from dataloaders.pairs import ImagePair, list_change_captions
from modules.clip4idc import CLIP4IDC
from modules.evaluation import NUM_SAMPLES, RunDescription
from modules.model.backbone import Features
from modules.report.page import Page
from modules.report.pictures import draw_pairs, space_evenly
from modules.report.retrieval_page import write_retrieval_page
from modules.report.tables import format_table
from modules.retrieval import chance_level, retrieval_metrics
from modules.tokenizer import tokenize_caption
from modules.training.history import read_history
from system.compute import check_finite
from system.runtime import Runtime

log = logging.getLogger(__name__)

TEXT_BATCH = 512  # captions that are encoded at once


@dataclass
class RetrievalEvaluator:
    """R@k from sentences to pairs and back; text→pair R@1 chooses the epoch."""

    pairs: Sequence[ImagePair]
    loader: Batches  # this process's share of the pairs' images, in file order
    max_words: int
    run: RunDescription
    runtime: Runtime
    # Of the latest evaluation: (N_text, N_pair), and scores by direction.
    similarity: Tensor | None = None
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.pairs) < self.runtime.world_size:
            raise ValueError(
                f"{len(self.pairs)} pairs to evaluate on are fewer than "
                f"{self.runtime.world_size} processes"
            )
        if len(self.pairs) == 1:
            log.warning("retrieval among a single pair is always right: its scores mean nothing")

    def evaluate(self, model: CLIP4IDC, label: str) -> tuple[float, dict[str, float]]:
        """Return text→pair R@1 and all scores. Writes no file, so `label` is unused."""
        self.similarity = compute_similarity(
            model, self.pairs, self.loader, self.max_words, self.runtime
        )
        sentences_per_pair = [len(pair.captions) for pair in self.pairs]
        self.metrics = retrieval_metrics(self.similarity, sentences_per_pair)
        table = format_table(list(self._scores_by_direction().items()), digits=1)
        log.info("retrieval among %d pairs\n%s", len(self.pairs), table)
        scores = {
            f"{direction}_{name}": value
            for direction, row in self.metrics.items()
            for name, value in row.items()
        }
        return self.metrics["text_to_pair"]["R1"], scores

    def draw_samples(self) -> Image.Image:
        """Some sentences of the latest evaluation, each with the pair found nearest to it."""
        texts = list_change_captions(self.pairs)
        chosen = space_evenly(len(texts), NUM_SAMPLES)
        nearest = self.similarity[chosen].argmax(dim=1).tolist()
        samples = []
        for text_index, pair_index in zip(chosen, nearest, strict=True):
            pair = self.pairs[pair_index]
            lines = [f"nearest: {pair.id}", texts[text_index]]
            samples.append((pair.before, pair.after, lines))
        return draw_pairs(samples)

    def write_report(self, model: CLIP4IDC, checkpoint: str) -> None:
        """report.html of the latest evaluation."""
        summary = (
            f"{len(self.similarity)} sentences and {len(self.pairs)} pairs of the "
            f"{self.run.split} split. R1, R5, R10: percentage of queries whose own match is among "
            "the first 1, 5 or 10 results."
        )
        page = Page(
            title=f"Retrieval: {self.run.data}",
            summary=summary,
            scores=self._scores_by_direction(),
            baselines=[("chance", chance_level(len(self.pairs)))],
            history=read_history(self.run.folder),
            facts=self.run.list_facts(checkpoint),
            defaults=self.run.defaults,
        )
        write_retrieval_page(self.run.report_path, page, self.pairs, self.similarity)
        log.info("report in %s", self.run.report_path)

    def _scores_by_direction(self) -> dict[str, dict[str, float]]:
        return {
            "text → pair": self.metrics["text_to_pair"],
            "pair → text": self.metrics["pair_to_text"],
        }


# Not in inference mode: there autocast would convert each weight again every time it is used.
@torch.no_grad()
def compute_similarity(
    model: CLIP4IDC, pairs: Sequence[ImagePair], loader: Batches, max_words: int, runtime: Runtime
) -> Tensor:
    """The similarity (N_text, N_pair) of a split, on the CPU; the processes share the work.

    Every pair and every text is encoded once. `loader` gives this process's share of the pairs'
    images in file order. Raises ValueError if it is not finite.
    """
    texts = list_change_captions(pairs)
    with runtime.autocast():
        if model.uses_cross_encoder:
            similarity = _compare_tokens(model, texts, loader, max_words, runtime)
        else:
            similarity = _compare_vectors(model, texts, loader, max_words, runtime)
    similarity = similarity.float().cpu()
    check_finite(similarity)
    return similarity


def _compare_vectors(
    model: CLIP4IDC, texts: Sequence[str], loader: Batches, max_words: int, runtime: Runtime
) -> Tensor:
    """(N_text, N_pair) cosines, for which one vector of each text and pair is enough."""
    pair = _gather_pooled(_encode_own_pairs(model, loader, runtime), runtime)
    ids, masks, order = _sort_own_texts(texts, max_words, runtime)
    batches = []
    for batch_ids, batch_masks in zip(ids.split(TEXT_BATCH), masks.split(TEXT_BATCH), strict=True):
        batches.append(trim_padding({"text_ids": batch_ids, "text_mask": batch_masks})["text_ids"])
    text = _gather_pooled(_encode_texts(model, batches, runtime), runtime, order)
    return model.similarity(text, pair)


def _compare_tokens(
    model: CLIP4IDC, texts: Sequence[str], loader: Batches, max_words: int, runtime: Runtime
) -> Tensor:
    """(N_text, N_pair) scores of the cross encoder; each process does its share of the texts."""
    pair = _gather_features(_encode_own_pairs(model, loader, runtime), runtime)
    ids, _, order = _sort_own_texts(texts, max_words, runtime)
    batches = ids.split(TEXT_BATCH)
    text = _gather_features(_encode_texts(model, batches, runtime), runtime, order)
    own = runtime.own_share(range(len(text.tokens)))
    rows = []
    for index in runtime.progress_bar(own, "cross encoder", unit="text"):
        one_text = Features(*(part[index : index + 1] for part in text))
        rows.append(model.score_pairs(one_text, pair).cpu())
    return runtime.merge_rows(torch.cat(rows))


def _encode_own_pairs(model: CLIP4IDC, loader: Batches, runtime: Runtime) -> Iterator[Features]:
    for batch in runtime.progress_bar(loader, "pairs"):
        yield model.encode_pairs(model.normalize_images(batch["images"].to(runtime.device)))


def _encode_texts(
    model: CLIP4IDC, batches: Sequence[Tensor], runtime: Runtime
) -> Iterator[Features]:
    for ids in runtime.progress_bar(batches, "texts"):
        yield model.encode_text(ids.to(runtime.device))


def _sort_own_texts(
    texts: Sequence[str], max_words: int, runtime: Runtime
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids (N, L) and masks (N, L) of this process's texts, and the order (N,) that undoes sorting.

    Texts of similar length come together, so that little padding is computed.
    """
    arrays = runtime.own_share([tokenize_caption(text, max_words) for text in texts])
    ids = torch.from_numpy(np.stack([array["retrieval_text_ids"] for array in arrays]))
    masks = torch.from_numpy(np.stack([array["retrieval_text_mask"] for array in arrays]))
    by_length = masks.sum(dim=1).argsort()
    return ids[by_length], masks[by_length], by_length.argsort()


def _gather_pooled(
    batches: Iterable[Features], runtime: Runtime, order: Tensor | slice = slice(None)
) -> Tensor:
    """One vector (N, E) per item of all processes. A batch's tokens are let go at once.

    `order` puts this process's rows into item order.
    """
    pooled = [features.pooled.float() for features in batches]
    return _merge_rows(pooled, runtime, order)


def _gather_features(
    batches: Iterable[Features], runtime: Runtime, order: Tensor | slice = slice(None)
) -> Features:
    """The features of all processes in item order, as the cross encoder needs them."""
    batches = list(batches)
    pooled = _merge_rows([features.pooled.float() for features in batches], runtime, order)
    tokens = _merge_rows([features.tokens for features in batches], runtime, order)
    if batches[0].mask is None:
        return Features(tokens, pooled)
    mask = _merge_rows([features.mask for features in batches], runtime, order)
    return Features(tokens, pooled, mask)


def _merge_rows(parts: Sequence[Tensor], runtime: Runtime, order: Tensor | slice) -> Tensor:
    own = torch.cat(list(parts)).cpu()[order]
    return runtime.merge_rows(own).to(runtime.device)
