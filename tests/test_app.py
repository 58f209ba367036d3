"""The web page in headless Chromium: upload, drop, paste, examples, caption, swap, a broken or oversized file, a phone's width; what
is refused before decoding, how requests wait for each other, and that nothing stays."""

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import app
from modules.predictor import Caption, Explanation
from tests.conftest import ROOT

EXAMPLES = ROOT / "docs" / "examples"
CAPTIONS = json.loads((EXAMPLES / "captions.json").read_text())
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SECONDS = 120


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
    image, sly = Image.new("RGB", (20, 20)), "<script>alert(1)</script>"
    explanation = Explanation(Caption(sly, -1.0), (sly,), np.zeros((2, 2, 6, 6)), np.zeros((1, 2, 6, 6)))
    page = app.attention_html(image, image, [explanation, explanation])
    assert "<script>" not in page
    assert page.count("<h3>&lt;script&gt;") == 2
    assert page.count("data:image/jpeg;base64,") == 16
    assert "<h3>" not in app.attention_html(image, image, [explanation])


@pytest.mark.parametrize(("words", "message"), [(["--port", "99999"], "--port is 99999"), (["--init_model", "nowhere"], "no weights")])
def test_wrong_options_are_one_line(words, message, capsys):
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    with pytest.raises(SystemExit) as exit_:
        app.main(words)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


@contextmanager
def served(files: Path, **changed: int):
    """The page's address, served on a free port by `python app.py` with constants of it changed; its copies of uploads go to `files`."""
    pytest.importorskip("gradio", reason="the page needs requirements-app.txt")
    files.mkdir(exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = "import sys, app\n" + "".join(f"app.{name} = {value}\n" for name, value in changed.items()) + "sys.exit(app.main())"
    server = subprocess.Popen([sys.executable, "-c", program, "--port", str(port)], cwd=ROOT, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL, env={**os.environ, "TMPDIR": str(files)})
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


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture
def page(address):
    """A browser's tab with the page."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser test needs playwright (requirements-dev.txt)")
    if not CHROMIUM:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=[
            "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync"])
        tab = browser.new_page(viewport={"width": 1280, "height": 1500}, permissions=["clipboard-read", "clipboard-write"])
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


def test_drop_and_paste(page):
    """The two other ways in: a file dragged onto a picture's place, and one from the clipboard."""
    images = {side: base64.b64encode((EXAMPLES / f"removed_{side}.png").read_bytes()).decode() for side in ("before", "after")}
    dropped = page.evaluate_handle("""data => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], "dropped.png", {type: "image/png"}));
        return transfer; }""", images["before"])
    page.dispatch_event("#before .image-container button", "drop", {"dataTransfer": dropped})
    page.wait_for_selector("#before img")
    page.evaluate("""async data => {
        const bytes = Uint8Array.from(atob(data), letter => letter.charCodeAt(0));
        await navigator.clipboard.write([new ClipboardItem({"image/png": new Blob([bytes], {type: "image/png"})})]); }""", images["after"])
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
    page.wait_for_function("() => document.querySelector('#sentence textarea').value.split('\\n').length === 3")
    page.wait_for_selector("#attention h3")
    assert page.locator("#attention h3").all_inner_texts() == sentence(page).split("\n")


def test_an_upload_over_the_stated_size_is_a_message(page, tmp_path):
    assert f"up to {app.MAX_MEGABYTES} MB" in page.inner_text("body")
    large = tmp_path / "large.png"
    large.write_bytes((EXAMPLES / "added_before.png").read_bytes() + bytes(app.MAX_MEGABYTES * 2**20))
    upload(page, "before", large)
    assert f"exceed the maximum allowed size of {app.MAX_MEGABYTES}.0" in page.inner_text(".toast-message-text")
    assert page.locator("#before img").count() == 0


def test_an_upload_that_is_gone_is_a_message(page, tmp_path):
    with pytest.raises(ValueError, match="no longer on the server"):
        app.open_upload(str(tmp_path / "gone.png"), "before")
    fill(page, "removed")
    page.click("#caption")
    page.wait_for_selector("#attention img")
    page.get_by_text("How words are chosen").click()
    for label in ("Captions (more", "Beams"):
        choose(page, label, 3)
    page.click("#caption")
    assert "do not go together" in page.inner_text(".toast-message-text")
    assert page.locator("#attention img").count() == 0 or not page.is_visible("#attention"), "what was found before is gone"


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


def send(address: str, path: Path) -> str:
    """Upload a file as the page does; returns the server's name of it."""
    border = uuid.uuid4().hex
    head = f'--{border}\r\nContent-Disposition: form-data; name="files"; filename="{path.name}"\r\nContent-Type: image/png\r\n\r\n'
    body = head.encode() + path.read_bytes() + f"\r\n--{border}--\r\n".encode()
    request = urllib.request.Request(f"{address}gradio_api/upload", body, {"Content-Type": f"multipart/form-data; boundary={border}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)[0]


def ask(address: str, before: str, after: str) -> str:
    """Call the page's function on two files of the server; returns the events that came back."""
    data = [{"path": path, "meta": {"_type": "gradio.FileData"}} for path in (before, after)] + [1, 0, 1, 1, 0.9, 42]
    call = f"{address}gradio_api/call/caption"
    request = urllib.request.Request(call, json.dumps({"data": data}).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{call}/{event}", timeout=SECONDS) as answer:
        return answer.read().decode()


def test_requests_at_once_wait_for_each_other_and_all_are_answered(address):
    names = list(CAPTIONS) * 2
    files = {name: [send(address, EXAMPLES / f"{name}_{side}.png") for side in ("before", "after")] for name in CAPTIONS}
    with ThreadPoolExecutor(len(names)) as visitors:
        answers = list(visitors.map(lambda name: ask(address, *files[name]), names))
    for name, answer in zip(names, answers, strict=True):
        assert "event: complete" in answer
        assert json.loads(answer.rsplit("data: ", 1)[1])[0] == CAPTIONS[name]


def test_nothing_a_visitor_sent_is_kept(tmp_path):
    own = tmp_path / "own.png"
    Image.open(EXAMPLES / "moved_before.png").rotate(5).save(own)
    files = tmp_path / "files"
    with served(files, KEPT_SECONDS=2) as url:
        sent = send(url, own)
        assert files in Path(sent).parents
        assert "event: complete" in ask(url, sent, sent)
        for _ in range(30):
            if not any(path.is_file() and path.read_bytes() == own.read_bytes() for path in files.rglob("*")):
                return
            time.sleep(1)
        pytest.fail("the upload is still there")


def test_no_file_of_the_server_can_be_named(address):
    """Neither through Gradio's file route nor as an input of the page's own function."""
    for path in ("/etc/passwd", str(ROOT / "app.py")):
        with pytest.raises(OSError, match="40[34]"):
            urllib.request.urlopen(f"{address}gradio_api/file={path}", timeout=10)
    for path in ("/etc/passwd", str(EXAMPLES / "captions.json"), str(EXAMPLES / "removed_before.png") + "/../removed_after.png"):
        assert ask(address, path, path).startswith("event: error"), path
