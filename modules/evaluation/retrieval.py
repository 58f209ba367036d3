"""TODO."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dataloaders.batches import Batches, trim_padding
from dataloaders.images import normalize
from dataloaders.pairs import ImagePair
from modules.clip4idc import CLIP4IDC
from modules.evaluation import NUM_SAMPLES, REPORT_FILE, run_facts
from modules.model.clip import Features
from modules.options import Options
from modules.report.page import Page
from modules.report.pictures import draw_pairs, evenly_spaced
from modules.report.retrieval_page import write_retrieval_page
from modules.report.tables import format_table
from modules.retrieval import TEXT_BATCH, chance_level, retrieval_metrics
from modules.tokenizer import tokenize_caption
from modules.training.states import HISTORY_FILE
from system.runtime import Runtime

log = logging.getLogger(__name__)


@dataclass
class RetrievalEvaluator:
    """Stage 1: R@k both ways; text→pair R@1 chooses."""

    pairs: Sequence[ImagePair]
    loader: Batches
    options: Options
    runtime: Runtime
    similarity: Tensor | None = None  # the latest: (N_text, N_pair)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.pairs) < self.runtime.world_size:
            raise ValueError(
                f"{len(self.pairs)} pairs to evaluate on are fewer than {self.runtime.world_size} processes"
            )

    def __call__(self, model: CLIP4IDC, label: str, folder: Path) -> tuple[float, dict[str, float]]:
        self.similarity = split_similarity(
            model, self.pairs, self.loader, self.options.data.max_words, self.runtime
        )
        self.metrics = retrieval_metrics(
            self.similarity, [len(scene.captions) for scene in self.pairs]
        )
        log.info(
            "retrieval among %d pairs\n%s",
            len(self.pairs),
            format_table(list(self._rows().items()), digits=1),
        )
        scores = {
            f"{way}_{name}": value
            for way, row in self.metrics.items()
            for name, value in row.items()
        }
        return self.metrics["text_to_pair"]["R1"], scores

    def samples(self) -> Image.Image:
        texts = [caption for scene in self.pairs for caption in scene.captions]
        chosen = evenly_spaced(len(texts), NUM_SAMPLES)
        nearest = [self.pairs[n] for n in self.similarity[chosen].argmax(dim=1).tolist()]
        return draw_pairs(
            [
                (scene.before, scene.after, [f"nearest: {scene.id}", texts[n]])
                for n, scene in zip(chosen, nearest, strict=True)
            ]
        )

    def report(self, model: CLIP4IDC, checkpoint: str, split: str, folder: Path) -> None:
        counts = (
            f"{len(self.similarity)} sentences and {len(self.pairs)} pairs of the {split} split. R1, R5, R10: per cent of "
            "the queries whose own is among the first 1, 5, 10 found."
        )
        page = Page(
            f"Retrieval: {self.options.data.data_path}",
            counts,
            self._rows(),
            [("chance", chance_level(len(self.pairs)))],
            folder / HISTORY_FILE,
            **run_facts(checkpoint, self.options),
        )
        write_retrieval_page(folder / REPORT_FILE, page, self.pairs, self.similarity)
        log.info("report in %s", folder / REPORT_FILE)

    def _rows(self) -> dict[str, dict[str, float]]:
        return {
            "text → pair": self.metrics["text_to_pair"],
            "pair → text": self.metrics["pair_to_text"],
        }


@torch.no_grad()  # in inference mode autocast would cast every weight anew at every use
def split_similarity(
    model: CLIP4IDC, scenes: Sequence[ImagePair], loader: Batches, max_words: int, runtime: Runtime
) -> Tensor:
    """The similarity (N_text, N_pair) of a split, on the CPU: every pair encoded once, the work shared by all processes.

    `loader` gives this process' share of the scenes' images in file order.
    """
    texts = [caption for scene in scenes for caption in scene.captions]
    ids = torch.from_numpy(
        np.stack([tokenize_caption(text, max_words)["retrieval_text_ids"] for text in texts])
    )
    own_ids = runtime.own_share(ids)
    by_length = own_ids.argmax(
        dim=1
    ).argsort()  # short ones together, so that little padding is computed
    with runtime.autocast():
        pairs = [
            model.encode_pairs(normalize(batch["images"].to(runtime.device)))
            for batch in runtime.progress(loader, "pairs")
        ]
        tight = hasattr(model, "cross")
        parts = own_ids[by_length].split(TEXT_BATCH)
        if not tight:
            parts = [trim_padding({"text_ids": part})["text_ids"] for part in parts]
        sentences = [
            model.encode_text(part.to(runtime.device)) for part in runtime.progress(parts, "texts")
        ]
        pair, text = (
            _gather_features(pairs, tight, runtime),
            _gather_features(sentences, tight, runtime, order=by_length.argsort()),
        )
        similarity = (
            _cross_similarity(model, text, pair, runtime)
            if tight
            else model.score_pairs(text, pair)
        )
    return similarity.float().cpu()


def _gather_features(
    shares: list[Features], with_tokens: bool, runtime: Runtime, order: Tensor | slice = slice(None)
) -> Features:
    """The features of all processes in the items' order, into which `order` brings this process' rows; tokens and mask only
    where the cross encoder wants them."""

    def merge(rows: Sequence[Tensor]) -> Tensor:
        return runtime.gather_rows(torch.cat(list(rows)).cpu()[order]).to(runtime.device)

    pooled = merge([share.pooled.float() for share in shares])
    if not with_tokens:
        return Features(pooled, pooled)
    masks = [share.mask for share in shares]
    return Features(
        merge([share.tokens for share in shares]),
        pooled,
        None if masks[0] is None else merge(masks),
    )


def _cross_similarity(model: CLIP4IDC, text: Features, pair: Features, runtime: Runtime) -> Tensor:
    """The cross encoder's similarity of every text and pair, each process working off its share of the texts."""
    own = runtime.own_share(range(len(text.tokens)))
    rows = [
        model.score_pairs(Features(*(part[n : n + 1] for part in text)), pair).cpu()
        for n in runtime.progress(own, "cross encoder", unit="text")
    ]
    return runtime.gather_rows(torch.cat(rows))
