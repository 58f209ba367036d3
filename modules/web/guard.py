"""Checks every request before Gradio sees it: Host, route, size, and the values of a call.

Gradio checks only files that carry its own mark (`meta`), so a request without the mark reaches any
file of the server. Here every call is rebuilt from values that have been checked.
"""

import asyncio
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import parse_qs, quote, urlsplit

from modules.web.calls import PageFunction, parse_call
from modules.web.hosts import host_name
from modules.web.messages import (
    MOST_CALL_BYTES,
    Answer,
    Body,
    Receive,
    Refused,
    Send,
    header,
    read_body,
    replay,
    with_length,
)
from modules.web.uploads import UploadFolder
from system.files import error_line

log = logging.getLogger(__name__)

READING = ("GET", "HEAD")
API = "/gradio_api"
UPLOAD = f"{API}/upload"
# All that the page's own scripts ask for, and what its API's users call. Other parts of Gradio
# (proxies, recordings, histories, monitoring, links to states, other ways to call) are not for
# visitors.
READ = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d{{1,4}})?"
    rf"|/(assets|static|svelte)/[^\0]+|{API}/(info/?|openapi\.json|app_id/?|startup-events"
    rf"|upload_progress|theme\.css|heartbeat/[\w-]+|queue/status|user/?)"
)
WRITTEN = re.compile(rf"{API}/(cancel|reset/?)")
CALLS = re.compile(rf"{API}/(?:(queue/join)|(call|run|api)/(\w+)/?)")
SESSIONS = re.compile(rf"{API}/queue/data")
EVENTS = re.compile(rf"{API}/call/(\w+)/([\w-]+)")
SESSION = re.compile(r"[\w-]{1,100}")
FILES = re.compile(rf"{API}/file[=/](.*)", re.DOTALL)
LONGEST_PATH = 1000  # letters of an address' path
LONGEST_NAME = 200  # letters between two of its slashes
FORWARDED = b"x-forwarded-"  # what a web server before this one adds


class Streams(Protocol):
    """Which answers are to come."""

    def has_session(self, name: str) -> bool:
        """Whether a session waits for answers."""

    def has_event(self, name: str) -> bool:
        """Whether a call's answer is to come, or to be fetched."""


class Guard:
    """An ASGI application around the page's: passes on what is sound, refuses the rest in one line.

    `hosts` are the names that the page has, `others` those of them that a web server before it has.
    """

    def __init__(
        self,
        app: Callable,
        hosts: frozenset[str],
        others: frozenset[str],
        uploads: UploadFolder,
        functions: Sequence[PageFunction],
        streams: Streams,
    ) -> None:
        self.app = app
        self.hosts = hosts | others
        self.others = others
        self.uploads = uploads
        self.streams = streams
        self.by_number = {function.number: function for function in functions}
        self.by_name = {function.name: function for function in functions if function.name}

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = Answer(send)
        try:
            if scope["type"] != "http":
                raise Refused(404, "nothing is here")
            self._check_host(scope)
            scope, receive = await self._checked(self._with_sound_headers(scope), receive)
            await self.app(scope, receive, answer)
        except Refused as refusal:
            await answer.refuse(refusal)
        except asyncio.CancelledError:  # the server ends
            return
        except Exception as error:
            # A visitor's mistake that nobody foresaw is one line of the log, too, and no traceback.
            place = f"{scope['method']} {scope['path'][:LONGEST_NAME]}"
            log.warning("%s: %s: %s", place, type(error).__name__, error_line(error))
            await answer.refuse(Refused(500, "this request cannot be answered"))

    def _check_host(self, scope: dict) -> None:
        """Each Host header has to be a name of the page's, and what a page sends has to be ours."""
        given = header(scope, b"host")
        if not given or not all(host_name(value) in self.hosts for value in given):
            reason = "this page is not served under that name (--allowed_hosts adds names)"
            raise Refused(421, reason)
        if scope["method"] in READING:
            return
        if not all(self._is_ours(origin, given[0]) for origin in header(scope, b"origin")):
            raise Refused(403, "another site's page sends this (--allowed_hosts adds names)")

    def _is_ours(self, origin: str, host: str) -> bool:
        """Whether a page of that origin came from this server or from the one in front of it."""
        try:
            place = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return place == host.strip().lower() or host_name(place) in self.others

    def _with_sound_headers(self, scope: dict) -> dict:
        """Without what Gradio trusts and a visitor may invent: other names of the page, ranges."""
        headers = [pair for pair in scope["headers"] if self._is_sound(*pair)]
        query = b"" if scope["path"] in ("/", "/config", "/config/") else scope["query_string"]
        return {**scope, "headers": headers, "query_string": query}

    def _is_sound(self, name: bytes, value: bytes) -> bool:
        if name == b"x-forwarded-host":
            return host_name(value.decode("latin-1")) in self.others
        if name == b"x-forwarded-proto":
            return value in (b"http", b"https")
        return name != b"range" and not name.startswith((FORWARDED, b"x-gradio", b"x-direct"))

    async def _checked(self, scope: dict, receive: Receive) -> tuple[dict, Receive]:
        """What the application shall see: a file's real path, a call's body made anew."""
        path, reads = scope["path"], scope["method"] in READING
        named = FILES.fullmatch(path)
        if named and reads:
            return self._with_real_path(scope, named.group(1)), receive
        if len(path) > LONGEST_PATH or max(map(len, path.split("/"))) > LONGEST_NAME:
            raise Refused(404, "nothing is here")
        if reads:
            self._check_reading(scope, path)
            return scope, receive
        if scope["method"] != "POST":
            raise Refused(405, "this is not done here")
        if path == UPLOAD:
            return scope, receive
        call = CALLS.fullmatch(path)
        sent = Body(receive, MOST_CALL_BYTES)
        try:
            if not (call or WRITTEN.fullmatch(path)):
                raise Refused(404, "nothing is here")
            body = parse_call(await read_body(scope, sent))
        except Refused:
            await sent.drain()
            raise
        if call:
            body = self.sound_call(body, call.group(1) or call.group(2), call.group(3))
        content = json.dumps(body).encode()
        return with_length(scope, len(content)), replay(content, receive)

    def _check_reading(self, scope: dict, path: str) -> None:
        if READ.fullmatch(path):
            return
        event = EVENTS.fullmatch(path)
        if event and event.group(1) in self.by_name and self.streams.has_event(event.group(2)):
            return
        if SESSIONS.fullmatch(path):
            sessions = parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [])
            if len(sessions) == 1 and self.streams.has_session(sessions[0]):
                return
            raise Refused(404, "no session of that name waits for answers")
        raise Refused(404, "nothing is here")

    def _with_real_path(self, scope: dict, name: str) -> dict:
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
        if function.queued and how in ("run", "api"):
            raise Refused(404, "calls of this function wait in a queue: use call/ and its name")
        data = body.get("data")
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise Refused(422, f"data is expected to be a list of {len(function.inputs)} values")
        inputs = zip(function.inputs, data, strict=True)
        sound: dict[str, Any] = {
            "data": [kind.checked(value, self.uploads) for kind, value in inputs]
        }
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
