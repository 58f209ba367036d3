"""Calls of the page's functions: what each takes, and a visitor's values held against it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from modules.web.messages import Refused
from modules.web.uploads import UploadFolder
from system.json_files import parse_json


@dataclass(frozen=True)
class Number:
    """An input that is a number in a range."""

    low: float = -math.inf
    high: float = math.inf
    whole: bool = False
    optional: bool = False

    def checked(self, value: object, uploads: UploadFolder) -> float | None:
        """The number; None where it may be left out and is. Refused for all else."""
        if value is None and self.optional:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.low <= value <= self.high:
            raise Refused(422, f"a number from {self.low:g} to {self.high:g} is expected")
        if not self.whole:
            return value
        if value != int(value):
            raise Refused(422, "a whole number is expected")
        return int(value)


@dataclass(frozen=True)
class Picture:
    """An input that is an uploaded file."""

    def checked(self, value: object, uploads: UploadFolder) -> dict | None:
        """The upload in Gradio's form, made of its path alone. Refused for what is none."""
        if value is None:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("path"), str):
            raise Refused(422, "an uploaded file is expected: an object with its path")
        try:
            path = uploads.resolve(value["path"])
        except PermissionError as error:
            raise Refused(403, str(error)) from None
        name = value.get("orig_name")
        meta = {"_type": "gradio.FileData"}
        return {
            "path": str(path),
            "orig_name": name if isinstance(name, str) else None,
            "meta": meta,
        }


@dataclass(frozen=True)
class PageFunction:
    """A function of the page: its number, its API name if it has one, its inputs, and whether its
    calls wait in a queue."""

    number: int
    name: str | None
    inputs: Sequence[Number | Picture]
    queued: bool = True


def parse_call(content: bytes) -> dict:
    """A call's JSON object. Refused for what is none, by the strict reader of all our JSON."""
    try:
        body = parse_json(content.decode())
    except ValueError:
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(422, "the body is expected to be a JSON object")
    return body
