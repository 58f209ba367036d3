"""ASGI requests and answers of the page's server: bounded bodies, changed headers, refusals."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

MAX_CALL_BYTES = 1 << 20  # of the JSON of a call
MAX_DRAINED_BYTES = 256 << 20  # that are still read of a body that was refused
DRAIN_SECONDS = 20  # how long reading it may take
TOO_LARGE = f"the body has more than {MAX_CALL_BYTES} bytes"

Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class TooLarge(Exception):
    """A body has more bytes than are accepted."""


class Refused(Exception):
    """The request is answered with an HTTP status and one line instead."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class BoundedBody:
    """A `receive` that counts a body's bytes and knows whether all of them have arrived.

    `count_bytes`, if given, is called with the size of each part. Raises TooLarge for more than
    `max_bytes`.
    """

    def __init__(
        self, receive: Receive, max_bytes: int, count_bytes: Callable[[int], None] | None = None
    ) -> None:
        self._receive = receive
        self._left = max_bytes
        self._count_bytes = count_bytes
        self.is_complete = False

    async def __call__(self) -> dict:
        message = await self._receive()
        self.is_complete = message["type"] != "http.request" or not message.get("more_body")
        size = len(message.get("body", b""))
        self._left -= size
        if self._left < 0:
            raise TooLarge
        if self._count_bytes:
            self._count_bytes(size)
        return message

    async def drain(self) -> None:
        """Read and discard the rest, within limits.

        To a client that is still sending, an early answer looks like a broken connection.
        """
        self._left = MAX_DRAINED_BYTES
        self._count_bytes = None
        # Before Python 3.11 the two timeout errors are different classes.
        with suppress(TimeoutError, asyncio.TimeoutError, TooLarge):
            await asyncio.wait_for(self._read_rest(), DRAIN_SECONDS)

    async def _read_rest(self) -> None:
        while not self.is_complete:
            await self()


async def read_body(scope: dict, body: BoundedBody) -> bytes:
    """All of a request's body. Raises Refused if it is too large or breaks off."""
    length = dict(scope["headers"]).get(b"content-length", b"0")
    if length.isdigit() and int(length) > MAX_CALL_BYTES:
        raise Refused(413, TOO_LARGE)
    parts: list[bytes] = []
    try:
        while not body.is_complete:
            message = await body()
            if message["type"] != "http.request":
                raise Refused(400, "the request broke off")
            parts.append(message.get("body", b""))
    except TooLarge:
        raise Refused(413, TOO_LARGE) from None
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that returns this body first."""
    is_done = False

    async def receive_again() -> dict:
        nonlocal is_done
        if is_done:
            return await receive()
        is_done = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def header_values(scope: dict, name: bytes) -> list[str]:
    """All values of a request's header; `name` is in lower case."""
    return [value.decode("latin-1") for other, value in scope["headers"] if other == name]


def with_length(scope: dict, length: int) -> dict:
    """The scope of a request whose body now has another length."""
    replaced = (b"content-length", b"transfer-encoding")
    kept = [pair for pair in scope["headers"] if pair[0] not in replaced]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


class AnswerSender:
    """Wraps `send`: stops other sites from reading the answer, and tracks its begin and end."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False
        self.has_ended = False

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            message = {**message, "headers": _without_sharing(message.get("headers", []))}
        elif not message.get("more_body"):
            self.has_ended = True
        await self._send(message)

    async def refuse(self, refusal: Refused) -> None:
        """Answer with a status and {"detail": …, "error": …}, which Gradio's clients show.

        An answer that has already begun is only ended.
        """
        if self.has_ended:
            return
        if self.has_begun:
            await self({"type": "http.response.body", "body": b""})
            return
        body = json.dumps({"detail": str(refusal), "error": str(refusal)}).encode()
        length = str(len(body)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", length)]
        await self({"type": "http.response.start", "status": refusal.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})


def _without_sharing(headers: list[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers without those that allow other sites to read the answer."""
    return [pair for pair in headers if not pair[0].lower().startswith(b"access-control-")]
