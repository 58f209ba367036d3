"""Stage-1 evaluation: features → similarity → ranks → R@k (SPEC §6, Retrieval)."""

from collections.abc import Sequence

import torch
from torch import Tensor

TEXT_BATCH = 512


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


def chance_level(num_pairs: int) -> dict[str, float]:
    """What `rank_metrics` gives on average where each rank of num_pairs is as likely as any other."""
    middle = (num_pairs + 1) / 2
    return {
        **{f"R{k}": 100 * min(k / num_pairs, 1.0) for k in (1, 5, 10)},
        "MedianR": middle,
        "MeanR": middle,
    }
