"""How far a long piece of work has come: a bar on a terminal, lines elsewhere."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from system.streams import print_if_heard

SECONDS_BETWEEN_LINES = 30
LINE = "{desc}: {n_fmt} of {total_fmt}, {remaining} left"
LINE_WITHOUT_TOTAL = "{desc}: {n_fmt}"


class _LineWriter:
    """A file for tqdm that prints each state as a line of its own."""

    def write(self, text: str) -> None:
        line = text.strip()
        if line:  # tqdm also writes blanks, to clear its line
            print_if_heard(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        """Each line is flushed already."""


def show_progress(
    iterable: Iterable[Any] | None = None,
    what: str = "",
    is_shown: bool = True,
    has_lines: bool = True,
    **settings: Any,
) -> tqdm:
    """The iterable, or a bar to `update`, with its progress on stderr while it is worked off.

    `what` is in front of the numbers. Where stderr is no terminal, as in the log of a job, a line
    comes every half a minute, unless `has_lines` is false. `settings` are tqdm's, such as total.
    """
    if _is_terminal():
        return tqdm(
            iterable, desc=what, leave=False, dynamic_ncols=True, disable=not is_shown, **settings
        )
    has_total = settings.get("total") is not None or hasattr(iterable, "__len__")
    return tqdm(
        iterable,
        desc=what,
        file=_LineWriter(),
        bar_format=LINE if has_total else LINE_WITHOUT_TOTAL,
        delay=SECONDS_BETWEEN_LINES,
        mininterval=SECONDS_BETWEEN_LINES,
        miniters=1,
        disable=not (is_shown and has_lines),
        **settings,
    )


def _is_terminal() -> bool:
    """Whether stderr is a terminal."""
    try:
        return sys.stderr.isatty()
    except (AttributeError, ValueError):  # there is none, or it is closed
        return False
