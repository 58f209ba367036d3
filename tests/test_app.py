"""The web page in headless Chromium: upload, drop, paste, examples, caption, swap, a broken or oversized file, a phone's width; what
is refused before decoding, how requests wait for each other, and that nothing stays."""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import app
from modules.model.explanation import Caption, Explanation
from modules.web.guard import Guard
from modules.web.hosts import host_name, own_hosts, plain_names
from modules.web.server import receive_upload
from modules.web.uploads import NoRoom, UploadFolder, open_upload_folder, remove_orphans, safe_name
from system.escaping import SafeFormatter, markdown_text
from tests.conftest import ROOT

EXAMPLES = ROOT / "docs" / "examples"
CAPTIONS = json.loads((EXAMPLES / "captions.json").read_text())
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 120


def test_uploads_are_looked_at_before_they_are_decoded(tmp_path, monkeypatch):
    uploads = UploadFolder(tmp_path, 60, 10**9)
    broken = tmp_path / "broken.png"
    broken.write_bytes((EXAMPLES / "removed_before.png").read_bytes()[:300])
    text = tmp_path / "text.png"
    text.write_text("no image")
    sound = str(shutil.copy(EXAMPLES / "removed_before.png", tmp_path / "sound.png"))
    elsewhere = str(EXAMPLES / "removed_before.png")
    gone = str(tmp_path / "gone.png")
    for path, message in (
        (None, "missing"),
        (str(broken), "not an image"),
        (str(text), "not an image"),
        (elsewhere, "not uploaded"),
        (gone, "no longer on the server"),
    ):
        with pytest.raises(ValueError, match=f"before .*{message}"):
            app.decode_uploads([path, sound], uploads)
        with pytest.raises(ValueError, match=f"after .*{message}"):
            app.decode_uploads([sound, path], uploads)
    assert [image.size for image in app.decode_uploads([sound, sound], uploads)] == [(480, 320)] * 2
    monkeypatch.setattr(app, "MAX_MEGAPIXELS", 0.01)
    with pytest.raises(ValueError, match="more than 0.01 million pixels"):
        app.decode_uploads([sound, sound], uploads)
    monkeypatch.setattr(app, "MAX_MEGAPIXELS", 50)
    monkeypatch.setattr(app, "MAX_SIDE", 400)
    with pytest.raises(ValueError, match="a side of more than 400"):
        app.decode_uploads([sound, sound], uploads)
    monkeypatch.setattr(app, "MAX_MEGABYTES", 0.001)
    with pytest.raises(ValueError, match="larger than"):
        app.decode_uploads([sound, sound], uploads)


def test_what_a_sentence_holds_is_text_in_the_page():
    image, sly = Image.new("RGB", (20, 20)), "<script>alert(1)</script>"
    explanation = Explanation(
        Caption(sly, -1.0), (sly,), np.zeros((2, 2, 6, 6)), np.zeros((1, 2, 6, 6))
    )
    page = app.attention_html(image, image, [explanation, explanation])
    assert "<script>" not in page
    assert page.count("<h3>&lt;script&gt;") == 2
    assert page.count("data:image/jpeg;base64,") == 16
    assert "<h3>" not in app.attention_html(image, image, [explanation])


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("500MB", 500 * 10**6),
        ("2 GB", 2 * 10**9),
        ("1000", 1000),
        ("1.5gb", 15 * 10**8),
        ("2G", 2 * 10**9),
        ("7b", 7),
    ],
)
def test_sizes(text, size):
    assert app.byte_count(text) == size
    for wrong in ("", "x", "-1", "nan", "inf", "1e400", "1" * 5000, "1 XB", "1 MB MB"):
        with pytest.raises(argparse.ArgumentTypeError, match="no size"):
            app.byte_count(wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "99999"], "--port is 99999"),
        (["--init_model", "nowhere"], "no weights"),
        (["--upload_age", "0"], "--upload_age is 0"),
        (["--upload_age", "nan"], "--upload_age is nan"),
        (["--upload_space", "0"], "--upload_space is 0, expected"),
        (["--upload_space", "much"], "--upload_space"),
        (["--upload_space", "1e400"], "no size"),
        (["--init_model", ""], "--init_model is empty"),
        (["--allowed_hosts", "a b"], "--allowed_hosts a b is no name"),
        (["--host", "256.1.1.1"], "cannot listen on 256.1.1.1"),
        (["--init_model", "htps://user:hunter2@host/x"], "no weights htps://host/x"),
    ],
)
def test_wrong_options_are_one_line(words, message, capsys):
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with pytest.raises(SystemExit) as exit_:
        app.main(words)
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line
    assert "hunter2" not in line


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(files: Path, *options: str, **changed: int):
    """The page's address, served on a free port by `python app.py` with constants of it changed; its copies of uploads go to `files`.
    The server's log must hold no traceback in the end."""
    with started(files, *options, **changed) as (server, url):
        yield url
        assert server.poll() is None, "the server has ended"


@contextmanager
def started(files: Path, *options: str, sent_ctrl_c: bool = False, **changed: int):
    """The same, with the server's process; it is ended by SIGTERM, or as by Ctrl-C."""
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    files.mkdir(exist_ok=True)
    port, log = free_port(), files.with_name(f"{files.name}.log")
    program = (
        "import sys, app\n"
        + "".join(f"app.{name} = {value}\n" for name, value in changed.items())
        + "sys.exit(app.main())"
    )
    with open(log, "wb") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", program, "--port", str(port), *options],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env={**os.environ, "TMPDIR": str(files)},
        )
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(SECONDS):
            assert server.poll() is None, f"app.py ended: {log.read_text()}"
            try:
                with urllib.request.urlopen(url, timeout=2):
                    break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("the page does not answer")
        yield server, url
    finally:
        if server.poll() is None:
            server.send_signal(signal.SIGINT if sent_ctrl_c else signal.SIGTERM)
        server.wait(20)
    assert "Traceback" not in log.read_text()
    if server.returncode == -signal.SIGKILL:
        return
    assert server.returncode == (130 if sent_ctrl_c else 0)
    assert not [path for path in files.rglob("*") if path.name.startswith("clip4idc-page-")], (
        "nothing of visitors is left"
    )


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture
def page(address):
    """A browser's tab with the page."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs playwright (requirements-dev.txt)"
    )
    if not CHROMIUM:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
        )
        tab = browser.new_page(
            viewport={"width": 1280, "height": 1500},
            permissions=["clipboard-read", "clipboard-write"],
        )
        tab.set_default_timeout(SECONDS * 1000)
        tab.goto(address)
        tab.wait_for_selector("#caption")
        yield tab
        browser.close()


def upload(page, which: str, path: Path) -> None:
    page.set_input_files(f"#{which} input[type=file]", str(path))


def sentence(page) -> str:
    return page.input_value("#sentence textarea")


def wait_for_sentence(page, expected: str) -> None:
    page.wait_for_function(
        "wanted => document.querySelector('#sentence textarea').value === wanted", arg=expected
    )


def fill(page, name: str) -> None:
    for side in ("before", "after"):
        upload(page, side, EXAMPLES / f"{name}_{side}.png")
        page.wait_for_selector(f"#{side} img")


def choose(page, label: str, value: int) -> None:
    """Move a slider by its number field, and wait until the page has taken it; on a busy machine it now and then does not, the first time."""
    number, slider = (f"input[type={kind}][aria-label*='{label}']" for kind in ("number", "range"))
    page.wait_for_selector(number)
    for _ in range(SECONDS):
        page.fill(number, str(value))
        page.keyboard.press("Tab")
        page.wait_for_timeout(1000)
        if page.input_value(slider) == str(value):
            return
    pytest.fail(f"{label} does not move to {value}")


def test_upload_caption_swap_and_download(page, tmp_path):
    fill(page, "removed")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])
    page.wait_for_selector("#attention img")
    assert page.locator("#attention figure").count() == 3 + len(CAPTIONS["removed"].split()) + 1
    if os.environ.get("PAGE_PICTURE"):  # for the README
        page.wait_for_timeout(2000)  # until all has faded in
        page.screenshot(
            path=os.environ["PAGE_PICTURE"], clip={"x": 0, "y": 0, "width": 1280, "height": 1290}
        )
    with page.expect_download() as download:
        page.click("#download")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["captions"][0]["caption"] == CAPTIONS["removed"]
    sources = [page.get_attribute(f"#{side} img", "src") for side in ("before", "after")]
    page.click("#swap")
    page.wait_for_function(
        "old => document.querySelector('#before img').src !== old && document.querySelector('#before img').src",
        arg=sources[0],
    )
    page.click("#caption")
    page.wait_for_function(
        "old => document.querySelector('#sentence textarea').value !== old", arg=CAPTIONS["removed"]
    )
    assert "gone" not in sentence(page), "what is gone one way has come the other way"


def test_drop_and_paste(page):
    """The two other ways in: a file dragged onto a picture's place, and one from the clipboard."""
    images = {
        side: base64.b64encode((EXAMPLES / f"removed_{side}.png").read_bytes()).decode()
        for side in ("before", "after")
    }
    dropped = page.evaluate_handle(
        """data => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        return transfer; }""",
        images["before"],
    )
    page.dispatch_event("#before .image-container button", "drop", {"dataTransfer": dropped})
    page.wait_for_selector("#before img")
    page.evaluate(
        """async data => {
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]); }""",
        images["after"],
    )
    page.click("#after button[aria-label='Paste from clipboard']")
    page.wait_for_selector("#after img")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])


def test_an_example_that_ships_and_several_captions_of_it(page):
    page.click(".gallery-item >> nth=0")
    page.wait_for_selector("#after img")
    page.click("#caption")
    wait_for_sentence(page, next(iter(CAPTIONS.values())))
    page.wait_for_selector("#attention img")
    page.get_by_text("How words are chosen").click()
    choose(page, "Captions (more", 3)
    page.click("#caption")
    page.wait_for_function(
        "() => document.querySelector('#sentence textarea').value.split('\\n').length === 3"
    )
    page.wait_for_selector("#attention h3")
    assert page.locator("#attention h3").all_inner_texts() == sentence(page).split("\n")


def test_an_upload_over_the_stated_size_is_a_message(page, tmp_path):
    assert f"up to {app.MAX_MEGABYTES} MB" in page.inner_text("body")
    large = tmp_path / "large.png"
    large.write_bytes(
        (EXAMPLES / "added_before.png").read_bytes() + bytes(app.MAX_MEGABYTES * 2**20)
    )
    upload(page, "before", large)
    assert f"exceed the maximum allowed size of {app.MAX_MEGABYTES}.0" in page.inner_text(
        ".toast-message-text"
    )
    assert page.locator("#before img").count() == 0


def test_beams_and_several_captions_together_are_a_message(page):
    fill(page, "removed")
    page.click("#caption")
    page.wait_for_selector("#attention img")
    page.get_by_text("How words are chosen").click()
    for label in ("Captions (more", "Beams"):
        choose(page, label, 3)
    page.click("#caption")
    assert "do not go together" in page.inner_text(".toast-message-text")
    assert page.locator("#attention img").count() == 0 or not page.is_visible("#attention"), (
        "what was found before is gone"
    )


def test_a_broken_file_is_a_message_and_the_page_goes_on(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    upload(page, "before", broken)
    upload(page, "after", EXAMPLES / "added_after.png")
    page.wait_for_selector("#after img")
    page.click("#caption")
    assert page.inner_text(".toast-message-text").startswith(
        "The before file is not an image that can be read"
    )
    page.reload()
    page.wait_for_selector("#caption")
    fill(page, "added")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["added"])


def test_nothing_is_wider_than_a_phone(page):
    page.set_viewport_size({"width": 375, "height": 800})
    fill(page, "recolored")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["recolored"])
    page.wait_for_selector("#attention img")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375


def send(address: str, path: Path) -> str:
    """Upload a file as the page does; returns the server's name of it."""
    border = uuid.uuid4().hex
    head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()
    request = urllib.request.Request(
        f"{address}gradio_api/upload",
        body,
        {"Content-Type": f"multipart/form-data; boundary={border}"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)[0]


def ask(address: str, before: str, after: str) -> str:
    """Call the page's function on two files of the server; returns the events that came back."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in (before, after)] + [
        1,
        0,
        1,
        1,
        0.9,
        42,
    ]
    call = f"{address}gradio_api/call/caption"
    request = urllib.request.Request(
        call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=SECONDS) as answer:
        return answer.read().decode()


def call(address: str, route: str, body: object) -> tuple[int, str]:
    """Post JSON, or bytes as they are; returns status and answer."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(address + route, content, {"Content-Type": "application/json"})


def request(
    url: str, content: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(
            urllib.request.Request(url, content, headers or {}), timeout=SECONDS
        ) as answer:
            return answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


SETTINGS = [1, 0, 1, 1, 0.9, 42]
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


def swap_number(address: str) -> int:
    """The number of the function that swaps the pictures."""
    functions = json.loads(request(f"{address}config")[1])["dependencies"]
    return next(
        one["id"]
        for one in functions
        if one["backend_fn"] and len(one["inputs"]) == len(one["outputs"]) == 2
    )


def hostile_paths(upload: Path) -> list[object]:
    """What a visitor may name who wants a file that is no upload; links lie in the folder already."""
    root, other = upload.parents[1], EXAMPLES / "removed_after.png"
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


@pytest.fixture
def upload_with_links(address):
    """A sound upload; beside it in the folder lie links that lead out of it."""
    path = Path(send(address, EXAMPLES / "removed_before.png"))
    link, folder = (path.parents[1] / name for name in ("link.png", "folder"))
    link.symlink_to(EXAMPLES / "removed_after.png")
    folder.symlink_to(EXAMPLES)
    yield path
    link.unlink()
    folder.unlink()


@pytest.mark.parametrize(
    "mark",
    [
        {},
        {"meta": {"_type": "gradio.FileData"}},
        {"meta": {}},
        {"meta": {"_type": "x"}},
        {"url": "x", "orig_name": "a.png"},
    ],
    ids=["bare", "marked", "empty mark", "false mark", "with url"],
)
def test_no_file_is_opened_or_handed_out_that_was_not_uploaded(address, upload_with_links, mark):
    sound = {"path": str(upload_with_links), **mark}
    number = swap_number(address)
    for path in hostile_paths(upload_with_links):
        hostile = {"path": path, **mark}
        for pair in ([hostile, sound], [sound, hostile]):
            assert call(address, "gradio_api/call/caption", {"data": [*pair, *SETTINGS]})[0] in (
                400,
                403,
                422,
            ), path
            body = {"data": pair, "fn_index": number, "session_hash": "visitor"}
            assert call(address, "gradio_api/queue/join", body)[0] in (400, 403, 422), path
        for route in ("run/caption", "api/caption", "call/v2/caption"):
            assert call(address, f"gradio_api/{route}", {"data": [hostile, hostile, *SETTINGS]})[
                0
            ] in (400, 404), path
        arguments = dict(zip(ARGUMENTS, [hostile, hostile, *SETTINGS], strict=True))
        assert call(address, "gradio_api/call/v2/caption", arguments)[0] in (400, 404), path
    status, answer = call(address, "gradio_api/call/caption", {"data": [sound, sound, *SETTINGS]})
    assert status == 200
    assert (
        "event: complete"
        in request(f"{address}gradio_api/call/caption/{json.loads(answer)['event_id']}")[1]
    )


def test_the_components_refuse_what_the_guard_would_let_through(tmp_path):
    """The second door: the page itself asks for uploads, whoever calls it."""
    gr = pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    page = app.build_page(None, "", UploadFolder(tmp_path, 60, 10**9))
    images = [block for block in page.blocks.values() if isinstance(block, gr.Image)]
    assert len(images) == 2
    for image in images:
        for path in (str(EXAMPLES / "removed_before.png"), "/dev/zero", "http://127.0.0.1/x.png"):
            with pytest.raises(gr.Error, match="not uploaded"):
                image.preprocess(image.data_model(path=path))
            with pytest.raises(gr.Error, match="not uploaded"):
                asyncio.run(image.async_move_resource_to_block_cache(path))


def test_values_that_are_no_picture_and_no_number_are_refused(address):
    sound = {"path": send(address, EXAMPLES / "removed_before.png")}
    for value in (
        {"url": "http://127.0.0.1/x.png"},
        [sound],
        [sound["path"]],
        sound["path"],
        5,
        [],
        {},
        {"path": [sound["path"]]},
    ):
        assert (
            call(address, "gradio_api/call/caption", {"data": [value, value, *SETTINGS]})[0] == 422
        ), value
    for place, value in (
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
    ):
        settings = [*SETTINGS]
        settings[place] = value
        assert (
            call(address, "gradio_api/call/caption", {"data": [sound, sound, *settings]})[0] == 422
        ), (place, value)
    for data in (None, {}, [], [sound], [sound, sound, *SETTINGS, 1]):
        assert call(address, "gradio_api/call/caption", {"data": data})[0] == 422, data


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
def test_bodies_that_are_no_calls_are_refused(address, route):
    for content in (
        b"",
        b"x",
        b"[]",
        b"5",
        b'{"session_hash": 1e400}',
        b'{"\\ud800": 1}',
        b'{"a": 1, "a": 2}',
        b"[" * 100_000,
        b'{"data": NaN}',
        b"\xff",
        b'{"data": {}}',
        b'{"fn_index": 10000000}',
    ):
        assert 400 <= call(address, f"gradio_api/{route}", content)[0] < 500, content[:20]
    assert call(address, f"gradio_api/{route}", b" " * (3 << 19))[0] in (404, 413)


def test_only_uploads_can_be_fetched(address, upload_with_links):
    assert request(f"{address}gradio_api/file={upload_with_links}")[0] == 200
    for path in hostile_paths(upload_with_links):
        name = urllib.parse.quote(str(path), errors="surrogatepass")
        assert request(f"{address}gradio_api/file={name}")[0] in (403, 404), path
    assert request(f"{address}gradio_api/file={upload_with_links.parent}/other.png")[0] == 404


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
def test_nothing_else_of_gradio_answers(address, route):
    assert request(address + route)[0] in (403, 404)


def send_raw(address: str, content: bytes) -> bytes:
    """The first bytes of the answer to bytes as they are."""
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as visitor:
        visitor.sendall(content)
        return visitor.recv(100)


@pytest.mark.parametrize(
    ("host", "status"),
    [
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
    ],
)
def test_other_names_than_the_pages_own_get_421(address, host, status):
    answer = send_raw(
        address, f"GET /config HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode()
    )
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())
    sent = f"POST /gradio_api/reset HTTP/1.1\r\nHost: 127.0.0.1\r\nOrigin: http://{host}\r\nContent-Length: 2\r\n\r\n{{}}"
    if status == 421 and "\r" not in host:
        assert send_raw(address, sent.encode()).startswith(b"HTTP/1.1 403 "), (
            "another site's page sends nothing here"
        )


def test_the_names_of_a_page_that_listens_everywhere():
    for host in ("0.0.0.0", "::"):
        assert {socket.gethostname().lower(), "127.0.0.1", "localhost", host} <= own_hosts(host)
    assert own_hosts("192.0.2.7") == {"localhost", "127.0.0.1", "::1", "192.0.2.7"}
    assert plain_names(["Page.example", "[2001:DB8::0:1]", "a b"]) == {
        "page.example",
        "2001:db8::1",
    }
    assert [
        host_name(name)
        for name in ("A.b:80", "[::1]:9", "::1", "x:y", "[::1", "a b", "", "x.", "localhost%.evil")
    ] == ["a.b", "::1", "::1", None, None, None, None, "x", None]


def exchange(address: str, *lines: str) -> str:
    """The head and the first of the answer to a request of these lines."""
    host = address.removeprefix("http://").rstrip("/")
    own = [] if any(line.lower().startswith("host:") for line in lines) else [f"Host: {host}"]
    return send_raw(
        address,
        "\r\n".join([lines[0], *own, *lines[1:], "Connection: close", "", ""]).encode("latin-1"),
    ).decode("latin-1")


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
def test_headers_and_queries_that_a_visitor_invents_change_nothing(address, lines):
    assert exchange(address, *lines).startswith("HTTP/1.1 200 ")


def test_what_nobody_foresaw_is_one_line_of_the_log_and_no_traceback(tmp_path, caplog):
    """Whatever the application behind the guard raises; an answer that has begun is ended."""
    begun = {
        "type": "http.response.start",
        "status": 200,
        "headers": [(b"access-control-allow-origin", b"*"), (b"a", b"b")],
    }
    sent: list[dict] = []

    async def send(message):
        sent.append(message)

    def answer_of(*messages: dict) -> list[dict]:
        async def broken(scope, receive, answer):
            for message in messages:
                await answer(message)
            raise KeyError("a\nb\x1b[2J")

        sent.clear()
        guard = Guard(
            broken,
            frozenset({"localhost"}),
            frozenset(),
            UploadFolder(tmp_path, 60, 10**9),
            [],
            None,
        )
        scope = {
            "type": "http",
            "method": "GET",
            "path": "/config",
            "query_string": b"",
            "headers": [(b"host", b"localhost")],
        }
        asyncio.run(guard(scope, None, send))
        return sent

    assert [message.get("status") for message in answer_of()] == [500, None]
    assert answer_of(begun, ended := {"type": "http.response.body", "body": b"x"})[1:] == [ended], (
        "nothing follows an end"
    )
    assert answer_of(begun) == [
        {**begun, "headers": [(b"a", b"b")]},
        {"type": "http.response.body", "body": b""},
    ]
    lines = [SafeFormatter("%(message)s").format(record) for record in caplog.records]
    assert lines == ["GET /config: KeyError: 'a\\nb\\x1b[2J'"] * 3
    assert not any(record.exc_info for record in caplog.records)


def test_one_request_does_not_hold_up_the_others(address):
    """Paths of many parts, and encodings whose work grows with the square of the text."""
    long = json.dumps({"data": [{"path": "a/" * 250_000}, None, *SETTINGS]}).encode()
    head = b'--x\r\nContent-Disposition: form-data; name="f-"\r\n\r\na-'
    start = time.monotonic()
    assert call(address, "gradio_api/call/caption", long)[0] == 403
    assert request(f"{address}gradio_api/file={'a/' * 20_000}")[0] == 403
    kind = {"Content-Type": "multipart/form-data; boundary=x; charset=punycode"}
    assert (
        request(f"{address}gradio_api/upload", head + b"a" * 900_000 + b"\r\n--x--\r\n", kind)[0]
        == 400
    )
    assert request(f"{address}assets/{'a/' * 3000}")[0] == 404
    assert time.monotonic() - start < 5


def test_whole_numbers_may_be_written_as_floats(address):
    for number in (1.0, -0.0, 1):
        status, answer = call(address, "gradio_api/run/load_example", {"data": [number]})
        if status == 404:
            pytest.skip("this Gradio calls its examples otherwise")
        assert status == 200
        assert "path" in answer


def test_other_sites_read_and_send_nothing(address):
    port = int(address.rstrip("/").rpartition(":")[2])
    evil = "Origin: http://evil.example"
    host, number = "127.0.0.1", port
    with socket.create_connection((host, number), timeout=10) as visitor:
        visitor.sendall(
            f"GET /config HTTP/1.1\r\nHost: {host}\r\n{evil}\r\nConnection: close\r\n\r\n".encode()
        )
        head = b"".join(iter(lambda: visitor.recv(65536), b"")).partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 200 ")
    assert b"access-control-" not in head.lower()
    for origin in (
        evil,
        "Origin: null",
        f"Origin: http://localhost:{port + 1}",
        f"Origin: http://127.0.0.1:{port + 1}",
        "Origin: http://[::1",
    ):
        assert exchange(
            address, "POST /gradio_api/reset HTTP/1.1", origin, "Content-Length: 0"
        ).startswith("HTTP/1.1 403 "), origin
    assert exchange(
        address,
        "POST /gradio_api/reset HTTP/1.1",
        f"Origin: http://127.0.0.1:{port}",
        "Content-Length: 0",
    ).startswith("HTTP/1.1 400 ")


def test_answers_are_fetched_by_those_who_asked_and_once(address, upload_with_links):
    sound = {"path": str(upload_with_links)}
    event = json.loads(
        call(address, "gradio_api/call/caption", {"data": [sound, sound, *SETTINGS]})[1]
    )["event_id"]
    assert request(f"{address}gradio_api/queue/data?session_hash=nobody")[0] == 404
    assert request(f"{address}gradio_api/call/none/{event}")[0] == 404
    assert "event: complete" in request(f"{address}gradio_api/call/caption/{event}")[1]
    body = {"data": [sound, sound], "fn_index": swap_number(address), "session_hash": "someone"}
    event = json.loads(call(address, "gradio_api/queue/join", body)[1])["event_id"]
    assert request(f"{address}gradio_api/queue/data?session_hash={event}")[0] == 404
    assert '"success":true' in request(f"{address}gradio_api/queue/data?session_hash=someone")[1]


def test_what_is_announced_does_not_count_and_what_comes_in_pieces_does(tmp_path):
    """By the server's own upload, without Gradio: bodies that lie about their length."""
    uploads = UploadFolder(tmp_path, 60, 1_000_000)
    stored = uploads.store("a.png", io.BytesIO(bytes(500_000)))

    def parts(count: int, size: int):
        head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
        return iter([head, *[bytes(size)] * count, b"\r\n--x--\r\n"])

    def send_in(body, **headers: str) -> tuple[int, bytes]:
        messages = [{"type": "http.request", "body": part, "more_body": True} for part in body] + [
            {"type": "http.request", "body": b""}
        ]
        given = {
            "content-type": "multipart/form-data; boundary=x",
            **{name.replace("_", "-"): value for name, value in headers.items()},
        }
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/",
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in given.items()],
        }

        async def receive():
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        answer = asyncio.run(receive_upload(Request(scope, receive), uploads, 600_000))
        return answer.status_code, answer.body

    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    from starlette.requests import Request

    assert send_in(iter([]), content_length="1200000")[0] == 400
    assert stored.is_file(), "what was only announced drives nothing out"
    assert send_in(parts(20, 100_000), content_length="1", transfer_encoding="chunked")[0] in (
        413,
        503,
    )
    assert send_in(parts(11, 50_000), transfer_encoding="chunked")[0] == 200
    assert not stored.exists(), "the oldest makes room"
    assert send_in(parts(11, 100_000), transfer_encoding="chunked")[0] in (413, 503)
    assert uploads._arriving == 0


def form(name: str, content: bytes, files: int = 1) -> tuple[bytes, dict[str, str]]:
    part = (
        f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'.encode()
        + content
        + b"\r\n"
    )
    return part * files + b"--x--\r\n", {"Content-Type": "multipart/form-data; boundary=x"}


def test_uploads_that_are_none_or_too_large_are_refused_and_leave_nothing(
    address, upload_with_links
):
    root = upload_with_links.parents[1]
    before = sorted(root.iterdir())
    for content, headers in (
        (b"x", {"Content-Type": "text/plain"}),
        (b"x", {"Content-Type": "multipart/form-data"}),
        form("a", b"b", files=3),
        (b"", form("", b"")[1]),
        (b"--y", form("", b"")[1]),
        (b"--x\r\nContent-Disposition: form-data\r\n\r\nb\r\n--x--\r\n", form("", b"")[1]),
    ):
        assert request(f"{address}gradio_api/upload", content, headers)[0] == 400
    for size in (app.MAX_MEGABYTES * 2**20 + 1, 3 * app.MAX_MEGABYTES * 2**20):
        assert request(f"{address}gradio_api/upload", *form("a.png", bytes(size)))[0] == 413
    assert sorted(root.iterdir()) == before
    assert not [
        file for file in root.parent.iterdir() if file.is_file() and not file.name.endswith(".lock")
    ]


def test_hostile_names_of_uploads_and_models_are_text(address, page, tmp_path):
    """Names with HTML and controls in the browser: no script of theirs runs, no element of theirs is made."""
    asked = []
    page.on("request", lambda one: asked.append(one.url))
    page.on("dialog", lambda one: pytest.fail(f"a script has run: {one.message}"))
    for number, name in enumerate(
        (
            "<img src=x onerror=alert(1)>.png",
            "\x1b[31m\nall 9.png",
            "..png",
            "'\"><script>alert(2)</script>.png",
            "‮gnp.png",
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / name.replace("/", "∕")
        shutil.copy(EXAMPLES / "removed_before.png", path)
        page.reload()
        page.wait_for_selector("#caption")
        upload(page, "before", path)
        page.wait_for_selector("#before img")
    upload(page, "after", EXAMPLES / "removed_after.png")
    page.wait_for_selector("#after img")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])
    names = [urllib.parse.urlsplit(url).path.rpartition("/")[2] for url in asked if "/file=" in url]
    assert names
    assert all(
        set(name) <= set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")
        for name in names
    )


def test_a_models_card_is_text_on_the_page():
    sly = "mine\n\n# Session expired\n\n[Log in](http://127.0.0.1:9/) ![](http://127.0.0.1:9/p.png) <form action=x> **b** `c` | d\x1b[31m"
    shown = markdown_text(sly)
    assert "\n" not in shown
    assert "\x1b" not in shown
    for mark in ("# S", "[L", "](", "![", "<form", "**b", "`c"):
        assert not re.search(rf"(?<!\\){re.escape(mark)}", shown), mark
    assert len(markdown_text("a" * 10**6)) == 300


def test_thirty_visitors_at_once_are_all_answered_rightly(address):
    files = {
        name: [send(address, EXAMPLES / f"{name}_{side}.png") for side in ("before", "after")]
        for name in CAPTIONS
    }
    names = (list(CAPTIONS) * 30)[:30]
    with ThreadPoolExecutor(len(names)) as visitors:
        answers = list(visitors.map(lambda name: ask(address, *files[name]), names))
    for name, answer in zip(names, answers, strict=True):
        assert json.loads(answer.rsplit("data: ", 1)[1])[0] == CAPTIONS[name]


def test_nothing_a_visitor_sent_is_kept(tmp_path):
    """By age, also what broke off; and when the server is killed, the next one takes it away."""
    own = tmp_path / "own.png"
    Image.open(EXAMPLES / "moved_before.png").rotate(5).save(own)
    files = tmp_path / "files"

    def lies_there(content: bytes) -> bool:
        return any(content in path.read_bytes() for path in files.rglob("*") if path.is_file())

    with started(files, "--upload_age", "3") as (server, url):
        sent = send(url, own)
        assert files in Path(sent).parents
        assert "event: complete" in ask(url, sent, sent)
        head = b"POST /gradio_api/upload HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 9000000\r\n\r\n"
        with socket.create_connection(
            ("127.0.0.1", int(url.rpartition(":")[2].rstrip("/")))
        ) as visitor:
            visitor.sendall(head + form("cut.png", b"broken off " * 200_000)[0][:-10])
        deadline = time.monotonic() + 30
        while lies_there(own.read_bytes()) or lies_there(b"broken off "):
            assert time.monotonic() < deadline, "the upload is still there"
            time.sleep(0.5)
        assert (EXAMPLES / "moved_before.png").read_bytes() in [
            path.read_bytes() for path in files.rglob("*.png")
        ], "examples stay"
        sent = send(url, own)
        server.kill()
        server.wait()
    assert Path(sent).is_file()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(files))
        with open_upload_folder(60, 10**9) as uploads:
            assert not Path(sent).exists(), "what an earlier server left goes at the start"
            remove_orphans(files)
            assert uploads.root.is_dir(), "a server that runs keeps its own"
        assert not [path for path in files.iterdir() if path.name.startswith("clip4idc-page-")]


def test_the_oldest_uploads_make_room_for_new_ones(tmp_path):
    uploads = UploadFolder(tmp_path, 1000, 300_000)
    stay = uploads.store("example.png", io.BytesIO(bytes(200_000)))
    uploads.keep_present()
    paths = []
    for number in range(4):
        with uploads.arriving() as arrived:
            arrived(100_000)
            uploads.sweep()
            paths.append(uploads.store("a.png", io.BytesIO(bytes(100_000))))
        os.utime(paths[-1], (number, time.time() - 100 + number))
        os.utime(paths[-1].parent, (number, time.time() - 100 + number))
    uploads.sweep()
    assert [path.exists() for path in paths] == [False, False, True, True]
    assert stay.is_file()
    with uploads.arriving() as arrived, uploads.arriving() as other:
        assert sum(path.exists() for path in paths) == 2, "what is only announced takes no room"
        arrived(250_000)
        uploads.sweep()
        assert not any(path.exists() for path in paths)
        with pytest.raises(NoRoom):
            other(100_000)
    with uploads.arriving() as arrived:
        arrived(290_000)
    for _ in range(40):
        (tmp_path / secrets.token_hex(4)).mkdir()
        uploads.store("", io.BytesIO(b""))
    uploads.sweep()
    assert len(list(tmp_path.iterdir())) < 81, "empty files and folders take room, too"


def test_an_upload_that_the_disk_does_not_take_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(
        shutil, "copyfileobj", lambda *_: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OSError, match="full"):
        UploadFolder(tmp_path, 60, 10**9).store("a.png", io.BytesIO(b"x"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "kept"),
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
def test_uploads_are_called_by_plain_names(name, kept):
    assert safe_name(name) == kept


def slow_picture() -> bytes:
    """A JPEG of 300 kB that a decoder works on for minutes: the last of its scans 3,000 times."""
    buffer = io.BytesIO()
    Image.new("L", (6000, 6000)).save(buffer, "JPEG", progressive=True)
    whole = buffer.getvalue()
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    return whole[:-2] + 3000 * scan + whole[-2:]


def test_a_picture_that_takes_too_long_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(app, "MAX_SECONDS", 1)
    uploads = UploadFolder(tmp_path, 60, 10**9)
    sound = str(uploads.store("a.png", io.BytesIO((EXAMPLES / "removed_before.png").read_bytes())))
    slow = str(uploads.store("b.jpg", io.BytesIO(slow_picture())))
    start = time.monotonic()
    with pytest.raises(ValueError, match="The after image takes too long"):
        app.decode_uploads([sound, slow], uploads)
    assert time.monotonic() - start < 10
