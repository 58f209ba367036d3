"""Names and URLs lose their secrets in all text that is made from them, and so do texts."""

import json
import logging
from pathlib import Path

import pytest

from system.escaping import SafeFormatter
from system.files import is_html
from system.urls import Location, redact, scrub

SECRET = "hunter2Mark"


@pytest.mark.parametrize(
    ("name", "redacted"),
    [
        ("https://user:word@host/a/b.bin?X-Signature=secret", "https://host/a/b.bin"),
        ("http://user@host/x", "http://host/x"),
        ("http://a:b@c@host/x", "http://host/x"),
        ("http://a:b?c@host/x", "http://***"),
        ("http://host/x?a=b@c", "http://***"),
        ("http://host/x#key=1", "http://host/x"),
        ("htps://u:p@host/x", "htps://host/x"),
        ("https:u:p@host/x", "https:host/x"),
        ("u:p@host/x", "host/x"),
        ("token@host/x", "host/x"),
        ("s3://k:s@bucket/key", "s3://bucket/key"),
        ("//u:p@host/x", "//host/x"),
        ("host/x?token=1", "host/x"),
        ("ViT-L/14@336px", "ViT-L/14@336px"),
        ("owner/name@v1.0", "owner/name@v1.0"),
        ("http://u:p%40host/x", "http://host/x"),
        ("http://u:password/x", "http://***/x"),
        ("http://host:80/x", "http://host:80/x"),
        ("http://[::1]:80/x", "http://[::1]:80/x"),
        ("http://host/x%3Fa=1", "http://host/x"),
        ("http://host/x;a=1/y", "http://host/x"),
        ("http://host/x&a=1", "http://host/x"),
        ("runs/a?b", "runs/a?b"),
        ("", ""),
    ],
)
def test_names_lose_their_secrets(name, redacted):
    assert redact(name) == redacted
    assert str(Location(name)) == redacted


def test_names_of_files_that_exist_stay_whole(tmp_path):
    path = tmp_path / "me@home?x=1.bin"
    path.write_bytes(b"")
    assert redact(str(path)) == str(path)


@pytest.mark.parametrize(
    "write",
    [
        str,
        repr,
        lambda location: f"{location}",
        lambda location: f"{location:>40}",
        lambda location: "%s" % location,  # noqa: UP031
        lambda location: "{}".format(location),  # noqa: UP032
        lambda location: f"{[location]}",
    ],
)
def test_text_made_from_a_location_has_no_secrets(write):
    text = write(Location(f"http://user:{SECRET}@host/x.bin?sig={SECRET}"))
    assert "http://host/x.bin" in text
    assert SECRET not in text


def test_a_location_cannot_be_written_by_mistake():
    location = Location(f"http://user:{SECRET}@host/x.bin?sig={SECRET}")
    with pytest.raises(TypeError):
        json.dumps(location)
    with pytest.raises(TypeError):
        "".join([location])
    assert location.reveal() == f"http://user:{SECRET}@host/x.bin?sig={SECRET}"
    assert Location("x") == Location("x") != Location("y")


@pytest.mark.parametrize(
    ("url", "folder", "name", "tail"),
    [
        ("https://host/a/b.bin?key=1", "https://host/a", "b.bin", "?key=1"),
        ("s3://bucket/run?/x.bin", "s3://bucket/run?", "x.bin", ""),
        ("http://host", "http://host", "", ""),
    ],
)
def test_urls_are_split_into_folder_and_name(url, folder, name, tail):
    found, *rest = Location(url).split()
    assert (found.reveal(), *rest) == (folder, name, tail)


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (
            'EndpointConnectionError: "http://user:pw@127.0.0.1:9/b"',
            'EndpointConnectionError: "http://127.0.0.1:9/b"',
        ),
        (
            "Max retries exceeded with url: /x.bin?X-Amz-Signature=1 (Caused by",
            "Max retries exceeded with url: /x.bin (Caused by",
        ),
        ("proxy=('http://u:p@c:1'), next", "proxy=('http://c:1'), next"),
        ("12:30:01 mail me@example.org", "12:30:01 mail me@example.org"),
        ("weights owner/name@v1 and ViT-L/14@336px", "weights owner/name@v1 and ViT-L/14@336px"),
        ("why? because a=b", "why? because a=b"),
        ("what changed? nothing", "what changed? nothing"),
        ("a token of user:pw@host", "a token of host"),
        ("x://a@b//c@d", "x://d"),
    ],
)
def test_texts_lose_the_secrets_of_urls_in_them(text, clean):
    assert scrub(text) == clean


@pytest.mark.parametrize(
    "name",
    [
        "PGPASSWORD",
        "DB_PASS",
        "GITHUB_PAT",
        "OPENAI_APIKEY",
        "HF_TOKEN",
        "AWS_SECRET_ACCESS_KEY",
        "X_AUTH",
        "DATABASE_URL",
    ],
)
def test_texts_lose_the_secrets_of_the_environment(name, monkeypatch):
    value = f"https://x:{SECRET}@host/" if name.endswith("URL") else SECRET
    monkeypatch.setenv(name, value)
    assert scrub(f"a {SECRET} b") == "a *** b"


@pytest.mark.parametrize(
    ("message", "args", "line"),
    [
        ("id %s\nrow", ("a\nall 9.9\x1b[2J\u202e",), "id a\\nall 9.9\\x1b[2J\\u202e\nrow"),
        ("%d of %.2f %s", (3, 0.5, Path("a\tb")), "3 of 0.50 a\\tb"),
        ("%s", (ValueError("a\r\x9b"),), "a\\r\\x9b"),
        ("%s", (Location(f"http://u:{SECRET}@h/x"),), "http://h/x"),
        ("%s 字 é 👩‍👩‍👧", ("字 é 👩‍👩‍👧 \ud800",), "字 é 👩‍👩‍👧 \\ud800 字 é 👩‍👩‍👧"),
    ],
    ids=["lines", "numbers", "error", "location", "unicode"],
)
def test_log_lines_lose_control_characters_and_secrets(message, args, line):
    record = logging.LogRecord("x", logging.INFO, "x", 1, message, args, None)
    assert SafeFormatter("%(message)s").format(record) == line


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (b"\n <!DOCTYPE html><html>", True),
        (b"\xef\xbb\xbf<HTML>", True),
        (b"<?xml version", True),
        (b"PK\x03\x04", False),
        (b"<weights>", False),
        (b"", False),
    ],
)
def test_html_is_recognized_by_its_beginning(head, expected):
    assert is_html(head) is expected
