"""Stage-1 evaluation: features → similarity → ranks → R@k (SPEC §6, Retrieval)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dataloaders.images import normalize
from dataloaders.pairs import Batches, Scene, trim_padding
from modules.clip import Features
from modules.clip4idc import CLIP4IDC
from modules.runtime import Runtime
from modules.tokenizer import tokenize_caption

TEXTS_AT_ONCE = 512


def ranks_of(scores: Tensor, target: Tensor) -> Tensor:
    """The rank, from 1, of each row's target column in scores (N, M): 1 + number greater + half the other equals."""
    own = scores.gather(1, target[:, None])
    greater, equal = (scores > own).sum(dim=1), (scores == own).sum(dim=1) - 1
    return 1 + greater + equal / 2


def rank_metrics(ranks: Tensor, median: str) -> dict[str, float]:
    """R1, R5, R10 in per cent, MedianR (`lower` or `usual` where two stand in the middle) and MeanR."""
    ranks = ranks.double()
    middle = ranks.median() if median == "lower" else ranks.quantile(0.5)
    return {
        **{f"R{k}": 100 * (ranks <= k).double().mean().item() for k in (1, 5, 10)},
        "MedianR": middle.item(),
        "MeanR": ranks.mean().item(),
    }


def retrieval_metrics(
    similarity: Tensor, sentences_per_pair: Sequence[int]
) -> dict[str, dict[str, float]]:
    """Metrics both ways of a similarity (N_text, N_pair) whose texts stand pair by pair; ranks as in `retrieval_ranks`."""
    ranks = retrieval_ranks(similarity, sentences_per_pair)
    return {
        "text_to_pair": rank_metrics(ranks["text_to_pair"], median="lower"),
        "pair_to_text": rank_metrics(ranks["pair_to_text"], median="usual"),
    }


def retrieval_ranks(similarity: Tensor, sentences_per_pair: Sequence[int]) -> dict[str, Tensor]:
    """The rank of each sentence's own pair, text_to_pair (N_text,), and of each pair's own sentences, pair_to_text (N_pair,).

    A pair's similarity to another's sentences is the maximum over them. Raises ValueError where the counts do not fit.
    """
    counts = torch.as_tensor(sentences_per_pair)
    if similarity.shape != (int(counts.sum()), len(counts)) or (counts < 1).any():
        raise ValueError(
            f"similarity of shape {tuple(similarity.shape)} does not fit {len(counts)} pairs with "
            f"{int(counts.sum())} sentences, at least one each"
        )
    similarity = similarity.cpu()
    pair_of_text = torch.arange(len(counts)).repeat_interleave(counts)
    set_scores = torch.stack(
        [texts.amax(dim=0) for texts in similarity.split(counts.tolist())]
    )  # (caption sets, pairs)
    return {
        "text_to_pair": ranks_of(similarity, pair_of_text),
        "pair_to_text": ranks_of(set_scores.T, torch.arange(len(counts))),
    }


def chance(num_pairs: int) -> dict[str, float]:
    """What `rank_metrics` gives on average where each rank of num_pairs is as likely as any other."""
    middle = (num_pairs + 1) / 2
    return {
        **{f"R{k}": 100 * min(k / num_pairs, 1.0) for k in (1, 5, 10)},
        "MedianR": middle,
        "MeanR": middle,
    }


@torch.no_grad()  # in inference mode autocast would cast every weight anew at every use
def compare_split(
    model: CLIP4IDC, scenes: Sequence[Scene], loader: Batches, max_words: int, runtime: Runtime
) -> Tensor:
    """The similarity (N_text, N_pair) of a split, on the CPU: every pair encoded once, the work shared by all processes.

    `loader` gives this process' share of the scenes' images in file order.
    """
    texts = [caption for scene in scenes for caption in scene.captions]
    ids = torch.from_numpy(
        np.stack([tokenize_caption(text, max_words)["retrieval_text_ids"] for text in texts])
    )
    own_ids = ids[runtime.rank :: runtime.world_size]
    by_length = own_ids.argmax(
        dim=1
    ).argsort()  # short ones together, so that little padding is computed
    with runtime.autocast():
        pairs = [
            model.encode_pairs(normalize(batch["images"].to(runtime.device)))
            for batch in runtime.progress(loader, "pairs")
        ]
        tight = hasattr(model, "cross")
        parts = own_ids[by_length].split(TEXTS_AT_ONCE)
        if not tight:
            parts = [trim_padding({"text_ids": part})["text_ids"] for part in parts]
        sentences = [
            model.encode_text(part.to(runtime.device)) for part in runtime.progress(parts, "texts")
        ]
        pair, text = (
            _everyones(pairs, tight, runtime),
            _everyones(sentences, tight, runtime, order=by_length.argsort()),
        )
        similarity = (
            _compare_all(model, text, pair, runtime) if tight else model.compare(text, pair)
        )
    return similarity.float().cpu()


def _everyones(
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


def _compare_all(model: CLIP4IDC, text: Features, pair: Features, runtime: Runtime) -> Tensor:
    """The cross encoder's similarity of every text and pair, each process working off its share of the texts."""
    own = range(runtime.rank, len(text.tokens), runtime.world_size)
    rows = [
        model.compare(Features(*(part[n : n + 1] for part in text)), pair).cpu()
        for n in runtime.progress(own, "cross encoder", unit="text")
    ]
    return runtime.gather_rows(torch.cat(rows))
