"""A real Chromium on pages from disk."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paritykit.reports import write_report
from paritykit.results import Results

ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
Open = Callable[..., Any]


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium, or a skip that says what is missing."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="the report tests need: pip install playwright")
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("the report tests need a Chromium on PATH (chromium, chromium-browser or google-chrome)")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield found
        found.close()


@pytest.fixture
def open_report(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """``open_report(results, hash="")``: the page, ready; any script error or network request fails the test."""
    troubles: list[str] = []
    contexts = []

    def open_page(results: Results, *, fragment: str = "", before: str = "", **options: Any) -> Any:
        path = tmp_path / "parity.html"
        write_report(results, format="html", path=path)
        context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda said: troubles.append(said.text) if said.type == "error" else None)
        page.on("request", lambda sent: None if sent.url.startswith("file:") else troubles.append(sent.url))
        page.on("dialog", lambda shown: troubles.append(shown.message))
        if before:
            page.add_init_script(before)
        page.goto(path.as_uri() + fragment)
        if options.get("java_script_enabled", True):
            page.wait_for_selector("html[data-ready]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []
