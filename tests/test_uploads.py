"""The folder of visitors' uploads: its limits, its names, and that nothing is left behind."""

import asyncio
import fcntl
import io
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
from PIL import Image

from modules.web.server import receive_upload
from modules.web.uploads import NoRoom, UploadFolder, open_upload_folder, remove_orphans, safe_name
from tests.page_server import (
    EXAMPLES,
    SECONDS,
    caption_events,
    form,
    host_and_port,
    running_server,
    upload,
)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("../../x/<b>ä 1.png", "b_1.png"),
        ("..", "upload"),
        ("", "upload"),
        ("a\\b\x1b.JPG", "b.jpg"),
        ("x" * 500 + ".png", "x" * 80 + ".png"),
        (".htaccess", "htaccess"),
        ("a.svg", "a_svg"),
        ("a.b.png", "a_b.png"),
    ],
)
def test_uploads_get_safe_names(name, stored):
    assert safe_name(name) == stored


def test_an_upload_that_the_disk_does_not_take_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "full")

    monkeypatch.setattr(shutil, "copyfileobj", fail)
    with pytest.raises(OSError, match="full"):
        UploadFolder(tmp_path, 60, 10**9).store("a.png", io.BytesIO(b"x"))
    assert list(tmp_path.iterdir()) == []


def store_aged(uploads: UploadFolder, size: int, seconds: int) -> Path:
    """An upload that arrived and was stored so many seconds ago."""
    with uploads.count_arriving_bytes() as add_bytes:
        add_bytes(size)
        uploads.sweep()
        path = uploads.store("a.png", io.BytesIO(bytes(size)))
    changed = time.time() - seconds
    for one in (path, path.parent):
        os.utime(one, (changed, changed))
    return path


def exist(paths: Iterable[Path]) -> list[bool]:
    return [path.exists() for path in paths]


def test_the_oldest_uploads_make_room_for_new_ones(tmp_path):
    uploads = UploadFolder(tmp_path, max_age=1000, max_bytes=300_000)
    example = uploads.store("example.png", io.BytesIO(bytes(200_000)))
    uploads.exempt_current_files()
    paths = [store_aged(uploads, 100_000, seconds) for seconds in (103, 102, 101, 100)]
    uploads.sweep()
    assert exist(paths) == [False, False, True, True]
    assert example.is_file()


def test_uploads_older_than_the_limit_are_deleted(tmp_path):
    uploads = UploadFolder(tmp_path, max_age=1000, max_bytes=300_000)
    paths = [store_aged(uploads, 10, seconds) for seconds in (2000, 500)]
    uploads.sweep()
    assert exist(paths) == [False, True]


def test_arriving_uploads_take_room_as_their_bytes_arrive(tmp_path):
    uploads = UploadFolder(tmp_path, max_age=1000, max_bytes=300_000)
    paths = [store_aged(uploads, 100_000, seconds) for seconds in (101, 100)]
    with (
        uploads.count_arriving_bytes() as add_bytes,
        uploads.count_arriving_bytes() as add_other_bytes,
    ):
        uploads.sweep()
        assert exist(paths) == [True, True], "what is only announced takes no room"
        add_bytes(250_000)
        uploads.sweep()
        assert exist(paths) == [False, False]
        with pytest.raises(NoRoom):
            add_other_bytes(100_000)
    with uploads.count_arriving_bytes() as add_bytes:
        add_bytes(290_000)


def test_empty_files_and_folders_take_room_too(tmp_path):
    uploads = UploadFolder(tmp_path, max_age=1000, max_bytes=300_000)
    for _ in range(40):
        (tmp_path / secrets.token_hex(4)).mkdir()
        uploads.store("", io.BytesIO(b""))
    uploads.sweep()
    assert 0 < len(list(tmp_path.iterdir())) < 80


MAX_FILE = 600_000  # bytes of an upload in the tests of its route


def parts_of_form(count: int, size: int) -> list[bytes]:
    """A form of one file that arrives in so many parts of so many bytes."""
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    return [head, *[bytes(size)] * count, b"\r\n--x--\r\n"]


def send_parts(uploads: UploadFolder, parts: list[bytes], **headers: str) -> int:
    """Send a body to our own upload route, without a server; returns the status of the answer."""
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    from starlette.requests import Request

    messages = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    messages.append({"type": "http.request", "body": b""})
    given = [(b"content-type", b"multipart/form-data; boundary=x")]
    for name, value in headers.items():
        given.append((name.replace("_", "-").encode(), value.encode()))
    scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": given}

    async def receive():
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    return asyncio.run(receive_upload(Request(scope, receive), uploads, MAX_FILE)).status_code


def test_announced_bytes_do_not_count_and_bytes_that_arrive_do(tmp_path):
    """Bodies that lie about their length."""
    uploads = UploadFolder(tmp_path, max_age=60, max_bytes=1_000_000)
    stored = uploads.store("a.png", io.BytesIO(bytes(500_000)))
    assert send_parts(uploads, [], content_length="1200000") == 400
    assert stored.is_file(), "bytes that are only announced push nothing out"
    chunked = {"transfer_encoding": "chunked"}
    assert send_parts(uploads, parts_of_form(20, 100_000), content_length="1", **chunked) == 503
    assert send_parts(uploads, parts_of_form(11, 50_000), **chunked) == 200
    assert not stored.exists(), "the oldest makes room"
    assert send_parts(uploads, parts_of_form(7, 100_000), **chunked) == 413
    assert uploads._arriving == 0


def wait_until(condition, what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def send_broken_off(url: str, content: bytes) -> None:
    """Begin an upload of this content, and hang up before its end."""
    body, headers = form("cut.png", content)
    lines = [
        "POST /gradio_api/upload HTTP/1.1",
        "Host: 127.0.0.1",
        f"Content-Type: {headers['Content-Type']}",
        "Content-Length: 9000000",
    ]
    head = "\r\n".join([*lines, "", ""]).encode()
    with socket.create_connection(host_and_port(url)) as visitor:
        visitor.sendall(head + body[:-10])


def make_new(path: Path) -> None:
    """Date an upload into the future, so that its age does not delete it during a slow test."""
    future = time.time() + 1000
    for one in (path, path.parent):
        os.utime(one, (future, future))


def wait_for_lock(folder: Path) -> None:
    """Wait until a killed server has ended: then the lock of its folder of uploads is free."""
    with open(f"{folder}.lock") as file:
        fcntl.flock(file, fcntl.LOCK_EX)


def test_nothing_that_a_visitor_sent_is_kept(tmp_path):
    """Not beyond its age, not if it broke off, and not if the server was killed."""
    picture = tmp_path / "own.png"
    Image.open(EXAMPLES / "moved_before.png").rotate(5).save(picture)
    files = tmp_path / "files"
    secret = b"broken off "

    def is_kept(content: bytes) -> bool:
        return any(content in path.read_bytes() for path in files.rglob("*") if path.is_file())

    def nothing_is_kept() -> bool:
        try:
            return not is_kept(picture.read_bytes()) and not is_kept(secret)
        except FileNotFoundError:  # deleted while this looks
            return False

    with running_server(files, "--upload_age", "3") as (server, url):
        sent = upload(url, picture)
        assert files in Path(sent).parents
        caption_events(url, sent, sent)
        send_broken_off(url, secret * 200_000)
        wait_until(nothing_is_kept, "the upload is still there")
        assert is_kept((EXAMPLES / "moved_before.png").read_bytes()), "examples stay"
        sent = Path(upload(url, picture))
        make_new(sent)
        server.kill()
        server.wait()
    wait_for_lock(sent.parents[1])
    assert sent.is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(files))
        with open_upload_folder(60, 10**9) as uploads:
            assert not sent.exists(), "the next server deletes what a killed one left"
            remove_orphans(files)
            assert uploads.root.is_dir(), "the folder of a server that runs stays"
        assert list(files.glob("clip4idc-page-*")) == []


def test_ctrl_c_ends_the_server_and_deletes_uploads(tmp_path):
    with running_server(tmp_path / "files", interrupt=True) as (_, url):
        upload(url, EXAMPLES / "moved_before.png")
