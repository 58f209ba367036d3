"""Limits on the sizes that configs and weights may ask for, and their check."""

import reprlib
from typing import Any

# What a config may ask for; more is a mistake or an attack.
MAX_SIZE = 2**20
MAX_LAYERS = 2**10
MAX_PARAMETERS = 2**32
HEAD_WIDTH = 64  # all of OpenAI's CLIPs have heads of 64


def check_size(name: str, value: Any, most: int) -> None:
    """ValueError, which begins with `name`, for anything but a whole number from 1 to `most`."""
    if type(value) is not int or not 1 <= value <= most:
        raise ValueError(
            f"{name} is {reprlib.repr(value)}, "
            f"expected a whole number of at least 1 and at most {most}"
        )
