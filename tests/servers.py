"""Local stand-ins for the servers that files come from: a web server that breaks off, and S3."""

import gzip
import http.server
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import pytest


@dataclass
class Site:
    """What a web server gives, and what it was asked for."""

    files: dict[str, bytes]
    address: str = ""
    broken: dict[str, list[int]] = field(
        default_factory=dict
    )  # name → bytes after which each next answer to it breaks off
    busy: dict[str, int] = field(default_factory=dict)  # name → how often it answers 503 first
    ranges: bool = True
    tags: bool = True
    zipped: bool = False  # it sends gzip, asked for or not
    asked: list[tuple[str, str | None]] = field(
        default_factory=list
    )  # name and Range of each request

    def tag(self, name: str) -> str:
        return f'"{hash(self.files[name]) & 0xFFFF:x}"'


class _Handler(http.server.BaseHTTPRequestHandler):
    site: Site

    def do_GET(self) -> None:
        site, name = self.site, self.path.partition("?")[0].lstrip("/")
        site.asked.append((name, self.headers.get("Range")))
        if site.busy.get(name, 0) > 0:
            site.busy[name] -= 1
            return self._send(503, b"later")
        if name not in site.files:
            return self._send(404, b"none")
        body, start = site.files[name], 0
        tag = {"ETag": site.tag(name)} if site.tags else {}
        asked = self.headers.get("Range")
        if asked and site.ranges and self.headers.get("If-Range", site.tag(name)) == site.tag(name):
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(body):
                return self._send(416, b"", {"Content-Range": f"bytes */{len(body)}"} | tag)
        if site.zipped:
            return self._send(200, gzip.compress(body), {"Content-Encoding": "gzip"} | tag)
        until = site.broken[name].pop(0) if site.broken.get(name) else len(body)
        head = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        return self._send(
            206 if start else 200,
            body[start : max(start, until)],
            head | tag,
            length=len(body) - start,
        )

    def _send(
        self, code: int, body: bytes, head: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(code)
        for name, value in (
            (head or {})
            | {
                "Content-Length": str(len(body) if length is None else length),
                "Content-Type": "text/html" if body[:1] == b"<" else "application/octet-stream",
            }
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def web_site(files: dict[str, bytes]) -> Iterator[Site]:
    """A server of these files on 127.0.0.1 while the block runs."""
    site = Site(files)
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site})
    ) as server:
        server.handle_error = lambda *_: None  # clients that hang up are meant
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        site.address = f"http://127.0.0.1:{server.server_port}"
        yield site
        server.shutdown()
        thread.join()


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


class _DriveHandler(_Handler):
    def do_GET(self) -> None:
        site, host = self.site, self.headers["Host"]
        place, query = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
        item = query.get("id", "")
        if host == "drive.google.com" and place == "/embeddedfolderview" and item in site.folders:
            links = "".join(
                f'<a href="https://drive.google.com/file/d/{one}/view?usp=drive_web">{site.names[one]}</a>'
                for one in site.folders[item]
            )
            return self._send(
                200,
                f"<html><head><title>weights</title></head><body>{links}</body></html>".encode(),
            )
        if host == "drive.google.com" and place == "/uc" and item in site.files:
            form = (
                '<html><body><form id="download-form" '
                'action="https://drive.usercontent.google.com/download" method="get">'
                f'<input type="hidden" name="id" value="{item}">'
                '<input type="hidden" name="confirm" value="t"></form></body></html>'
            )
            return self._send(200, (QUOTA if item in site.exhausted else form).encode())
        if host == "drive.usercontent.google.com":
            self.path = f"/{item}"
            return super().do_GET()
        if host == "raw.githubusercontent.com":
            return super().do_GET()
        return self._send(404, b"none")

    def _send(
        self, code: int, body: bytes, head: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        item = self.path.lstrip("/")
        disposition = (
            {"Content-Disposition": f'attachment; filename="{self.site.names[item]}"'}
            if item in self.site.names
            else {}
        )
        super()._send(code, body, (head or {}) | disposition, length)


@contextmanager
def google_drive(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Drive]:
    """A stand-in over TLS to which all connections of this process lead while the block runs."""
    import trustme
    import urllib3.connection
    from urllib3.util.connection import create_connection

    hosts = ("drive.google.com", "drive.usercontent.google.com", "raw.githubusercontent.com")
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*hosts).configure_cert(context)
    authority.cert_pem.write_to_path(folder / "authority.pem")
    site = Drive({})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Handler", (_DriveHandler,), {"site": site})
    ) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        server.handle_error = lambda *_: None  # clients that hang up are meant
        thread = threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
        )
        thread.start()
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "authority.pem"))
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(
            urllib3.connection.connection,
            "create_connection",
            lambda _, *args, **more: create_connection(
                ("127.0.0.1", server.server_port), *args, **more
            ),
        )
        yield site
        server.shutdown()
        thread.join()
