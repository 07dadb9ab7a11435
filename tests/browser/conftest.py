"""Pages in a headless Chromium: opened from a file, every message and request recorded."""

import importlib.util
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.browser.page_checks import Opened
from tests.conftest import absent

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@pytest.fixture(scope="session")
def browser() -> Iterator[object]:
    """The system's Chromium, driven by Playwright, which downloads nothing."""
    if importlib.util.find_spec("playwright") is None:
        absent("browser", "no playwright; install the extra browser (make browser)")
    path = next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        absent("browser", "no Chromium on PATH; make browser installs Debian's, or says how to get it")
    from playwright.sync_api import sync_playwright

    # Switched off: what a browser does for itself over the network, and the device that containers lack.
    quiet = [
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--disable-gpu",
    ]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=quiet)
        yield chromium
        chromium.close()


@pytest.fixture
def open_page(browser) -> Iterator[Callable[..., Opened]]:
    """Open an HTML file at a width, the network cut off: what the page asks for and complains of is kept."""
    contexts = []

    def opened(path: Path, width: int = 1200) -> Opened:
        context = browser.new_context(viewport={"width": width, "height": 900}, offline=True)
        contexts.append(context)
        page, complaints, requests = context.new_page(), [], []
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("requestfailed", lambda request: complaints.append(f"failed: {request.url}"))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.resolve().as_uri())
        return Opened(page, complaints, requests)

    yield opened
    for context in contexts:
        context.close()
