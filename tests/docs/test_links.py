"""Links between pages lead somewhere. Sphinx checks them where it builds a page; this also reads the README and runs offline.

Links to the web are not fetched.
"""

import os.path
import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

NOTEBOOKS = ROOT / "analyses/notebooks"
TUTORIALS = ROOT / "docs/tutorials"  # where `make docs` copies the notebooks, and what links mean
PAGES = [
    *ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/howto").glob("*.md"),
    *(ROOT / "docs/models").glob("*.md"), *(ROOT / "docs/reference").glob("*.md"), *NOTEBOOKS.glob("*.md"),
]  # fmt: skip
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """Anchors of headings as GitHub and MyST make them."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ +(.*?)\s*$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken(page, text: str) -> list[str]:
    """Relative links of a page to files or headings that are not there."""
    found = []
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for link in LINK.findall(re.sub(r"`[^`]*`", "", prose)):
        if (
            re.match(r"\w+:", link) or "_generated/" in link
        ):  # the web; written when the site is built, and checked there
            continue
        path, _, anchor = link.partition("#")
        folder = TUTORIALS if page.parent == NOTEBOOKS else page.parent
        target = Path(os.path.normpath(folder / path)) if path else page
        if target.parent == TUTORIALS:
            target = NOTEBOOKS / target.name
        if not target.exists() or (anchor and anchor not in anchors(target.read_text())):
            found.append(link)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken(page, page.read_text()) == []


def test_a_broken_link_is_seen():
    page = ROOT / "docs/index.md"
    text = "[a](architecture.md) [b](nowhere.md) [c](architecture.md#why-these-rooms) [d](architecture.md#absent) [e](https://x.y)"
    assert broken(page, text) == ["nowhere.md", "architecture.md#absent"]
