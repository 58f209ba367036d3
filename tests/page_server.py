"""The page's server for tests: app.py in a process of its own, and requests to it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests import quick_python
from tests.conftest import ROOT
from tests.runs import free_port

EXAMPLES = ROOT / "docs" / "examples"
CAPTIONS = json.loads((EXAMPLES / "captions.json").read_text())
SECONDS = 120  # that anything may take on a busy machine
SETTINGS = [1, 0, 1, 1, 0.9, 42]  # the page's own, in the order of its inputs
FILE_DATA = {"_type": "gradio.FileData"}


@contextmanager
def running_server(
    files: Path, *options: str, interrupt: bool = False
) -> Iterator[tuple[subprocess.Popen, str]]:
    """A server's process and its URL; visitors' uploads are in `files`.

    It is ended by SIGTERM, or as by Ctrl-C with `interrupt`. Its log must not hold a traceback, and
    nothing of visitors may be left, unless it was killed.
    """
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    files.mkdir(exist_ok=True)
    log = files.with_name(f"{files.name}.log")
    port = free_port()
    command = [quick_python.executable(), "app.py", "--port", str(port), *options]
    environment = {**os.environ, "TMPDIR": str(files)}
    with open(log, "wb") as errors:
        server = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=errors, env=environment
        )
    url = f"http://127.0.0.1:{port}/"
    try:
        wait_for_page(url, server, log)
        yield server, url
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT if interrupt else signal.SIGTERM)
        server.wait(20)
    assert "Traceback" not in log.read_text()
    if server.returncode != -signal.SIGKILL:
        assert server.returncode == (130 if interrupt else 0)
        assert list(files.rglob("clip4idc-page-*")) == []


def wait_for_page(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(SECONDS * 5):
        assert server.poll() is None, f"app.py ended: {log.read_text()}"
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the page does not answer")


@contextmanager
def running_page(files: Path) -> Iterator[str]:
    """The URL of a server that must still run at the end of the block."""
    with running_server(files) as (server, url):
        yield url
        assert server.poll() is None, "the server has ended"


def request(
    url: str, content: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    """Status and body of the answer to GET, or to POST with content."""
    asked = urllib.request.Request(url, content, headers or {})
    try:
        with urllib.request.urlopen(asked, timeout=SECONDS) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def call(url: str, route: str, body: object) -> tuple[int, str]:
    """Post JSON, or bytes as they are; returns status and body of the answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(f"{url}gradio_api/{route}", content, {"Content-Type": "application/json"})


def form(name: str, content: bytes, files: int = 1) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form with so many files of this name and content."""
    head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    part = head.encode() + content + b"\r\n"
    return part * files + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def upload(url: str, path: Path) -> str:
    """Upload a file as the page does; returns its path on the server."""
    status, answer = request(f"{url}gradio_api/upload", *form(path.name, path.read_bytes()))
    assert status == 200, answer
    [stored] = json.loads(answer)
    return stored


def upload_examples(url: str, name: str) -> list[str]:
    """Upload both pictures of an example pair."""
    return [upload(url, EXAMPLES / f"{name}_{side}.png") for side in ("before", "after")]


def caption_events(url: str, before: str, after: str) -> str:
    """Caption two uploads; returns the events that Gradio sends."""
    pictures = [{"path": path, "meta": FILE_DATA} for path in (before, after)]
    status, answer = call(url, "call/caption", {"data": [*pictures, *SETTINGS]})
    assert status == 200, answer
    event = json.loads(answer)["event_id"]
    return request(f"{url}gradio_api/call/caption/{event}")[1]


def host_and_port(url: str) -> tuple[str, int]:
    host, _, port = url.removeprefix("http://").rstrip("/").partition(":")
    return host, int(port)


def send_raw(url: str, content: bytes, size: int = 100) -> bytes:
    """The first bytes of the answer to bytes as they are."""
    with socket.create_connection(host_and_port(url), timeout=10) as visitor:
        visitor.sendall(content)
        return visitor.recv(size)


def send_lines(url: str, first: str, *headers: str, size: int = 100) -> str:
    """The first bytes of the answer to a request of these lines."""
    host = ":".join(map(str, host_and_port(url)))
    has_host = any(line.lower().startswith("host:") for line in headers)
    own_host = [] if has_host else [f"Host: {host}"]
    lines = [first, *own_host, *headers, "Connection: close", "", ""]
    return send_raw(url, "\r\n".join(lines).encode("latin-1"), size).decode("latin-1")


def copy_example(name: str, folder: Path) -> Path:
    return Path(shutil.copy(EXAMPLES / name, folder / name))
