"""Calls of the page's functions: the inputs of each function, and checks of the values sent."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modules.web.messages import Refused
from modules.web.uploads import UploadFolder
from system.json_files import parse_json


@dataclass(frozen=True)
class Number:
    """An input that is a number in a range, `low` and `high` included."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    optional: bool = False

    def check(self, value: object, uploads: UploadFolder) -> float | None:
        """The number, or None if it is optional and missing. Raises Refused for anything else."""
        if value is None and self.optional:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise Refused(422, f"expected a number from {self.low:g} to {self.high:g}")
        if not self.whole:
            return value
        if value != int(value):
            raise Refused(422, "expected a whole number")
        return int(value)


@dataclass(frozen=True)
class Picture:
    """An input that is an uploaded file."""

    def check(self, value: object, uploads: UploadFolder) -> dict | None:
        """The upload in Gradio's form, rebuilt from its path. Raises Refused for anything else."""
        if value is None:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            raise Refused(422, "expected an uploaded file: an object with its path")
        try:
            path = uploads.resolve(value["path"])
        except PermissionError as error:
            raise Refused(403, str(error)) from None
        name = value.get("orig_name")
        return {
            "path": str(path),
            "orig_name": name if isinstance(name, str) else None,
            "meta": {"_type": "gradio.FileData"},
        }


@dataclass(frozen=True)
class PageFunction:
    """A function of the page.

    `number` is Gradio's; `name` is the name in the API, if it has one. Calls of a `queued` function
    wait for their turn.
    """

    number: int
    name: str | None
    inputs: Sequence[Number | Picture]
    queued: bool = True


def parse_call(content: bytes) -> dict:
    """The JSON object in a call's body, parsed strictly. Raises Refused for anything else."""
    try:
        body = parse_json(content.decode())
    except ValueError:
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(422, "expected a JSON object as the body")
    return body
