"""The web page in headless Chromium: upload, caption, swap, a broken file, a phone's width; and what is refused before decoding."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import app
from tests.conftest import ROOT

EXAMPLES = ROOT / "docs" / "examples"
CAPTIONS = json.loads((EXAMPLES / "captions.json").read_text())
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 60


def test_uploads_are_looked_at_before_they_are_decoded(tmp_path, monkeypatch):
    broken = tmp_path / "broken.png"
    broken.write_bytes((EXAMPLES / "removed_before.png").read_bytes()[:300])
    text = tmp_path / "text.png"
    text.write_text("no image")
    for path, message in ((None, "missing"), (str(broken), "not an image"), (str(text), "not an image")):
        with pytest.raises(ValueError, match=f"before .*{message}"):
            app.open_upload(path, "before")
    monkeypatch.setattr(app, "MAX_MEGAPIXELS", 0.01)
    with pytest.raises(ValueError, match="million pixels"):
        app.open_upload(str(EXAMPLES / "removed_before.png"), "before")
    monkeypatch.setattr(app, "MAX_MEGABYTES", 0.001)
    with pytest.raises(ValueError, match="larger than"):
        app.open_upload(str(EXAMPLES / "removed_before.png"), "before")


def test_what_a_sentence_holds_is_text_in_the_page():
    class Sly:
        pieces = ("<script>alert(1)</script>",)
        classes = words = np.zeros((2, 2, 6, 6))

    image = Image.new("RGB", (20, 20))
    sly = Sly()
    sly.words = np.zeros((1, 2, 6, 6))
    page = app.attention_html(image, image, sly)
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert page.count("data:image/jpeg;base64,") == 8


@pytest.mark.parametrize(("words", "message"), [(["--port", "99999"], "--port is 99999"), (["--init_model", "nowhere"], "no checkpoint")])
def test_wrong_options_are_one_line(words, message, capsys):
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with pytest.raises(SystemExit) as exit_:
        app.main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture(scope="module")
def address():
    """The page, served by `python app.py` on a free port."""
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen([sys.executable, str(ROOT / "app.py"), "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(SECONDS):
            assert server.poll() is None, "app.py ended"
            try:
                with urllib.request.urlopen(url, timeout=2):
                    break
            except OSError:
                time.sleep(1)
        else:
            pytest.fail("the page does not answer")
        yield url
    finally:
        server.terminate()
        server.wait(20)


@pytest.fixture
def page(address):
    """A browser's tab with the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright (requirements-dev.txt)")
    if not CHROMIUM:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1500})
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
    page.wait_for_function("wanted => document.querySelector('#sentence textarea').value === wanted", arg=expected)


def fill(page, name: str) -> None:
    for side in ("before", "after"):
        upload(page, side, EXAMPLES / f"{name}_{side}.png")
        page.wait_for_selector(f"#{side} img")


def test_upload_caption_swap_and_download(page, tmp_path):
    fill(page, "removed")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])
    page.wait_for_selector("#attention img")
    assert page.locator("#attention figure").count() == 3 + len(CAPTIONS["removed"].split()) + 1
    if os.environ.get("PAGE_PICTURE"):  # for the README
        page.wait_for_timeout(2000)  # until all has faded in
        page.screenshot(path=os.environ["PAGE_PICTURE"], clip={"x": 0, "y": 0, "width": 1280, "height": 1290})
    with page.expect_download() as download:
        page.click("#download")
    saved = json.loads(Path(download.value.path()).read_text())
    assert saved["captions"][0]["caption"] == CAPTIONS["removed"]
    sources = [page.get_attribute(f"#{side} img", "src") for side in ("before", "after")]
    page.click("#swap")
    page.wait_for_function("old => document.querySelector('#before img').src !== old && document.querySelector('#before img').src",
                           arg=sources[0])
    page.click("#caption")
    page.wait_for_function("old => document.querySelector('#sentence textarea').value !== old", arg=CAPTIONS["removed"])
    assert "gone" not in sentence(page), "what is gone one way has come the other way"


def test_a_broken_file_is_a_message_and_the_page_goes_on(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    upload(page, "before", broken)
    upload(page, "after", EXAMPLES / "added_after.png")
    page.wait_for_selector("#after img")
    page.click("#caption")
    assert page.inner_text(".toast-message-text") == "The before file is not an image that can be read."
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


def test_no_file_of_the_server_can_be_named(address):
    """Neither through Gradio's file route nor as an input of the page's own function."""
    for path in ("/etc/passwd", str(ROOT / "app.py")):
        with pytest.raises(OSError, match="40[34]"):
            urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=10)
    call = f"{address}gradio_api/call/caption"
    for path in ("/etc/passwd", str(EXAMPLES / "captions.json"), str(EXAMPLES / "removed_before.png") + "/../removed_after.png"):
        data = [{"path": path, "meta": {"_type": "gradio.FileData"}}] * 2 + [1, 0, 1, 1, 0.9, 42]
        request = urllib.request.Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=10) as answer:
            event = json.load(answer)["event_id"]
        with urllib.request.urlopen(f"{call}/{event}", timeout=30) as answer:
            assert answer.read().startswith(b"event: error"), path
