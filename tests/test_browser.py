"""What the tests of pages rely on: the browser notices what it must."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.browser import opened_page


def write_page(folder: Path, body: str) -> str:
    (folder / "page.html").write_text(f"<!doctype html><meta charset=utf-8><body>{body}")
    return (folder / "page.html").as_uri()


def test_a_sound_page_opens_and_its_script_runs(browser_page, tmp_path: Path) -> None:
    browser_page.goto(write_page(tmp_path, "<p></p><script>document.querySelector('p').textContent = 1 + 1</script>"))
    assert browser_page.locator("p").inner_text() == "2"


def test_every_fault_of_a_bad_page_fails_its_test(tmp_path: Path) -> None:
    body = (
        "<script>null.x</script><script>console.error('no')</script><script>alert(1)</script>"
        "<img src='https://example.org/a.png'><script src='absent.js'></script>"
    )
    with pytest.raises(pytest.fail.Exception) as caught, opened_page() as page:
        page.goto(write_page(tmp_path, body))
    told = str(caught.value)
    for fault in ("uncaught: Cannot read", "console: no", "dialog: 1", "asked for https://example.org", "ERR_FILE"):
        assert fault in told, fault
