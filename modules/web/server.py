"""The page's server: Gradio behind the guard, with our own upload route, on one socket."""

import asyncio
import logging
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from modules.web.calls import Number, PageFunction, Picture
from modules.web.guard import UPLOAD, Guard
from modules.web.messages import Body, Refused, TooLarge
from modules.web.uploads import NoRoom, UploadFolder

MOST_FILES, MOST_FIELDS = 2, 8  # of one upload
LONGEST_FIELD = 1 << 16  # bytes of a field that is no file
SLACK = 1 << 16  # bytes of an upload beside its files
UPLOAD_SECONDS = 300  # that an upload may take
LARGEST_SEED = 2**53 - 1  # the largest whole number that a browser's script knows to be one
GRACE = 2  # seconds that open connections have when the server is told to end


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; OSError in one line where it cannot be had."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OSError(f"cannot listen on {host}, port {port}: {reason}") from None


def address_of(host: str, port: int) -> str:
    """What a browser on this machine opens."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def build_application(
    page: Any,
    css: str,
    uploads: UploadFolder,
    hosts: frozenset[str],
    others: frozenset[str],
    file_bytes: int,
) -> Guard:
    """The ASGI application that visitors reach.

    `page` is Gradio's Blocks, `file_bytes` the size that an upload may have; hosts as in Guard.
    """
    import gradio as gr
    from fastapi import FastAPI
    from starlette.requests import Request
    from starlette.responses import Response

    inner = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)

    async def upload(request: Request) -> Response:
        return await receive_upload(request, uploads, file_bytes)

    inner.add_route(UPLOAD, upload, methods=["POST"])
    gr.mount_gradio_app(
        inner,
        page,
        path="/",
        css=css,
        max_file_size=file_bytes,
        show_error=False,
        allowed_paths=[],
        footer_links=["api"],
        ssr_mode=False,
    )
    # Its warnings say only that a visitor's form is malformed.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    page.has_launched = True  # else Gradio's own check of files is off
    return Guard(inner, hosts, others, uploads, functions_of(page), QueueStreams(page._queue))


class QueueStreams:
    """Which answers are to come, by Gradio's queue, which fails where it is asked for others."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def has_session(self, name: str) -> bool:
        """Whether a session has messages to come."""
        return name in self._queue.pending_messages_per_session

    def has_event(self, name: str) -> bool:
        """Whether a call belongs to such a session."""
        event = self._queue.event_ids_to_events.get(name)
        if event is not None:
            return self.has_session(event.session_hash)
        calls = self._queue.pending_event_ids_session.items()
        return any(name in names and self.has_session(session) for session, names in calls)


def functions_of(page: Any) -> list[PageFunction]:
    """The functions of a Gradio page that run on the server, and what each takes."""
    functions = []
    for function in page.fns.values():
        if function.fn is None:
            continue
        name = function.api_name if isinstance(function.api_name, str) else None
        inputs = [_input_of(block) for block in function.inputs]
        functions.append(PageFunction(function._id, name, inputs, queued=bool(function.queue)))
    return functions


def _input_of(block: Any) -> Number | Picture:
    import gradio as gr

    if isinstance(block, gr.Image):
        return Picture()
    if isinstance(block, gr.Slider):
        return Number(block.minimum, block.maximum, whole=block.step == 1)
    if isinstance(block, gr.Dataset):
        return Number(0, len(block.samples) - 1, whole=True)
    if isinstance(block, gr.Number):
        return Number(0, LARGEST_SEED, whole=True, optional=True)
    raise TypeError(
        f"the page has an input of a kind that the guard does not know: {type(block).__name__}"
    )


async def receive_upload(request: Any, uploads: UploadFolder, file_bytes: int) -> Any:
    """Store a form's `files` and answer with their paths, as Gradio's own upload does.

    An upload that breaks off leaves nothing.
    """
    from starlette.responses import JSONResponse, PlainTextResponse

    with uploads.arriving() as arrived:
        body = Body(request.receive, most_bytes(file_bytes), arrived)
        try:
            stored = _store(request, body, uploads, file_bytes)
            paths = await asyncio.wait_for(stored, UPLOAD_SECONDS)
            return JSONResponse([str(path) for path in paths])
        except Refused as refusal:
            answer = PlainTextResponse(str(refusal), refusal.status)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            answer = PlainTextResponse("the upload takes too long", 408)
    if answer.status_code in (400, 413):
        await body.drain()
    return answer


def most_bytes(file_bytes: int) -> int:
    """Of one request's whole form."""
    return MOST_FILES * file_bytes + SLACK


def with_plain_form(scope: dict) -> dict:
    """The scope of a form with its charset left out, so that its texts are read as UTF-8.

    Python decodes some charsets, such as punycode, in time that grows with the square of the text.
    Raises Refused for what is no form.
    """
    told = next((value for name, value in scope["headers"] if name == b"content-type"), b"")
    boundary = re.search(
        rb'^multipart/form-data *;.*?boundary="?([^";,\s]{1,200})', told, re.IGNORECASE
    )
    if boundary is None:
        raise Refused(400, "a form with files is expected")
    others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
    kind = (b"content-type", b"multipart/form-data; boundary=" + boundary.group(1))
    return {**scope, "headers": [*others, kind]}


async def _store(request: Any, body: Body, uploads: UploadFolder, file_bytes: int) -> list[Path]:
    """Write a form's files; returns their paths. Raises Refused for no form and for too much."""
    from starlette.concurrency import run_in_threadpool
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException
    from starlette.requests import ClientDisconnect, Request

    told = request.headers.get("content-length", "")
    expected = int(told) if told.isascii() and told.isdigit() else 0
    too_large = Refused(413, f"a file may have {file_bytes // 2**20} MB")
    if expected > most_bytes(file_bytes):
        raise too_large
    sound = Request(with_plain_form(request.scope), body)
    limits_of_form = {
        "max_files": MOST_FILES,
        "max_fields": MOST_FIELDS,
        "max_part_size": LONGEST_FIELD,
    }
    try:
        async with sound.form(**limits_of_form) as form:
            files = [value for value in form.getlist("files") if not isinstance(value, str)]
            if not files:
                raise Refused(400, "a form with files is expected")
            if any((file.size or 0) > file_bytes for file in files):
                raise too_large
            if sum(file.size or 0 for file in files) > uploads.max_bytes:
                reason = f"all uploads together may have {uploads.max_bytes} bytes (--upload_space)"
                raise Refused(413, reason)
            await run_in_threadpool(uploads.sweep)
            return [
                await run_in_threadpool(uploads.store, one.filename or "", one.file)
                for one in files
            ]
    except NoRoom as error:
        raise Refused(503, f"{error}: try again in a while") from None
    except TooLarge:
        raise too_large from None
    except ClientDisconnect:
        raise Refused(400, "the upload broke off") from None
    except (MultiPartException, HTTPException, AssertionError, LookupError, ValueError):
        raise Refused(400, "the form cannot be read") from None
    except OSError:
        raise Refused(507, "the server cannot keep the upload at the moment") from None


@contextmanager
def ending_on_signals() -> Iterator[None]:
    """Inside, SIGTERM and a closed terminal end the process through its `finally` blocks, with exit
    code 0: it is how services are stopped. A second signal does not break into that."""
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    before = {name: signal.getsignal(getattr(signal, name)) for name in names}

    def end(number: int, frame: FrameType | None) -> None:
        for name in (*names, "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise SystemExit(0)

    for name in names:
        signal.signal(getattr(signal, name), end)
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def run_server(application: Guard, listening: socket.socket) -> None:
    """Serve until a signal comes."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="warning",
        timeout_graceful_shutdown=GRACE,
        ws="none",
        server_header=False,
        proxy_headers=False,
        access_log=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
