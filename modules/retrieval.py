"""Retrieval both ways: similarity → ranks → R@k (docs/reference.md, Retrieval metrics)."""

from collections.abc import Sequence

import torch
from torch import Tensor

RECALL_RANKS = (1, 5, 10)  # the k of R@k


def ranks_of(scores: Tensor, target: Tensor) -> Tensor:
    """scores (N, M), target (N,) → (N,) the rank, from 1, of each row's target column.

    It is 1 + the number of greater scores + half the number of other equal ones.
    """
    own = scores.gather(1, target[:, None])
    num_greater = (scores > own).sum(dim=1)
    num_equal = (scores == own).sum(dim=1) - 1
    return 1 + num_greater + num_equal / 2


def rank_metrics(ranks: Tensor, median: str) -> dict[str, float]:
    """ranks (N,) → R1, R5 and R10 in percent, MedianR and MeanR.

    median: "lower" takes the lower of two middle ranks, "mean_of_middle" their mean.
    """
    ranks = ranks.double()
    middle = ranks.median() if median == "lower" else ranks.quantile(0.5)
    recalls = {f"R{k}": 100 * (ranks <= k).double().mean().item() for k in RECALL_RANKS}
    return {**recalls, "MedianR": middle.item(), "MeanR": ranks.mean().item()}


def retrieval_metrics(
    similarity: Tensor, sentences_per_pair: Sequence[int]
) -> dict[str, dict[str, float]]:
    """`rank_metrics` of both directions; arguments and errors as in `retrieval_ranks`."""
    ranks = retrieval_ranks(similarity, sentences_per_pair)
    return {
        "text_to_pair": rank_metrics(ranks["text_to_pair"], median="lower"),
        "pair_to_text": rank_metrics(ranks["pair_to_text"], median="mean_of_middle"),
    }


def retrieval_ranks(similarity: Tensor, sentences_per_pair: Sequence[int]) -> dict[str, Tensor]:
    """similarity (N_text, N_pair) → text_to_pair (N_text,), pair_to_text (N_pair,).

    The texts stand pair by pair. A pair's similarity to another pair's sentences is the largest of
    theirs. Raises ValueError if the counts do not fit.
    """
    counts = torch.as_tensor(sentences_per_pair)
    if similarity.shape != (int(counts.sum()), len(counts)) or (counts < 1).any():
        raise ValueError(
            f"similarity of shape {tuple(similarity.shape)} does not fit {len(counts)} pairs with "
            f"{int(counts.sum())} sentences, at least one each"
        )
    similarity = similarity.cpu()
    pair_of_text = torch.arange(len(counts)).repeat_interleave(counts)
    by_pair = similarity.split(counts.tolist())
    # Row: the sentences of a pair; column: a pair.
    best_sentence = torch.stack([sentences.amax(dim=0) for sentences in by_pair])
    return {
        "text_to_pair": ranks_of(similarity, pair_of_text),
        "pair_to_text": ranks_of(best_sentence.T, torch.arange(len(counts))),
    }


def chance_level(num_pairs: int) -> dict[str, float]:
    """`rank_metrics` on average, if each of num_pairs ranks is as likely as any other."""
    middle = (num_pairs + 1) / 2
    recalls = {f"R{k}": 100 * min(k / num_pairs, 1.0) for k in RECALL_RANKS}
    return {**recalls, "MedianR": middle, "MeanR": middle}
