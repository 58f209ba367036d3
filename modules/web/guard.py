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
    MAX_CALL_BYTES,
    AnswerSender,
    BoundedBody,
    Receive,
    Refused,
    Send,
    header_values,
    read_body,
    replay,
    with_length,
)
from modules.web.uploads import UploadFolder
from system.escaping import summarize_error

log = logging.getLogger(__name__)

READ_METHODS = ("GET", "HEAD")
API = "/gradio_api"
UPLOAD = f"{API}/upload"

# All paths that the page's own scripts and users of its API ask for. Other parts of Gradio
# (proxies, recordings, histories, monitoring, links to states, other ways to call) are not for
# visitors.
READ_PATHS = re.compile(
    rf"/|/config/?|/theme\.css|/favicon\.ico|/robots\.txt|/manifest\.json|/pwa_icon(/\d{{1,4}})?"
    rf"|/(assets|static|svelte)/[^\0]+|{API}/(info/?|openapi\.json|app_id/?|startup-events"
    rf"|upload_progress|theme\.css|heartbeat/[\w-]+|queue/status|user/?)"
)
POST_PATHS = re.compile(rf"{API}/(cancel|reset/?)")
CALL_PATHS = re.compile(rf"{API}/(?:(queue/join)|(call|run|api)/(\w+)/?)")
SESSION_PATH = re.compile(rf"{API}/queue/data")
EVENT_PATHS = re.compile(rf"{API}/call/(\w+)/([\w-]+)")
FILE_PATHS = re.compile(rf"{API}/file[=/](.*)", re.DOTALL)
PAGE_PATHS = ("/", "/config", "/config/")

SESSION_NAME = re.compile(r"[\w-]{1,100}")
MAX_PATH_LENGTH = 1000  # characters of a URL's path
MAX_PART_LENGTH = 200  # characters between two of its slashes

# Headers that Gradio trusts, which only a web server in front of this one should add.
TRUSTED_HEADERS = (b"x-forwarded-", b"x-gradio", b"x-direct")

NOTHING_HERE = "nothing is here"


class PendingAnswers(Protocol):
    """The answers that are still to come."""

    def has_session(self, name: str) -> bool:
        """Whether a session is waiting for answers."""

    def has_event(self, name: str) -> bool:
        """Whether the answer to a call is still to come, or to be fetched."""


class Guard:
    """An ASGI application around the page's: passes on what is safe, refuses the rest in one line.

    `hosts` are the names of the page itself, `proxy_hosts` those of a web server in front of it.
    """

    def __init__(
        self,
        app: Callable,
        hosts: frozenset[str],
        proxy_hosts: frozenset[str],
        uploads: UploadFolder,
        functions: Sequence[PageFunction],
        pending: PendingAnswers,
    ) -> None:
        self.app = app
        self.hosts = hosts | proxy_hosts
        self.proxy_hosts = proxy_hosts
        self.uploads = uploads
        self.pending = pending
        self.by_number = {function.number: function for function in functions}
        self.by_name = {function.name: function for function in functions if function.name}

    async def __call__(self, scope: dict, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        answer = AnswerSender(send)
        try:
            if scope["type"] != "http":
                raise Refused(404, NOTHING_HERE)
            self._check_host(scope)
            scope, receive = await self._check_request(self._drop_trusted_headers(scope), receive)
            await self.app(scope, receive, answer)
        except Refused as refusal:
            await answer.refuse(refusal)
        except asyncio.CancelledError:  # the server is stopping
            return
        except Exception as error:
            # An unforeseen error caused by a visitor is one log line too, not a traceback.
            route = f"{scope['method']} {scope['path'][:MAX_PART_LENGTH]}"
            log.warning("%s: %s: %s", route, type(error).__name__, summarize_error(error))
            await answer.refuse(Refused(500, "this request cannot be answered"))

    def _check_host(self, scope: dict) -> None:
        """Refuse a Host that is not one of the page's names, and data from another site's page."""
        given = header_values(scope, b"host")
        is_own_name = given and all(host_name(value) in self.hosts for value in given)
        if not is_own_name:
            reason = "this page is not served under that name (--allowed_hosts adds names)"
            raise Refused(421, reason)
        if scope["method"] in READ_METHODS:
            return
        origins = header_values(scope, b"origin")
        if not all(self._is_own_origin(origin, given[0]) for origin in origins):
            reason = "this request comes from another site's page (--allowed_hosts adds names)"
            raise Refused(403, reason)

    def _is_own_origin(self, origin: str, host: str) -> bool:
        """Whether a page of that origin came from this server, or from the one in front of it."""
        try:
            place = urlsplit(origin).netloc.lower()
        except ValueError:
            return False
        return place == host.strip().lower() or host_name(place) in self.proxy_hosts

    def _drop_trusted_headers(self, scope: dict) -> dict:
        """The scope without headers that Gradio trusts although a visitor may have made them up.

        For the page itself, the query is dropped too.
        """
        headers = [pair for pair in scope["headers"] if self._is_safe_header(*pair)]
        query = b"" if scope["path"] in PAGE_PATHS else scope["query_string"]
        return {**scope, "headers": headers, "query_string": query}

    def _is_safe_header(self, name: bytes, value: bytes) -> bool:
        if name == b"x-forwarded-host":
            return host_name(value.decode("latin-1")) in self.proxy_hosts
        if name == b"x-forwarded-proto":
            return value in (b"http", b"https")
        return name != b"range" and not name.startswith(TRUSTED_HEADERS)

    async def _check_request(self, scope: dict, receive: Receive) -> tuple[dict, Receive]:
        """What the application gets: a file's real path, or a rebuilt body of a call."""
        path = scope["path"]
        is_read = scope["method"] in READ_METHODS
        file = FILE_PATHS.fullmatch(path)
        if file and is_read:
            return self._with_real_path(scope, file.group(1)), receive
        longest = max(map(len, path.split("/")))
        if len(path) > MAX_PATH_LENGTH or longest > MAX_PART_LENGTH:
            raise Refused(404, NOTHING_HERE)
        if is_read:
            self._check_read_path(scope, path)
            return scope, receive
        if scope["method"] != "POST":
            raise Refused(405, "this method is not used here")
        if path == UPLOAD:
            return scope, receive
        return await self._check_post(scope, receive)

    async def _check_post(self, scope: dict, receive: Receive) -> tuple[dict, Receive]:
        path = scope["path"]
        call = CALL_PATHS.fullmatch(path)
        received = BoundedBody(receive, MAX_CALL_BYTES)
        try:
            if not call and not POST_PATHS.fullmatch(path):
                raise Refused(404, NOTHING_HERE)
            body = parse_call(await read_body(scope, received))
        except Refused:
            await received.drain()
            raise
        if call:
            join, way, name = call.groups()
            body = self._rebuild_call(body, join or way, name)
        content = json.dumps(body).encode()
        return with_length(scope, len(content)), replay(content, receive)

    def _check_read_path(self, scope: dict, path: str) -> None:
        """Raise Refused for a path that cannot be read, or an answer that nobody is waiting for."""
        if READ_PATHS.fullmatch(path):
            return
        event = EVENT_PATHS.fullmatch(path)
        if event and event.group(1) in self.by_name and self.pending.has_event(event.group(2)):
            return
        if SESSION_PATH.fullmatch(path):
            query = parse_qs(scope["query_string"].decode("latin-1"))
            sessions = query.get("session_hash", [])
            if len(sessions) == 1 and self.pending.has_session(sessions[0]):
                return
            raise Refused(404, "no session of that name is waiting for answers")
        raise Refused(404, NOTHING_HERE)

    def _with_real_path(self, scope: dict, name: str) -> dict:
        try:
            path = self.uploads.resolve(name)
            is_file = path.is_file()
        except (OSError, ValueError):  # PermissionError is an OSError
            raise Refused(403, "this file was not uploaded to this page") from None
        if not is_file:
            raise Refused(404, "this file is no longer on the server")
        real = f"{API}/file={path}"
        return {**scope, "path": real, "raw_path": quote(real).encode()}

    def _rebuild_call(self, body: Mapping[str, Any], way: str, name: str | None) -> dict[str, Any]:
        """A call rebuilt from the values that its function takes.

        `way` is queue/join, call, run or api. Raises Refused for a function that the page does not
        have, or for wrong values.
        """
        is_numbered = way == "queue/join" or (way != "call" and body.get("fn_index") is not None)
        if is_numbered:
            function = self._find_by_number(body.get("fn_index"))
        else:
            function = self.by_name.get(name)
        if function is None:
            raise Refused(404, "the page has no such function")
        if function.queued and way in ("run", "api"):
            raise Refused(404, "calls of this function wait in a queue: use call/ and its name")
        rebuilt: dict[str, Any] = {"data": self._check_data(function, body.get("data"))}
        session = body.get("session_hash")
        if session is not None:
            if not (isinstance(session, str) and SESSION_NAME.fullmatch(session)):
                raise Refused(422, "expected letters and digits as session_hash")
            rebuilt["session_hash"] = session
        elif way == "queue/join":
            raise Refused(400, "session_hash is missing")
        if is_numbered:
            trigger = body.get("trigger_id")
            rebuilt["fn_index"] = function.number
            rebuilt["trigger_id"] = trigger if type(trigger) is int else None
        return rebuilt

    def _find_by_number(self, number: object) -> PageFunction | None:
        is_int = type(number) is int  # a bool is not
        return self.by_number.get(number) if is_int else None

    def _check_data(self, function: PageFunction, data: object) -> list[Any]:
        if not isinstance(data, list) or len(data) != len(function.inputs):
            raise Refused(422, f"expected a list of {len(function.inputs)} values as data")
        pairs = zip(function.inputs, data, strict=True)
        return [one.check(value, self.uploads) for one, value in pairs]
