"""The standard streams, whatever they are: closed, of a narrow encoding, a terminal that goes."""

import os
import sys
from contextlib import suppress
from typing import Any

NUMBERS = {"stdin": 0, "stdout": 1, "stderr": 2}


def prepare_streams() -> None:
    """Make stdout and stderr take any text: what their encoding lacks is written as an escape.

    Streams that the caller has closed lead nowhere, and their numbers are taken, so that no file
    that is opened later gets what libraries print.
    """
    for name, number in NUMBERS.items():
        _occupy(number)
        if getattr(sys, name) is None:
            mode = "r" if name == "stdin" else "w"
            nowhere = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(nowhere, mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        # A test's or a notebook's stream has no encoding of its own; a full disk or a pipe that is
        # already broken refuses the flush that comes first.
        with suppress(AttributeError, OSError, ValueError):
            stream.reconfigure(errors="backslashreplace")


def _occupy(number: int) -> None:
    """Open nothing under a file number that is free."""
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)


def print_if_heard(*values: Any, **options: Any) -> None:
    """`print`, which does nothing where nobody listens any more."""
    # ValueError: the stream is closed.
    with suppress(OSError, ValueError):
        print(*values, **options)
