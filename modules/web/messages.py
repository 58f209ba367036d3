"""ASGI requests and responses of the page's server: bounded bodies, changed headers, refusals."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import suppress

MOST_CALL_BYTES = 1 << 20  # of the JSON of a call
TOO_LARGE = f"the body has more than {MOST_CALL_BYTES} bytes"
MOST_DRAINED = 256 << 20  # bytes that are read of a body that is not wanted
DRAIN_SECONDS = 20  # that this may take
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class TooLarge(Exception):
    """More of a body came than is read."""


class Refused(Exception):
    """What a visitor is told instead: a status of HTTP and one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class Body:
    """A `receive` that counts a body's bytes and knows whether all of them have come.

    `arrived`, if given, is called with the size of each part.
    """

    def __init__(
        self, receive: Receive, most: int, arrived: Callable[[int], None] | None = None
    ) -> None:
        self._receive = receive
        self._left = most
        self._arrived = arrived
        self.is_read = False

    async def __call__(self) -> dict:
        message = await self._receive()
        self.is_read = message["type"] != "http.request" or not message.get("more_body")
        size = len(message.get("body", b""))
        self._left -= size
        if self._left < 0:
            raise TooLarge
        if self._arrived:
            self._arrived(size)
        return message

    async def drain(self) -> None:
        """Read and discard the rest, within limits.

        A client that is still sending takes an early answer for a broken connection.
        """
        self._left, self._arrived = MOST_DRAINED, None
        # Before Python 3.11 the two timeouts are two classes.
        with suppress(TimeoutError, asyncio.TimeoutError, TooLarge):
            await asyncio.wait_for(self._read_on(), DRAIN_SECONDS)

    async def _read_on(self) -> None:
        while not self.is_read:
            await self()


async def read_body(scope: dict, body: "Body") -> bytes:
    """All of a request's body. Refused for one that is too large, or breaks off."""
    told = dict(scope["headers"]).get(b"content-length", b"0")
    if told.isdigit() and int(told) > MOST_CALL_BYTES:
        raise Refused(413, TOO_LARGE)
    parts: list[bytes] = []
    try:
        while not body.is_read:
            message = await body()
            if message["type"] != "http.request":
                raise Refused(400, "the request broke off")
            parts.append(message.get("body", b""))
    except TooLarge:
        raise Refused(413, TOO_LARGE) from None
    return b"".join(parts)


def replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives this body first."""
    is_given = False

    async def receive_again() -> dict:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again


def header(scope: dict, wanted: bytes) -> list[str]:
    """All values of a request's header."""
    return [value.decode("latin-1") for name, value in scope["headers"] if name == wanted]


def with_length(scope: dict, length: int) -> dict:
    """The scope of a request whose body has another length now."""
    replaced = (b"content-length", b"transfer-encoding")
    kept = [pair for pair in scope["headers"] if pair[0] not in replaced]
    return {**scope, "headers": [*kept, (b"content-length", str(length).encode())]}


class Answer:
    """A `send` that lets no other site read what it sends, and knows whether it has begun."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_begun = False
        self.has_ended = False

    async def __call__(self, message: dict) -> None:
        if message["type"] == "http.response.start":
            self.has_begun = True
            headers = message.get("headers", [])
            kept = [pair for pair in headers if not pair[0].lower().startswith(b"access-control-")]
            message = {**message, "headers": kept}
        elif not message.get("more_body"):
            self.has_ended = True
        await self._send(message)

    async def refuse(self, refusal: Refused) -> None:
        """Answer with a status and {"detail": …, "error": …}, which Gradio's clients show.

        An answer that has begun is only ended.
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
