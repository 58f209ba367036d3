"""Local servers instead of the real ones: a web site that breaks off, S3 and Google Drive."""

import gzip
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest


@dataclass
class Site:
    """What a web server gives, and what it was asked for."""

    files: dict[str, bytes]
    url: str = ""
    # name → the bytes after which each of the next answers breaks off
    broken: dict[str, list[int]] = field(default_factory=dict)
    busy: dict[str, int] = field(default_factory=dict)  # name → how often it answers 503 first
    ranges: bool = True
    tags: bool = True
    zipped: bool = False  # it sends gzip, asked for or not
    # name and Range of each request
    asked: list[tuple[str, str | None]] = field(default_factory=list)

    def tag(self, name: str) -> str:
        return f'"{hash(self.files[name]) & 0xFFFF:x}"'


class WebHandler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        name = self.path.partition("?")[0].lstrip("/")
        self.site.asked.append((name, self.headers.get("Range")))
        if self.site.busy.get(name, 0) > 0:
            self.site.busy[name] -= 1
            self._send(503, b"later")
        elif name not in self.site.files:
            self._send(404, b"none")
        else:
            self._send_file(name)

    def _send_file(self, name: str) -> None:
        body = self.site.files[name]
        head = {"ETag": self.site.tag(name)} if self.site.tags else {}
        start = self._requested_start(name)
        if start is not None and start >= len(body):
            self._send(416, b"", {**head, "Content-Range": f"bytes */{len(body)}"})
            return
        if self.site.zipped:
            self._send(200, gzip.compress(body), {**head, "Content-Encoding": "gzip"})
            return
        breaks = self.site.broken.get(name)
        end = breaks.pop(0) if breaks else len(body)
        if start:
            head["Content-Range"] = f"bytes {start}-{len(body) - 1}/{len(body)}"
            self._send(206, body[start : max(start, end)], head, len(body) - start)
        else:
            self._send(200, body[:end], head, len(body))

    def _requested_start(self, name: str) -> int | None:
        """The first byte that a request to resume asks for; None if the whole file is sent."""
        requested = self.headers.get("Range")
        tag = self.site.tag(name)
        if not requested or not self.site.ranges or self.headers.get("If-Range", tag) != tag:
            return None
        return int(requested.removeprefix("bytes=").rstrip("-"))

    def _send(
        self, code: int, body: bytes, head: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        """`length` is the announced one, where the answer breaks off before it."""
        is_page = body.startswith(b"<")
        head = {
            **(head or {}),
            "Content-Length": str(len(body) if length is None else length),
            "Content-Type": "text/html" if is_page else "application/octet-stream",
        }
        self.send_response(code)
        for name, value in head.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def serving(
    handler: type[WebHandler], site: Site, tls: ssl.SSLContext | None = None
) -> Iterator[int]:
    """The port of a server of `site` on 127.0.0.1, which runs while the block does."""
    bound = type("Handler", (handler,), {"site": site})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), bound) as server:
        if tls:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # clients hang up on purpose
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def web_site(files: dict[str, bytes]) -> Iterator[Site]:
    """A server of these files while the block runs."""
    site = Site(files)
    with serving(WebHandler, site) as port:
        site.url = f"http://127.0.0.1:{port}"
        yield site


@contextmanager
def s3(monkeypatch: pytest.MonkeyPatch, bucket: str) -> Iterator:
    """A local S3 with one bucket, which the usual AWS variables lead to; yields a client."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    try:
        yield client
    finally:
        server.stop()


@dataclass
class Drive(Site):
    """Google Drive and the annotations' site, as far as `gdown` and `requests` see them."""

    names: dict[str, str] = field(default_factory=dict)  # id → file name
    folders: dict[str, list[str]] = field(default_factory=dict)  # id → ids of its files
    exhausted: set[str] = field(default_factory=set)  # ids whose quota is spent


QUOTA = (
    "<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body>"
    '<p class="uc-error-subcaption">Too many users have viewed or downloaded this file recently. '
    "Please try accessing the file again later.</p></body></html>"
)


class _DriveHandler(WebHandler):
    site: Drive

    def do_GET(self) -> None:
        place = urlsplit(self.path)
        item = dict(parse_qsl(place.query)).get("id", "")
        route = (self.headers["Host"], place.path)
        if route == ("drive.google.com", "/embeddedfolderview") and item in self.site.folders:
            self._send_folder(item)
        elif route == ("drive.google.com", "/uc") and item in self.site.files:
            self._send_form(item)
        elif route[0] == "drive.usercontent.google.com":
            self.path = f"/{item}"
            super().do_GET()
        elif route[0] == "raw.githubusercontent.com":
            super().do_GET()
        else:
            self._send(404, b"none")

    def _send_folder(self, item: str) -> None:
        links = []
        for file in self.site.folders[item]:
            url = f"https://drive.google.com/file/d/{file}/view?usp=drive_web"
            links.append(f'<a href="{url}">{self.site.names[file]}</a>')
        head = "<head><title>weights</title></head>"
        self._send(200, f"<html>{head}<body>{''.join(links)}</body></html>".encode())

    def _send_form(self, item: str) -> None:
        """The page between a link and its file: it warns that the file was not scanned."""
        form = (
            '<html><body><form id="download-form" '
            'action="https://drive.usercontent.google.com/download" method="get">'
            f'<input type="hidden" name="id" value="{item}">'
            '<input type="hidden" name="confirm" value="t"></form></body></html>'
        )
        self._send(200, (QUOTA if item in self.site.exhausted else form).encode())

    def _send(
        self, code: int, body: bytes, head: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        head = dict(head or {})
        name = self.site.names.get(self.path.lstrip("/"))
        if name:
            head["Content-Disposition"] = f'attachment; filename="{name}"'
        super()._send(code, body, head, length)


@contextmanager
def google_drive(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Drive]:
    """A server with TLS to which all connections of this process lead while the block runs."""
    import trustme
    import urllib3.connection
    from urllib3.util.connection import create_connection

    hosts = ("drive.google.com", "drive.usercontent.google.com", "raw.githubusercontent.com")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*hosts).configure_cert(context)
    authority.cert_pem.write_to_path(folder / "authority.pem")
    site = Drive({})
    with serving(_DriveHandler, site, context) as port:
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "authority.pem"))
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)

        def connect_here(_: object, *args: Any, **more: Any) -> socket.socket:
            return create_connection(("127.0.0.1", port), *args, **more)

        monkeypatch.setattr(urllib3.connection.connection, "create_connection", connect_here)
        yield site
