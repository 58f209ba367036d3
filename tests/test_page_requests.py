"""Requests that no page of ours sends, to a server: what reaches Gradio, and what is refused."""

import json
import urllib.parse
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from modules.web.image_decoding import MAX_MEGABYTES
from tests.page_server import (
    CAPTIONS,
    EXAMPLES,
    FILE_DATA,
    SETTINGS,
    call,
    caption_events,
    form,
    host_and_port,
    request,
    running_page,
    send_lines,
    upload,
    upload_examples,
)

ARGUMENTS = (
    "before_path",
    "after_path",
    "beam_size",
    "length_penalty",
    "num_captions",
    "temperature",
    "top_p",
    "seed",
)
NOT_JSON = (
    b"",
    b"x",
    b'{"session_hash": 1e400}',
    b'{"\\ud800": 1}',
    b'{"a": 1, "a": 2}',
    b"[" * 100_000,
    b'{"data": NaN}',
    b"\xff",
)


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with running_page(tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture
def upload_with_links(url) -> Iterator[Path]:
    """An upload. Beside its folder are links that lead out of the folder of uploads."""
    path = Path(upload(url, EXAMPLES / "removed_before.png"))
    root = path.parents[1]
    (root / "link.png").symlink_to(EXAMPLES / "removed_after.png")
    (root / "folder").symlink_to(EXAMPLES)
    yield path
    (root / "link.png").unlink()
    (root / "folder").unlink()


def hostile_paths(upload: Path) -> list[object]:
    """What a visitor may send to reach a file that is not an upload."""
    root = upload.parents[1]
    other = EXAMPLES / "removed_after.png"
    return [
        "/etc/passwd",
        str(other),
        str(root / "link.png"),
        str(root / "folder" / other.name),
        f"{upload}/../../link.png",
        f"{root}/../../../../../../../../../..{other}",
        str(root),
        str(upload.parent),
        "docs/examples/removed_after.png",
        "",
        ".",
        "..",
        f"file://{upload}",
        f"http://127.0.0.1/{upload}",
        "https://example.org/a.png",
        "data:image/png;base64,AAAA",
        "a" * 5000,
        "/dev/zero",
        f"{root}/\udcff.png",
        f"{upload}\0",
        f"{upload}\0.png",
        "\ud800",
        5,
        None,
        True,
        [str(upload)],
        {"path": str(upload)},
    ]


def expected_status(path: object) -> int:
    """How a call with a hostile path is refused."""
    if not isinstance(path, str):
        return 422
    has_surrogates = any("\ud800" <= letter <= "\udfff" for letter in path)
    return 400 if has_surrogates else 403


def answer_number(url: str) -> int:
    """The number of the function that the page's own button calls."""
    functions = json.loads(request(f"{url}config")[1])["dependencies"]
    [number] = [
        one["id"]
        for one in functions
        if one["backend_fn"]
        and len(one["inputs"]) == 2 + len(SETTINGS)
        and len(one["outputs"]) == 1
    ]
    return number


@pytest.mark.parametrize(
    "mark",
    [
        {},
        {"meta": FILE_DATA},
        {"meta": {}},
        {"meta": {"_type": "x"}},
        {"url": "x", "orig_name": "a.png"},
    ],
    ids=["bare", "marked", "empty mark", "false mark", "with url"],
)
def test_no_file_is_opened_that_was_not_uploaded(url, upload_with_links, mark):
    intact = {"path": str(upload_with_links), **mark}
    number = answer_number(url)
    for path in hostile_paths(upload_with_links):
        status = expected_status(path)
        hostile = {"path": path, **mark}
        for pair in ([hostile, intact], [intact, hostile]):
            data = [*pair, *SETTINGS]
            assert call(url, "call/caption", {"data": data})[0] == status, path
            pressed = {"data": data, "fn_index": number, "session_hash": "visitor"}
            assert call(url, "queue/join", pressed)[0] == status, path
    data = {"data": [intact, intact, *SETTINGS]}
    status, answer = call(url, "call/caption", data)
    assert status == 200
    event = json.loads(answer)["event_id"]
    assert "event: complete" in request(f"{url}gradio_api/call/caption/{event}")[1]


def test_other_ways_to_call_a_function_are_closed(url, upload_with_links):
    intact = {"path": str(upload_with_links)}
    data = {"data": [intact, intact, *SETTINGS]}
    for route in ("run/caption", "api/caption", "call/v2/caption"):
        assert call(url, route, data)[0] == 404, route
    arguments = dict(zip(ARGUMENTS, data["data"], strict=True))
    assert call(url, "call/v2/caption", arguments)[0] == 404


@pytest.mark.parametrize(
    "make",
    [
        lambda path: {"url": "http://127.0.0.1/x.png"},
        lambda path: [{"path": path}],
        lambda path: [path],
        lambda path: path,
        lambda path: 5,
        lambda path: [],
        lambda path: {},
        lambda path: {"path": [path]},
    ],
)
def test_values_that_are_not_pictures_are_refused(url, make):
    value = make(upload(url, EXAMPLES / "removed_before.png"))
    assert call(url, "call/caption", {"data": [value, value, *SETTINGS]})[0] == 422


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (0, 99),
        (0, 1.5),
        (0, True),
        (0, None),
        (0, "1"),
        (2, 101),
        (3, "<img src=x>"),
        (5, -1),
        (5, 2**70),
        (5, [1]),
    ],
)
def test_values_that_are_not_numbers_in_range_are_refused(url, place, value):
    settings = [*SETTINGS]
    settings[place] = value
    assert call(url, "call/caption", {"data": [None, None, *settings]})[0] == 422


@pytest.mark.parametrize("data", [None, {}, [], [None], [None, None, *SETTINGS, 1]])
def test_calls_with_other_data_than_a_value_for_each_input_are_refused(url, data):
    assert call(url, "call/caption", {"data": data})[0] == 422


@pytest.mark.parametrize(
    "route",
    [
        "call/caption",
        "queue/join",
        "run/caption",
        "api/caption",
        "cancel",
        "reset",
        "call/none",
        "call/v2/caption",
    ],
)
def test_bodies_that_are_not_calls_are_refused(url, route):
    is_known = route != "call/v2/caption"
    for content in NOT_JSON:
        assert call(url, route, content)[0] == (400 if is_known else 404), content[:20]
    for content in (b"[]", b"5"):
        assert call(url, route, content)[0] == (422 if is_known else 404), content
    for content in (b'{"data": {}}', b'{"fn_index": 10000000}'):
        assert call(url, route, content)[0] in (404, 422), content
    assert call(url, route, b" " * (3 << 19))[0] == (413 if is_known else 404)


def test_only_uploads_can_be_fetched(url, upload_with_links):
    files = f"{url}gradio_api/file="
    status, _ = request(f"{files}{upload_with_links}")
    assert status == 200
    for path in hostile_paths(upload_with_links):
        name = urllib.parse.quote(str(path), errors="surrogatepass")
        # Bytes that are not UTF-8 arrive as U+FFFD, so this one names a file that is not there.
        expected = 404 if "\udcff" in str(path) else 403
        assert request(f"{files}{name}")[0] == expected, path
    assert request(f"{files}{upload_with_links.parent}/other.png")[0] == 404


@pytest.mark.parametrize(
    "route",
    [
        "gradio_api/proxy=http://example.org",
        "gradio_api/run-history/records",
        "gradio_api/deep_link?session_hash=a",
        "monitoring",
        "docs",
        "gradio_api/component_server",
        "gradio_api/vibe-code",
        "gradio_api/queue/data?session_hash=a",
        "gradio_api/call/caption/a",
        "login",
        "gradio_api/stream/a/b",
        "gradio_api/call/v2/caption/a",
        "gradio_api/call/v2/caption",
        "assets/" + "a" * 300,
        "static/" + "a" * 5000,
        "static/%2e%2e/%2e%2e/app.py",
        "assets/..%2f..%2f..%2fetc%2fpasswd",
        "gradio_api/upload_progress?upload_id=a",
    ],
)
def test_nothing_else_of_gradio_answers(url, route):
    assert request(f"{url}{route}")[0] in (403, 404)


HOSTS = [
    ("127.0.0.1", 200),
    ("LOCALHOST:1", 200),
    ("[::1]:80", 200),
    ("localhost.", 200),
    ("evil.example", 421),
    ("127.0.0.1.evil.example", 421),
    ("a@127.0.0.1", 421),
    ("127.0.0.1:80:90", 421),
    ("2130706433", 421),
    ("evil\r\nX-Forwarded-Host: 127.0.0.1", 421),
    ("", 421),
]


@pytest.mark.parametrize(("host", "status"), HOSTS)
def test_the_page_answers_to_its_own_names_only(url, host, status):
    answer = send_lines(url, "GET /config HTTP/1.1", f"Host: {host}")
    assert answer.startswith(f"HTTP/1.1 {status} ")


@pytest.mark.parametrize(
    "host", [host for host, status in HOSTS if status == 421 and "\r" not in host]
)
def test_pages_of_other_sites_send_nothing(url, host):
    lines = ["Host: 127.0.0.1", f"Origin: http://{host}", "Content-Length: 0"]
    answer = send_lines(url, "POST /gradio_api/reset HTTP/1.1", *lines)
    assert answer.startswith("HTTP/1.1 403 ")


@pytest.mark.parametrize(
    "lines",
    [
        ["GET /?page=x HTTP/1.1"],
        ["GET /config?page=x HTTP/1.1"],
        ["GET / HTTP/1.1", "X-Forwarded-Host: a:b"],
        ["GET /config HTTP/1.1", "X-Forwarded-Host: \x7f"],
        ["GET /config HTTP/1.1", "X-Forwarded-Proto: x://y"],
        ["GET / HTTP/1.1", "X-Gradio-Server: http://evil.example"],
        ["GET / HTTP/1.1", "Range: bytes=0-9,20-3"],
    ],
)
def test_headers_and_queries_that_a_visitor_makes_up_change_nothing(url, lines):
    assert send_lines(url, *lines).startswith("HTTP/1.1 200 ")


def test_requests_that_would_take_long_are_refused(url):
    """Paths of many parts, and encodings whose work grows with the square of the text.

    The page would work on each of them for minutes; `request` gives up before.
    """
    data = [{"path": "a/" * 250_000}, None, *SETTINGS]
    assert call(url, "call/caption", {"data": data})[0] == 403
    assert request(f"{url}gradio_api/file={'a/' * 20_000}")[0] == 403
    assert request(f"{url}assets/{'a/' * 3000}")[0] == 404
    head = b'--x\r\nContent-Disposition: form-data; name="f-"\r\n\r\na-'
    body = head + b"a" * 900_000 + b"\r\n--x--\r\n"
    kind = {"Content-Type": "multipart/form-data; boundary=x; charset=punycode"}
    assert request(f"{url}gradio_api/upload", body, kind)[0] == 400


def test_whole_numbers_may_be_written_as_floats(url):
    settings = [1.0, -0.0, 1.0, 1, 0.9, 42.0]
    status, answer = call(url, "call/caption", {"data": [None, None, *settings]})
    assert status == 200
    event = json.loads(answer)["event_id"]
    assert "The before picture is missing" in request(f"{url}gradio_api/call/caption/{event}")[1]


def test_other_sites_cannot_read_answers(url):
    lines = ["GET /config HTTP/1.1", "Origin: http://evil.example"]
    head = send_lines(url, *lines, size=4096).partition("\r\n\r\n")[0]
    assert head.startswith("HTTP/1.1 200 ")
    assert "access-control-" not in head.lower()


def test_only_the_pages_own_origin_sends(url):
    _, port = host_and_port(url)
    others = (
        "http://evil.example",
        "null",
        f"http://localhost:{port + 1}",
        f"http://127.0.0.1:{port + 1}",
        "http://[::1",
    )
    lines = ("POST /gradio_api/reset HTTP/1.1", "Content-Length: 0")
    for origin in others:
        answer = send_lines(url, *lines, f"Origin: {origin}")
        assert answer.startswith("HTTP/1.1 403 "), origin
    answer = send_lines(url, *lines, f"Origin: http://127.0.0.1:{port}")
    assert answer.startswith("HTTP/1.1 400 "), "let through, and empty"


def test_an_answer_is_fetched_by_those_who_asked(url, upload_with_links):
    intact = {"path": str(upload_with_links)}
    calls = f"{url}gradio_api/call"
    sessions = f"{url}gradio_api/queue/data?session_hash="
    _, answer = call(url, "call/caption", {"data": [intact, intact, *SETTINGS]})
    event = json.loads(answer)["event_id"]
    assert request(f"{sessions}nobody")[0] == 404
    assert request(f"{calls}/none/{event}")[0] == 404
    assert "event: complete" in request(f"{calls}/caption/{event}")[1]
    data = [None, intact, *SETTINGS]
    pressed = {"data": data, "fn_index": answer_number(url), "session_hash": "someone"}
    event = json.loads(call(url, "queue/join", pressed)[1])["event_id"]
    assert request(f"{sessions}{event}")[0] == 404
    assert '"success":true' in request(f"{sessions}someone")[1]


EMPTY_FORM = b"--x\r\nContent-Disposition: form-data\r\n\r\nb\r\n--x--\r\n"
FORM_TYPE = form("", b"")[1]


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"x", {"Content-Type": "text/plain"}, 400),
        (b"x", {"Content-Type": "multipart/form-data"}, 400),
        (*form("a", b"b", files=3), 400),
        (b"", FORM_TYPE, 400),
        (b"--y", FORM_TYPE, 400),
        (EMPTY_FORM, FORM_TYPE, 400),
        (*form("a.png", bytes(MAX_MEGABYTES * 2**20 + 1)), 413),
        (*form("a.png", bytes(3 * MAX_MEGABYTES * 2**20)), 413),
    ],
    ids=["text", "no boundary", "3 files", "empty", "cut", "no file", "large", "larger"],
)
def test_refused_uploads_leave_nothing(url, upload_with_links, content, headers, status):
    root = upload_with_links.parents[1]
    before = sorted(root.iterdir())
    assert request(f"{url}gradio_api/upload", content, headers)[0] == status
    assert sorted(root.iterdir()) == before
    files = [path for path in root.parent.iterdir() if path.is_file()]
    assert [path for path in files if path.suffix != ".lock"] == []


def test_thirty_visitors_at_once_get_their_own_captions(url):
    uploads = {name: upload_examples(url, name) for name in CAPTIONS}
    names = (list(CAPTIONS) * 30)[:30]
    with ThreadPoolExecutor(len(names)) as visitors:
        answers = list(visitors.map(lambda name: caption_events(url, *uploads[name]), names))
    captions = [json.loads(answer.rsplit("data: ", 1)[1])[0] for answer in answers]
    assert captions == [CAPTIONS[name] for name in names]
