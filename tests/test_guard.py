"""The guard of the page without a server: host names, and errors that nobody foresaw."""

import asyncio
import socket
from pathlib import Path

import pytest

from modules.web.guard import Guard
from modules.web.hosts import host_name, own_hosts, plain_names
from modules.web.uploads import UploadFolder
from system.escaping import SafeFormatter

BEGUN = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"access-control-allow-origin", b"*"), (b"a", b"b")],
}
ENDED = {"type": "http.response.body", "body": b"x"}
SCOPE = {
    "type": "http",
    "method": "GET",
    "path": "/config",
    "query_string": b"",
    "headers": [(b"host", b"localhost")],
}


def answer_of_a_broken_page(folder: Path, *messages: dict) -> list[dict]:
    """What the guard sends when the application sends these messages and then fails."""

    async def fail(scope, receive, answer):
        for message in messages:
            await answer(message)
        raise KeyError("a\nb\x1b[2J")

    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    uploads = UploadFolder(folder, 60, 10**9)
    guard = Guard(fail, frozenset({"localhost"}), frozenset(), uploads, [], None)
    asyncio.run(guard(SCOPE, None, send))
    return sent


def test_an_unforeseen_error_is_one_log_line_without_a_traceback(tmp_path, caplog):
    unanswered = answer_of_a_broken_page(tmp_path)
    assert [message.get("status") for message in unanswered] == [500, None]
    ended = answer_of_a_broken_page(tmp_path, BEGUN, ENDED)
    assert ended[1:] == [ENDED], "nothing follows an end"
    begun = answer_of_a_broken_page(tmp_path, BEGUN)
    end = {"type": "http.response.body", "body": b""}
    assert begun == [{**BEGUN, "headers": [(b"a", b"b")]}, end]
    lines = [SafeFormatter("%(message)s").format(record) for record in caplog.records]
    assert lines == ["GET /config: KeyError: 'a\\nb\\x1b[2J'"] * 3
    assert [record.exc_info for record in caplog.records] == [None] * 3


def test_the_names_of_a_page_that_listens_everywhere():
    for host in ("0.0.0.0", "::"):
        assert {socket.gethostname().lower(), "127.0.0.1", "localhost", host} <= own_hosts(host)
    assert own_hosts("192.0.2.7") == {"localhost", "127.0.0.1", "::1", "192.0.2.7"}
    names = plain_names(["Page.example", "[2001:DB8::0:1]", "a b"])
    assert names == {"page.example", "2001:db8::1"}


@pytest.mark.parametrize(
    ("header", "name"),
    [
        ("A.b:80", "a.b"),
        ("[::1]:9", "::1"),
        ("::1", "::1"),
        ("x:y", None),
        ("[::1", None),
        ("a b", None),
        ("", None),
        ("x.", "x"),
        ("localhost%.evil", None),
    ],
)
def test_host_headers_are_read(header, name):
    assert host_name(header) == name
