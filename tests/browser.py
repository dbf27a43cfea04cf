"""A headless Chromium for the tests of pages, and screenshots of what they show."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def browser_page() -> Iterator[Any]:
    """A page of a headless Chromium that is installed on this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not program:
        pytest.skip("no Chromium is installed on this machine")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-background-networking", "--disable-component-update"],
        )
        yield browser.new_page(viewport={"width": 1000, "height": 750})
        browser.close()


def screenshot(page: Any, name: str, folder: Path, whole_page: bool = False) -> Path:
    """Write a PNG of a page into a test's folder, and into $MANTA_SCREENSHOTS if that is set (`make screenshots`)."""
    path = folder / f"{name}.png"
    page.screenshot(path=str(path), full_page=whole_page)
    if target := os.environ.get("MANTA_SCREENSHOTS"):
        shutil.copy(path, Path(target) / path.name)
    return path
