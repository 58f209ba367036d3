"""Headless Chromium for the tests of what people look at, and what axe says of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.page_server import SECONDS

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
]
PERMISSIONS = ["clipboard-read", "clipboard-write", "camera"]


@contextmanager
def running_browser() -> Iterator[Any]:
    """Playwright's browser. Skips the test where it is not installed."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="the browser test needs playwright (requirements-dev.txt)"
    )
    if not CHROMIUM:
        pytest.skip("the browser test needs Debian's chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_OPTIONS)
        yield browser
        browser.close()


def open_tab(browser, url: str, width: int = 1280, height: int = 1500, scheme: str = "light"):
    """A visitor of their own, who has just opened the page."""
    context = browser.new_context(
        viewport={"width": width, "height": height}, permissions=PERMISSIONS, color_scheme=scheme
    )
    tab = context.new_page()
    tab.set_default_timeout(SECONDS * 1000)
    tab.goto(url)
    tab.wait_for_selector("#caption")
    return tab


def find_violations(page) -> list[str]:
    """What axe finds on the page: its rule, and the first element that breaks it."""
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="needs axe (requirements-dev.txt)"
    )
    found = axe.Axe().run(page).response["violations"]
    return [f"{one['id']}: {one['nodes'][0]['html']}" for one in found]
