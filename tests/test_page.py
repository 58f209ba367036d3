"""The page in headless Chromium, as visitors use it, and with files that try to break it."""

import base64
import json
import os
import shutil
import string
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

from modules.web.image_decoding import MAX_MEGABYTES
from tests.page_server import CAPTIONS, EXAMPLES, SECONDS, running_page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SENTENCE = "document.querySelector('#sentence textarea').value"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with running_page(tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture
def page(url):
    """A browser's tab with the page."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs playwright (requirements-dev.txt)"
    )
    if not CHROMIUM:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        tab = browser.new_page(
            viewport={"width": 1280, "height": 1500},
            permissions=["clipboard-read", "clipboard-write"],
        )
        tab.set_default_timeout(SECONDS * 1000)
        tab.goto(url)
        tab.wait_for_selector("#caption")
        yield tab
        browser.close()


def choose_file(page, side: str, path: Path) -> None:
    page.set_input_files(f"#{side} input[type=file]", str(path))


def fill(page, name: str) -> None:
    """Upload both pictures of an example pair."""
    for side in ("before", "after"):
        choose_file(page, side, EXAMPLES / f"{name}_{side}.png")
        page.wait_for_selector(f"#{side} img")


def sentence(page) -> str:
    return page.input_value("#sentence textarea")


def wait_for_sentence(page, expected: str) -> None:
    page.wait_for_function(f"expected => {SENTENCE} === expected", arg=expected)


def message(page) -> str:
    """The text of the page's next message."""
    return page.inner_text(".toast-message-text")


def move_slider(page, label: str, value: int) -> None:
    """Move a slider by its number field.

    On a busy machine the page may miss the first input, so it is repeated.
    """
    number = f"input[type=number][aria-label*='{label}']"
    slider = f"input[type=range][aria-label*='{label}']"
    page.wait_for_selector(number)
    for _ in range(SECONDS):
        page.fill(number, str(value))
        page.keyboard.press("Tab")
        page.wait_for_timeout(500)
        if page.input_value(slider) == str(value):
            return
    pytest.fail(f"{label} does not move to {value}")


def test_upload_caption_swap_and_download(page):
    fill(page, "removed")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])
    page.wait_for_selector("#attention img")
    num_words = len(CAPTIONS["removed"].split())
    assert page.locator("#attention figure").count() == 3 + num_words + 1
    save_picture_for_readme(page)
    with page.expect_download() as download:
        page.click("#download")
    saved = json.loads(Path(download.value.path()).read_text())
    assert [row["caption"] for row in saved["captions"]] == [CAPTIONS["removed"]]
    assert saved["decoding"]["beam_size"] == 1
    source = page.get_attribute("#before img", "src")
    page.click("#swap")
    page.wait_for_function(
        "old => ![null, old].includes(document.querySelector('#before img')?.getAttribute('src'))",
        arg=source,
    )
    page.click("#caption")
    page.wait_for_function(f"old => !['', old].includes({SENTENCE})", arg=CAPTIONS["removed"])
    assert "gone" not in sentence(page), "what is gone one way has appeared the other way"


def save_picture_for_readme(page) -> None:
    if "PAGE_PICTURE" in os.environ:
        page.wait_for_timeout(2000)  # until everything has faded in
        area = {"x": 0, "y": 0, "width": 1280, "height": 1290}
        page.screenshot(path=os.environ["PAGE_PICTURE"], clip=area)


def test_drop_and_paste(page):
    """The two other ways: dropping a file on a picture's place, and pasting from the clipboard."""
    images = {}
    for side in ("before", "after"):
        content = (EXAMPLES / f"removed_{side}.png").read_bytes()
        images[side] = base64.b64encode(content).decode()
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
        const picture = new Blob([bytes], {type: "image/png"});
        await navigator.clipboard.write([new ClipboardItem({"image/png": picture})]); }""",
        images["after"],
    )
    page.click("#after button[aria-label='Paste from clipboard']")
    page.wait_for_selector("#after img")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])


def test_an_example_and_several_captions_of_it(page):
    page.click(".gallery-item >> nth=0")
    page.wait_for_selector("#after img")
    page.click("#caption")
    wait_for_sentence(page, next(iter(CAPTIONS.values())))
    page.wait_for_selector("#attention img")
    page.get_by_text("How words are chosen").click()
    move_slider(page, "Captions (more", 3)
    page.click("#caption")
    page.wait_for_function(f"() => {SENTENCE}.split('\\n').length === 3")
    page.wait_for_selector("#attention h3")
    assert page.locator("#attention h3").all_inner_texts() == sentence(page).split("\n")


def test_an_upload_over_the_stated_size_is_a_message(page, tmp_path):
    assert f"up to {MAX_MEGABYTES} MB" in page.inner_text("body")
    large = tmp_path / "large.png"
    content = (EXAMPLES / "added_before.png").read_bytes()
    large.write_bytes(content + bytes(MAX_MEGABYTES * 2**20))
    choose_file(page, "before", large)
    assert f"exceed the maximum allowed size of {MAX_MEGABYTES}.0" in message(page)
    assert page.locator("#before img").count() == 0


def test_beams_and_several_captions_together_are_a_message(page):
    fill(page, "removed")
    page.click("#caption")
    page.wait_for_selector("#attention img")
    page.get_by_text("How words are chosen").click()
    for label in ("Captions (more", "Beams"):
        move_slider(page, label, 3)
    page.click("#caption")
    assert "cannot be combined" in message(page)
    assert not page.is_visible("#attention"), "the earlier result is no longer shown"


def test_a_broken_file_is_a_message_and_the_page_works_on(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    choose_file(page, "before", broken)
    choose_file(page, "after", EXAMPLES / "added_after.png")
    page.wait_for_selector("#after img")
    page.click("#caption")
    assert message(page).startswith("The before file is not an image that can be read")
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


HOSTILE_NAMES = (
    "<img src=x onerror=alert(1)>.png",
    "\x1b[31m\nall 9.png",
    "..png",
    "'\"><script>alert(2)<∕script>.png",
    "\u202egnp.png",
)


def test_hostile_names_of_uploads_are_text(page, tmp_path):
    """HTML and control characters in names: no script in them runs, and none is in a URL."""
    requested = []
    page.on("request", lambda one: requested.append(one.url))
    page.on("dialog", lambda one: pytest.fail(f"a script has run: {one.message}"))
    for name in HOSTILE_NAMES:
        path = Path(shutil.copy(EXAMPLES / "removed_before.png", tmp_path / name))
        page.reload()
        page.wait_for_selector("#caption")
        choose_file(page, "before", path)
        page.wait_for_selector("#before img")
    choose_file(page, "after", EXAMPLES / "removed_after.png")
    page.wait_for_selector("#after img")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])
    paths = [urllib.parse.urlsplit(one).path for one in requested if "/file=" in one]
    names = {path.rpartition("/")[2] for path in paths}
    assert len(names) > 1
    for name in names:
        assert set(name) <= set(string.ascii_letters + string.digits + "._-"), name
