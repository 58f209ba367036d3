"""How much time a training has left, from the steps and evaluations so far."""

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Pace:
    """Measures steps and evaluations on this process, and says how long the rest will take.

    A resumed training measures anew.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._step_seconds = 0.0
        self._evaluations = 0
        self._evaluation_seconds = 0.0
        self._since = time.perf_counter()

    def begin_epoch(self) -> None:
        """Call before an epoch's first step."""
        self._since = time.perf_counter()

    def add_step(self) -> None:
        """Call after each step."""
        now = time.perf_counter()
        self._step_seconds += now - self._since
        self._steps += 1
        self._since = now

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Inside, an epoch is evaluated."""
        start = time.perf_counter()
        yield
        self._evaluation_seconds += time.perf_counter() - start
        self._evaluations += 1

    def estimate(self, steps: int, evaluations: int = 0) -> float:
        """The seconds that so many steps and evaluations will take; unknown parts count nothing."""
        seconds = 0.0
        if self._steps:
            seconds += steps * self._step_seconds / self._steps
        if self._evaluations:
            seconds += evaluations * self._evaluation_seconds / self._evaluations
        return seconds


def format_duration(seconds: float) -> str:
    """A duration for people, such as "22 s", "12 min", "3 h 5 min" or "2 d 4 h"."""
    minutes = round(seconds / 60)
    hours = round(seconds / 3600)
    if seconds < 59.5:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} d {hours % 24} h"
