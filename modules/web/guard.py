"""What comes to the page's server, looked at before Gradio sees it: the name that was asked for, the
address, the size, and the values of a call, whose files have to be uploads.

Gradio looks at files alone that carry its own mark, so that a request without the mark reaches any file
of the server. Here a call is taken apart and made anew of what is known to be sound.
"""

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from modules.web.hosts import host_name
from modules.web.uploads import UploadFolder

MOST_CALL_BYTES = 1 << 20  # of the JSON of a call
TOO_LARGE = f"the body has more than {MOST_CALL_BYTES} bytes"
MOST_DRAINED = 256 << 20  # bytes that are read of a body that is not wanted
DRAIN_SECONDS = 20  # that this may take
API = "/gradio_api"
UPLOAD = f"{API}/upload"
# All that the page's own scripts ask for, and what its API's users call. Other parts of Gradio (proxies,
# recordings, histories, monitoring, links to states) are not for visitors of this page.
PLAIN_ROUTES = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d+)?"
    rf"|/(assets|static|svelte)/.*|{API}/(info/?|openapi\.json|app_id/?|startup-events|upload|upload_progress"
    rf"|theme\.css|heartbeat/[\w-]+|queue/(data|status|join)|cancel|reset/?|user/?)"
    rf"|{API}/call/\w+(/[\w-]+)?|{API}/(run|api)/\w+/?"
)
CALLS = re.compile(rf"{API}/(queue/join|call|run|api)(?:/(\w+))?/?")
STREAMS = re.compile(rf"{API}/(?:queue/data|call/\w+/([\w-]+))")
SESSION = re.compile(r"[\w-]{1,100}")
FILES = re.compile(rf"{API}/file[=/](.*)", re.DOTALL)
Receive = Callable[[], Awaitable[dict]]
Send = Callable[[dict], Awaitable[None]]


class TooLarge(Exception):
    """More of a body came than is read."""


class Refused(Exception):
    """What a visitor is told instead: a status of HTTP and one line."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


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
        if self.whole and value != int(value):
            raise Refused(422, "a whole number is expected")
        return value


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
        return {"path": str(path), "orig_name": name if isinstance(name, str) else None, "meta": meta}


@dataclass(frozen=True)
class PageFunction:
    """A function of the page: its number, the name that its API has, if any, and its inputs."""

    number: int
    name: str | None
    inputs: Sequence[Number | Picture]


class Guard:
    """An ASGI application around the page's: passes on what is sound, refuses the rest in one line.

    `is_stream` tells of a session's or a call's name whether answers to it are to come.
    """

    def __init__(self, app: Callable, hosts: frozenset[str], uploads: UploadFolder,
                 functions: Sequence[PageFunction], is_stream: Callable[[str], bool]) -> None:
        self.app = app
        self.hosts = hosts
        self.uploads = uploads
        self.is_stream = is_stream
        self.by_number = {function.number: function for function in functions}
        self.by_name = {function.name: function for function in functions if function.name}

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        try:
            if scope["type"] != "http":
                raise Refused(404, "nothing is here")
            self._check_host(scope)
            scope, receive = await self._checked(scope, receive)
        except Refused as refusal:
            await refuse(send, refusal)
            return
        await self.app(scope, receive, send)

    def _check_host(self, scope: dict) -> None:
        """Each Host header has to be a name of the page's, and so has the page that sends something."""
        given = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if not given or not all(host_name(value) in self.hosts for value in given):
            raise Refused(421, "this page is not served under that name (--allowed_hosts adds names)")
        if scope["method"] not in ("GET", "HEAD"):
            origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
            if not all(self._is_ours(origin) for origin in origins):
                raise Refused(403, "another site's page sends this (--allowed_hosts adds names)")

    def _is_ours(self, origin: str) -> bool:
        try:
            return host_name(urlsplit(origin).netloc) in self.hosts
        except ValueError:
            return False

    async def _checked(self, scope: dict, receive: Receive) -> tuple[dict, Receive]:
        """What the application shall see: a file's real path, a call's body made anew."""
        path = scope["path"]
        named = FILES.fullmatch(path)
        if named:
            return self._with_real_path(scope, named.group(1)), receive
        if not PLAIN_ROUTES.fullmatch(path):
            raise Refused(404, "nothing is here")
        stream = STREAMS.fullmatch(path)
        if stream and scope["method"] == "GET":
            query = parse_qs(scope["query_string"].decode("latin-1"))
            names = [stream.group(1)] if stream.group(1) else query.get("session_hash", [])
            if not (len(names) == 1 and self.is_stream(names[0])):
                raise Refused(404, "no call of that name is under way")
        if scope["method"] in ("GET", "HEAD") or path == UPLOAD:
            return scope, receive
        sent = Body(receive, MOST_CALL_BYTES)
        try:
            body = parse_call(await read_body(scope, sent))
        except Refused:
            await sent.drain()
            raise
        call = CALLS.fullmatch(path)
        if call:
            body = self.sound_call(body, call.group(1), call.group(2))
        content = json.dumps(body).encode()
        return with_length(scope, len(content)), replay(content, receive)

    def _with_real_path(self, scope: dict, name: str) -> dict:
        if scope["method"] not in ("GET", "HEAD"):
            raise Refused(405, "files are read only")
        try:
            path = self.uploads.resolve(name)
            is_file = path.is_file()
        except (OSError, ValueError):  # PermissionError is one of them
            raise Refused(403, "it was not uploaded to this page") from None
        if not is_file:
            raise Refused(404, "it is no longer on the server")
        real = f"{API}/file={path}"
        return {**scope, "path": real, "raw_path": quote(real).encode()}

    def sound_call(self, body: Mapping[str, Any], how: str, name: str | None) -> dict[str, Any]:
        """A call made anew of the values in it that its function takes. `how` is queue/join, call,
        run or api. Refused for what is no call of one of the page's functions."""
        by_number = how == "queue/join" or (how != "call" and body.get("fn_index") is not None)
        function = self._by_number(body.get("fn_index")) if by_number else self.by_name.get(name)
        if function is None:
            raise Refused(404, "the page has no such function")
        data = body.get("data")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise Refused(422, f"data is expected to be a list of {len(function.inputs)} values")
        inputs = zip(function.inputs, data, strict=True)
        sound: dict[str, Any] = {"data": [kind.checked(value, self.uploads) for kind, value in inputs]}
        session = body.get("session_hash")
        if session is not None:
            if not (isinstance(session, str) and SESSION.fullmatch(session)):
                raise Refused(422, "session_hash is expected to be letters and digits")
            sound["session_hash"] = session
        elif how == "queue/join":
            raise Refused(400, "session_hash is missing")
        if by_number:
            trigger = body.get("trigger_id")
            sound["fn_index"] = function.number
            sound["trigger_id"] = trigger if type(trigger) is int else None
        return sound

    def _by_number(self, number: object) -> PageFunction | None:
        return self.by_number.get(number) if type(number) is int else None


def parse_call(content: bytes) -> dict:
    """A call's JSON object. Refused for what is none."""
    try:
        body = json.loads(content, parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is not JSON") from None
    if not isinstance(body, dict):
        raise Refused(422, "the body is expected to be a JSON object")
    return body


def _no_number(text: str) -> float:
    raise ValueError(text)


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


class Body:
    """A `receive` that knows how much of a body has come, and whether all of it has."""

    def __init__(self, receive: Receive, most: int) -> None:
        self._receive = receive
        self._left = most
        self.is_read = False

    async def __call__(self) -> dict:
        message = await self._receive()
        self.is_read = message["type"] != "http.request" or not message.get("more_body")
        self._left -= len(message.get("body", b""))
        if self._left < 0:
            raise TooLarge
        return message

    async def drain(self) -> None:
        """Read the rest, which is not wanted, within limits: a client that is still sending would take
        an early answer for a broken connection."""
        self._left = MOST_DRAINED
        with suppress(TimeoutError, asyncio.TimeoutError, TooLarge):  # two timeouts before Python 3.11
            await asyncio.wait_for(self._read_on(), DRAIN_SECONDS)

    async def _read_on(self) -> None:
        while not self.is_read:
            await self()


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


def with_length(scope: dict, length: int) -> dict:
    """The scope of a request whose body has another length now."""
    headers = [pair for pair in scope["headers"] if pair[0] not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*headers, (b"content-length", str(length).encode())]}


async def refuse(send: Send, refusal: Refused) -> None:
    """Answer with a status and {"detail": …, "error": …}, which Gradio's clients show."""
    body = json.dumps({"detail": str(refusal), "error": str(refusal)}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
