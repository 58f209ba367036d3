"""Local servers in the place of those that files come from: a web server that breaks off, and S3."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest


@dataclass
class Site:
    """What a web server gives, and what it was asked for."""

    files: dict[str, bytes]
    address: str = ""
    broken: dict[str, list[int]] = field(default_factory=dict)  # name → bytes after which each next answer to it breaks off
    busy: dict[str, int] = field(default_factory=dict)  # name → how often it answers 503 first
    ranges: bool = True
    tags: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # name and Range of each request

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
        until = site.broken[name].pop(0) if site.broken.get(name) else len(body)
        head = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        return self._send(206 if start else 200, body[start : max(start, until)], head | tag, length=len(body) - start)

    def _send(self, code: int, body: bytes, head: dict[str, str] | None = None, length: int | None = None) -> None:
        self.send_response(code)
        for name, value in ((head or {}) | {"Content-Length": str(len(body) if length is None else length)}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


@contextmanager
def web_site(files: dict[str, bytes]) -> Iterator[Site]:
    """A server of these files on 127.0.0.1 while the block runs."""
    site = Site(files)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"site": site})) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
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
    for name, value in {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
                        "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(name, value)
    client = boto3.client("s3")
    client.create_bucket(Bucket=bucket)
    try:
        yield client
    finally:
        server.stop()
