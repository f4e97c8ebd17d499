"""A real headless browser for pages that this project writes: the fixture `browser_page`.

    def test_the_page_opens(browser_page, tmp_path):
        browser_page.goto((tmp_path / "index.html").as_uri())
        assert browser_page.locator("h1").inner_text() == "..."

It needs Debian's package chromium and the extra `dev` (playwright); the test is skipped, with the reason, without them.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A playwright `Page`, as `opened_page` gives it."""
    with opened_page() as page:
        yield page


@contextmanager
def opened_page() -> Iterator[Any]:
    """A playwright `Page` of 1280 x 900 pixels without network; see `opened_pages`."""
    with opened_pages(1) as (page,):
        yield page


@contextmanager
def opened_pages(count: int, origin: str | None = None, known: Sequence[str] = ()) -> Iterator[list[Any]]:
    """Playwright pages of 1280 x 900 pixels, each of a user of its own.

    Fails the test at the end where a page wrote an error or a warning to the console, raised an error that it did not
    catch, opened a dialog, or asked for anything but files of this machine. There is one browser for each test: a
    lasting event loop of playwright's would get in the way of other tests' loops.

    Args:
        count: number of pages.
        origin: a server on this machine, such as http://127.0.0.1:7860, that pages may ask. None: no network at all.
        known: messages of the console that are no fault.
    """
    playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[dev]'")
    chromium = next((path for name in CHROMIUM if (path := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("no browser: apt-get install chromium")
    faults: list[str] = []
    allowed = ("file:", "data:", "blob:", "about:", *([f"{origin}/"] if origin else []))

    def hear(message: Any) -> None:
        if message.type in ("error", "warning") and message.text not in known:
            faults.append(f"wrote to the console: {message.text}")

    def see_request(request: Any) -> None:
        if not request.url.startswith(allowed):
            faults.append(f"asked for {request.url}")

    def refuse(dialog: Any) -> None:
        faults.append(f"opened a dialog: {dialog.message}")
        dialog.dismiss()

    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(ARGUMENTS))
        pages = []
        for _ in range(count):
            size = {"width": 1280, "height": 900}
            page = browser.new_context(viewport=size, offline=origin is None).new_page()
            page.on("console", hear)
            page.on("pageerror", lambda error: faults.append(f"raised, uncaught: {error}"))
            page.on("dialog", refuse)
            page.on("request", see_request)
            pages.append(page)
        try:
            yield pages
        finally:
            browser.close()
    if faults:
        pytest.fail("the page " + "; it ".join(faults))
