"""How certain a caption score is: a percentile bootstrap over captions, also for two systems.

A draw of captions, some of them more than once, is a vector of weights. Weighted sums of the
metrics' rows give its scores as each metric defines them for a corpus. CIDEr's document frequencies
stay those of the whole group that is drawn from.
"""

import math
from collections.abc import Sequence

import numpy as np

from modules.metrics.scorer import GroupRows

LEVEL = 95  # percent
DECIMALS = 9  # of differences; further ones come from rounding errors


def bootstrap(systems: Sequence[GroupRows], draws: int, seed: int) -> list[dict[str, np.ndarray]]:
    """For each system: score name → values (draws,). All systems are scored on the same draws.

    Of a single caption all values are NaN: every draw would be the same. Raises ValueError for
    systems that caption different ids.
    """
    ids = systems[0].ids
    if any(system.ids != ids for system in systems):
        raise ValueError("the systems caption different pairs")
    generator = np.random.default_rng(seed)
    size = len(ids)
    if size == 1:
        return [{name: np.full(draws, np.nan) for name in system.scores()} for system in systems]
    drawn: list[list[dict[str, float]]] = [[] for _ in systems]
    for _ in range(draws):
        drawn_indices = generator.integers(size, size=size)
        weights = np.bincount(drawn_indices, minlength=size).astype(float)
        for scores, system in zip(drawn, systems, strict=True):
            scores.append(system.scores(weights))
    return [_by_name(scores) for scores in drawn]


def _by_name(draws: Sequence[dict[str, float]]) -> dict[str, np.ndarray]:
    return {name: np.array([scores[name] for scores in draws]) for name in draws[0]}


def interval(values: np.ndarray) -> tuple[float, float]:
    """values (draws,) → the middle LEVEL percent; NaN if a value is missing."""
    low, high = np.percentile(values, [(100 - LEVEL) / 2, (100 + LEVEL) / 2])
    return float(low), float(high)


def p_value(differences: np.ndarray) -> float:
    """Two-sided: twice the smaller share of draws on either side of 0; NaN if one is missing.

    The observed data count as one more draw on each side.
    """
    if np.isnan(differences).any():
        return math.nan
    differences = np.round(differences, DECIMALS)
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (float(beyond) + 1) / (len(differences) + 1))
