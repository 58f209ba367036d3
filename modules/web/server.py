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
from modules.web.messages import BoundedBody, Refused, TooLarge
from modules.web.uploads import NoRoom, UploadFolder

MAX_FILES = 2  # of one upload
MAX_FIELDS = 8
MAX_FIELD_BYTES = 1 << 16  # of a field that is not a file
FORM_BYTES = 1 << 16  # of a form besides its files
UPLOAD_SECONDS = 300  # how long an upload may take
MAX_SEED = 2**53 - 1  # the largest whole number that JavaScript represents exactly
STOP_SECONDS = 2  # that open connections get when the server is asked to stop

FORM_TYPE = re.compile(rb'^multipart/form-data *;.*?boundary="?([^";,\s]{1,200})', re.IGNORECASE)


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises OSError naming host and port if that is not possible."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        both = family == socket.AF_INET6 and host == "::" and socket.has_dualstack_ipv6()
        return socket.create_server(address[:2], family=family, dualstack_ipv6=both)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        reason = reason.partition(" (while attempting")[0]  # it repeats the address
        raise OSError(
            f"cannot listen on {host}, port {port}: {reason}; --port chooses another"
        ) from None


def url_of(host: str, port: int) -> str:
    """What to open in a browser on this machine."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def build_application(
    page: Any,
    css: str,
    js: str,
    uploads: UploadFolder,
    hosts: frozenset[str],
    proxy_hosts: frozenset[str],
    file_bytes: int,
) -> Guard:
    """The ASGI application that visitors reach.

    `page` is a Gradio Blocks, `css` and `js` are its own look and script, `file_bytes` is the
    largest size of an upload; hosts as in Guard.
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
        js=js,
        theme=_theme(),
        max_file_size=file_bytes,
        show_error=False,
        allowed_paths=[],
        footer_links=["api"],
        ssr_mode=False,
    )
    # Its warnings say only that a visitor's form is malformed.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    page.has_launched = True  # otherwise Gradio does not check files itself
    return Guard(inner, hosts, proxy_hosts, uploads, functions_of(page), QueuedAnswers(page._queue))


def _theme() -> Any:
    """Gradio's own theme, with colors that differ enough to be read."""
    import gradio as gr

    return gr.themes.Default(primary_hue="blue").set(
        body_text_color_subdued="*neutral_600",
        block_info_text_color="*neutral_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
    )


class QueuedAnswers:
    """Which answers are still to come, as Gradio's queue knows it.

    The queue itself fails if it is asked for sessions and calls that it does not have.
    """

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def has_session(self, name: str) -> bool:
        """Whether messages for a session are still to come."""
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
    if isinstance(block, gr.Number):
        return Number(0, MAX_SEED, whole=True, optional=True)
    raise TypeError(f"the guard has no check for this input of the page: {type(block).__name__}")


async def receive_upload(request: Any, uploads: UploadFolder, file_bytes: int) -> Any:
    """Store a form's `files` and answer with their paths, as Gradio's own upload route does.

    An upload that breaks off leaves nothing.
    """
    from starlette.responses import JSONResponse, PlainTextResponse

    with uploads.count_arriving_bytes() as add_bytes:
        body = BoundedBody(request.receive, max_form_bytes(file_bytes), add_bytes)
        try:
            storing = _store(request, body, uploads, file_bytes)
            paths = await asyncio.wait_for(storing, UPLOAD_SECONDS)
            return JSONResponse([str(path) for path in paths])
        except Refused as refusal:
            answer = PlainTextResponse(str(refusal), refusal.status)
        except (TimeoutError, asyncio.TimeoutError):  # two classes before Python 3.11
            answer = PlainTextResponse("the upload took too long", 408)
    if answer.status_code in (400, 413):
        await body.drain()
    return answer


def max_form_bytes(file_bytes: int) -> int:
    """The largest size of a whole form whose files may have `file_bytes` each."""
    return MAX_FILES * file_bytes + FORM_BYTES


def with_plain_form(scope: dict) -> dict:
    """The scope of a form without its charset, so that its strings are read as UTF-8.

    Python decodes some charsets, such as punycode, in time that grows with the length's square.
    Raises Refused for a request that is not a form.
    """
    types = [value for name, value in scope["headers"] if name == b"content-type"]
    form = FORM_TYPE.match(types[0]) if types else None
    if form is None:
        raise Refused(400, "expected a form with files")
    others = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
    plain_type = b"multipart/form-data; boundary=" + form.group(1)
    return {**scope, "headers": [*others, (b"content-type", plain_type)]}


async def _store(
    request: Any, body: BoundedBody, uploads: UploadFolder, file_bytes: int
) -> list[Path]:
    """Write a form's files and return their paths. Raises Refused for what cannot be stored."""
    from starlette.exceptions import HTTPException
    from starlette.formparsers import MultiPartException
    from starlette.requests import ClientDisconnect, Request

    length = request.headers.get("content-length", "")
    announced = int(length) if length.isascii() and length.isdigit() else 0
    if announced > max_form_bytes(file_bytes):
        raise _too_large(file_bytes)
    plain = Request(with_plain_form(request.scope), body)
    limits = {
        "max_files": MAX_FILES,
        "max_fields": MAX_FIELDS,
        "max_part_size": MAX_FIELD_BYTES,
    }
    try:
        async with plain.form(**limits) as form:
            files = [value for value in form.getlist("files") if not isinstance(value, str)]
            _check_sizes([file.size or 0 for file in files], uploads, file_bytes)
            return await _store_files(files, uploads)
    except NoRoom as error:
        raise Refused(503, f"{error}: try again in a while") from None
    except TooLarge:
        raise _too_large(file_bytes) from None
    except ClientDisconnect:
        raise Refused(400, "the upload broke off") from None
    except (MultiPartException, HTTPException, AssertionError, LookupError, ValueError):
        raise Refused(400, "the form cannot be read") from None
    except OSError:
        raise Refused(507, "the server cannot keep the upload at the moment") from None


def _too_large(file_bytes: int) -> Refused:
    return Refused(413, f"a file may be at most {file_bytes // 2**20} MB")


def _check_sizes(sizes: list[int], uploads: UploadFolder, file_bytes: int) -> None:
    if not sizes:
        raise Refused(400, "expected a form with files")
    if max(sizes) > file_bytes:
        raise _too_large(file_bytes)
    if sum(sizes) > uploads.max_bytes:
        reason = f"all uploads together may take at most {uploads.max_bytes} bytes (--upload_space)"
        raise Refused(413, reason)


async def _store_files(files: list[Any], uploads: UploadFolder) -> list[Path]:
    from starlette.concurrency import run_in_threadpool

    await run_in_threadpool(uploads.sweep)
    paths = []
    for file in files:
        paths.append(await run_in_threadpool(uploads.store, file.filename or "", file.file))
    return paths


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """In this block, SIGTERM and a closed terminal end the process with exit code 0.

    Services are stopped in this way. `finally` blocks run, and a second signal does not interrupt
    them.
    """
    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    previous = {name: signal.getsignal(getattr(signal, name)) for name in names}

    def stop(number: int, frame: FrameType | None) -> None:
        for name in (*names, "SIGINT"):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
        raise SystemExit(0)

    for name in names:
        signal.signal(getattr(signal, name), stop)
    try:
        yield
    finally:
        for name, handler in previous.items():
            signal.signal(getattr(signal, name), handler)


def run_server(application: Guard, listening: socket.socket) -> None:
    """Serve until a signal arrives."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="warning",
        timeout_graceful_shutdown=STOP_SECONDS,
        ws="none",
        server_header=False,
        proxy_headers=False,
        access_log=False,
    )
    uvicorn.Server(config).run(sockets=[listening])
