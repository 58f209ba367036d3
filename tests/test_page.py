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

from dataloaders.picture_files import known_formats
from modules.web.image_decoding import MAX_MEGABYTES
from tests.browser import find_violations, open_tab, running_browser
from tests.page_server import CAPTIONS, EXAMPLES, SECONDS, running_page

SENTENCES = "[...document.querySelectorAll('.caption')].map(one => one.textContent)"


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> Iterator[str]:
    with running_page(tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture(scope="module")
def browser():
    with running_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, url):
    tab = open_tab(browser, url)
    yield tab
    tab.context.close()


def choose_file(page, side: str, path: Path) -> None:
    page.set_input_files(f"#{side} input[type=file]", str(path))


def fill(page, name: str) -> None:
    """Upload both pictures of an example pair."""
    for side in ("before", "after"):
        choose_file(page, side, EXAMPLES / f"{name}_{side}.png")
        page.wait_for_selector(f"#{side} img")


def sentence(page) -> str:
    return page.inner_text(".answer .caption")


def wait_for_sentence(page, expected: str) -> None:
    page.wait_for_function(f"expected => {SENTENCES}[0] === expected", arg=expected)


def problem(page) -> str:
    """What the page says is wrong, where its captions are otherwise."""
    return page.inner_text(".problem")


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


def test_upload_caption_swap_copy_and_download(page):
    fill(page, "removed")
    page.click("#caption")
    wait_for_sentence(page, CAPTIONS["removed"])
    assert "sure of the wording: 57 %" in page.inner_text(".answer")
    assert page.inner_text("#spoken").startswith(f"{CAPTIONS['removed']}, 57 percent sure")
    save_picture_for_readme(page)
    with page.expect_download() as download:
        page.click("[data-result]")
    saved = json.loads(Path(download.value.path()).read_text())
    assert [row["caption"] for row in saved["captions"]] == [CAPTIONS["removed"]]
    assert saved["decoding"]["beam_size"] == 1
    page.click("[data-copy]")
    page.wait_for_function("document.querySelector('[data-copy]').textContent === 'Copied'")
    assert page.evaluate("navigator.clipboard.readText()") == CAPTIONS["removed"]
    source = page.get_attribute("#before img", "src")
    page.click("#swap")
    page.wait_for_function(
        "old => ![null, old].includes(document.querySelector('#before img')?.getAttribute('src'))",
        arg=source,
    )
    assert page.locator(".answer").count() == 0, "the caption was of the pictures as they were"
    page.click("#caption")
    page.wait_for_selector(".answer")
    assert sentence(page) != CAPTIONS["removed"]
    assert "gone" not in sentence(page), "what is gone one way has appeared the other way"


def save_picture_for_readme(page) -> None:
    if "PAGE_PICTURE" in os.environ:
        page.wait_for_timeout(2000)  # until everything has faded in
        page.set_viewport_size({"width": 1280, "height": 1200})
        page.screenshot(path=os.environ["PAGE_PICTURE"], full_page=True)


def test_drop_paste_and_camera(page):
    """The other ways: dropping a file on a picture's place, the clipboard, and the camera."""
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
    page.click("#after button[aria-label='Remove Image']")
    page.click("#after button[aria-label='Capture from camera']")
    page.get_by_text("Click to Access Webcam").click()
    page.click("#after button[aria-label='capture photo']")
    page.wait_for_selector("#after img")
    assert page.locator(".answer").count() == 0
    page.click("#caption")
    page.wait_for_selector(".answer")


def test_an_example_its_slider_its_words_and_several_captions(page):
    page.click("#example-rematerialed")
    wait_for_sentence(page, CAPTIONS["rematerialed"])
    page.focus(".compare input")
    page.keyboard.press("ArrowRight")
    assert (
        page.evaluate("document.querySelector('.compare').style.getPropertyValue('--at')") == "51%"
    )
    words = CAPTIONS["rematerialed"].split()
    assert page.locator(".looks label").count() == len(words) + 3, "(end) and two summaries"
    page.get_by_label(f"“{words[1]}”", exact=True).check()
    assert page.locator(".look:visible").count() == 1
    assert page.get_attribute(".look:visible img >> nth=0", "alt") == f"Before, “{words[1]}”"
    page.get_by_text("Options").click()
    move_slider(page, "Number of captions", 3)
    page.click("#caption")
    page.wait_for_function(f"() => {SENTENCES}.length === 3")
    summaries = page.locator(".looks summary").all_inner_texts()
    captions = page.locator(".caption").all_inner_texts()
    assert summaries == [f"Where the model looked: {caption}" for caption in captions]
    move_slider(page, "Beams", 3)
    page.click("#caption")
    assert problem(page).startswith("Beams and several captions cannot be combined.")
    assert page.locator(".answer").count() == 0, "the earlier result is no longer shown"


def test_what_is_wrong_is_said_where_the_visitor_looks(page, tmp_path):
    assert f"up to {MAX_MEGABYTES} MB" in page.inner_text("#heading")
    assert "expect nonsense on photographs" in page.inner_text("#limits")
    text = tmp_path / "text.txt"
    text.write_text("hello")
    choose_file(page, "before", text)
    page.get_by_text("text.txt is not a picture that this page can read.").wait_for()
    phone = tmp_path / "phone.heic"
    phone.write_bytes(b"\0\0\0\x1cftypheic" + bytes(200))
    choose_file(page, "after", phone)
    if "HEIF" not in known_formats():
        page.get_by_text("phone.heic is a HEIC picture, which cannot be read here.").wait_for()
    large = tmp_path / "large.png"
    content = (EXAMPLES / "added_before.png").read_bytes()
    large.write_bytes(content + bytes(MAX_MEGABYTES * 2**20))
    choose_file(page, "before", large)
    page.get_by_text("large.png has 21 MB, and a picture can have up to 20 MB.").wait_for()
    assert page.locator("#before img").count() == 0
    choose_file(page, "before", EXAMPLES / "added_before.png")
    page.wait_for_selector("#before img")
    assert page.inner_text("#before-note") == ""
    page.click("#caption")
    assert problem(page) == "The after picture is missing: choose one in the field “After”."
    assert page.locator(".toast-body").count() == 0


def test_a_broken_file_is_a_message_and_the_page_works_on(page, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no image")
    choose_file(page, "before", broken)
    page.get_by_text("Your browser cannot show this file").wait_for()
    choose_file(page, "after", EXAMPLES / "added_after.png")
    page.wait_for_selector("#after img")
    page.click("#caption")
    assert problem(page).startswith("The before picture cannot be read: choose an intact file")
    page.click("#example-added")
    wait_for_sentence(page, CAPTIONS["added"])
    assert page.inner_text("#before-note") == ""


def test_a_phone_shows_the_answer_at_once_and_axe_finds_nothing(browser, url):
    page = open_tab(browser, url, width=390, height=844)
    page.click("#example-recolored")
    wait_for_sentence(page, CAPTIONS["recolored"])
    page.wait_for_function(
        "document.querySelector('.answer .compare').getBoundingClientRect().bottom < innerHeight"
    )
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert find_violations(page) == []
    page.context.close()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_axe_finds_nothing_in_any_state(browser, url, width, scheme):
    page = open_tab(browser, url, width, scheme=scheme)
    assert find_violations(page) == []
    page.click("#caption")
    problem(page)
    assert find_violations(page) == []
    page.get_by_text("Options").click()
    page.click("#example-moved")
    wait_for_sentence(page, CAPTIONS["moved"])
    page.mouse.move(0, 0)
    page.wait_for_timeout(1000)  # until colors have faded over
    assert find_violations(page) == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.context.close()


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
