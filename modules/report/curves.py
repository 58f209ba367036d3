"""Learning curves of the report: the numbers that its template draws in SVG."""

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from modules.report.pictures import space_evenly

MAX_TICKS = 6  # numbers below the axis of epochs


@dataclass(frozen=True)
class Plot:
    """The plotted area, and the margins around it for what is written there, in pixels."""

    width: int = 270  # three plots stand side by side
    height: int = 140
    left: int = 58
    right: int = 15
    top: int = 15
    bottom: int = 42


PLOT = Plot()


@dataclass(frozen=True)
class Curve:
    """A column of a training's history. Epochs count from 1, as in the log.

    `best` is the index of the chosen epoch, or None if the column has no value there.
    """

    name: str
    epochs: list[int]
    values: list[float]
    best: int | None

    @property
    def points(self) -> list[tuple[float, float]]:
        """x, y of each value: the plot's width is all epochs, its height lowest to highest."""
        first = self.epochs[0]
        epoch_range = (self.epochs[-1] - first) or 1
        low = min(self.values)
        value_range = (max(self.values) - low) or 1.0
        points = []
        for epoch, value in zip(self.epochs, self.values, strict=True):
            x = PLOT.width * (epoch - first) / epoch_range
            y = PLOT.height * (1 - (value - low) / value_range)
            points.append((round(x, 1), round(y, 1)))
        return points

    @property
    def ticks(self) -> list[int]:
        """Indices of the epochs whose numbers stand below the axis."""
        return space_evenly(len(self.epochs), MAX_TICKS)


def make_curves(history: pd.DataFrame, names: Mapping[str, str], selection: str) -> list[Curve]:
    """A curve for each column of the history that has values in at least two epochs.

    `names` are the columns and what they are called. `selection` is the column whose highest value
    chooses the best epoch; of equal ones the latest.
    """
    scored = _drop_missing(history, selection)
    highest = scored[scored[selection] == scored[selection].max()] if len(scored) else scored
    chosen = set(highest["epoch"].tail(1)) if len(scored) else set()
    curves = []
    for column, name in names.items():
        known = _drop_missing(history, column)
        if len(known) >= 2:
            epochs = known["epoch"].tolist()
            best = next((index for index, epoch in enumerate(epochs) if epoch in chosen), None)
            numbers = [int(epoch) + 1 for epoch in epochs]
            curves.append(Curve(name, numbers, known[column].tolist(), best))
    return curves


def _drop_missing(history: pd.DataFrame, column: str) -> pd.DataFrame:
    """The rows that have a value in a column; none if there is no such column."""
    return history.dropna(subset=column) if column in history else history[:0]
