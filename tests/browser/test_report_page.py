"""The report as a reader meets it: in a browser, on a telephone, on paper, with a keyboard."""

import csv

import pytest

from hilbertcell.analyses.report import report
from tests.browser import page_checks
from tests.fake_draws import fake_draws, fake_scores

NARROW, USUAL = 375, 1200


@pytest.fixture(scope="module")
def report_file(tmp_path_factory):
    """Fewer rows than the table may hold; one name that wants quoting in a CSV."""
    genes = ["gene0", 'quoted "one", two', *(f"gene{g}" for g in range(2, 10))]
    draws = fake_draws(genes=genes, predicted=("d4", "d5"), warnings=["three genes were renamed"])
    path = tmp_path_factory.mktemp("report") / "report.html"
    report(draws, path, fake_scores(draws))
    return path


@pytest.fixture
def opened(open_page, report_file):
    return open_page(report_file)


def visible_rows(page) -> list[list[str]]:
    """Texts of the cells of the rows that are shown."""
    return page.evaluate(
        """() => [...document.querySelectorAll("tbody tr")].filter(row => row.getClientRects().length)
        .map(row => [...row.cells].map(cell => cell.textContent.trim()))"""
    )


def test_nothing_is_asked_for_and_nothing_complains(opened):
    opened.page.locator("#search").fill("gene3")
    opened.page.locator("thead button").first.click()
    assert opened.complaints == []
    assert page_checks.requests_elsewhere(opened) == []


@pytest.mark.parametrize("width", [NARROW, USUAL])
def test_all_figures_are_seen_and_have_texts_of_their_own(open_page, report_file, width):
    assert page_checks.figure_faults(open_page(report_file, width)) == []


def test_text_stands_out(opened):
    assert page_checks.contrast_faults(opened) == []


@pytest.mark.parametrize("width", [NARROW, USUAL])
def test_the_page_is_as_wide_as_its_window(open_page, report_file, width):
    assert page_checks.overflow_faults(open_page(report_file, width)) == []


def test_tables_inputs_and_buttons_say_what_they_are(opened):
    assert page_checks.table_and_label_faults(opened) == []


def test_search_filters_the_table_by_all_words(opened):
    everything = visible_rows(opened.page)
    assert len(everything) == 8 * 10
    opened.page.locator("#search").fill("GENE3 d5")
    shown = visible_rows(opened.page)
    assert len(shown) == 4
    assert shown == [row for row in everything if "gene3" in row[0] and row[3] == "d5"]
    assert opened.page.locator("#count").inner_text() == "4 rows"
    opened.page.locator("#search").fill("nothing of this name")
    assert visible_rows(opened.page) == []
    opened.page.locator("#search").fill("")
    assert visible_rows(opened.page) == everything


def test_headings_sort_by_number_and_by_name(opened):
    shift = opened.page.locator("thead th", has_text="shift").first
    for direction, sign in (("descending", -1), ("ascending", 1)):
        shift.get_by_role("button").click()
        assert shift.get_attribute("aria-sort") == direction
        values = [sign * float(row[4]) for row in visible_rows(opened.page)]
        assert values == sorted(values)
    donor = opened.page.locator("thead th", has_text="donor")
    donor.get_by_role("button").click()
    names = [row[3] for row in visible_rows(opened.page)]
    assert names == sorted(names)
    assert shift.get_attribute("aria-sort") is None


@pytest.mark.parametrize("words", ["", "quoted d4"])
def test_the_download_holds_the_rows_and_numbers_that_are_shown(opened, words):
    opened.page.locator("#search").fill(words)
    with opened.page.expect_download() as found:
        opened.page.locator("#download").click()
    assert found.value.suggested_filename == "responses.csv"
    with open(found.value.path(), newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    assert header == [th.strip() for th in opened.page.locator("thead th").all_text_contents()]
    shown = [["" if text == "\N{EN DASH}" else text for text in row] for row in visible_rows(opened.page)]
    assert rows == shown
    assert len(rows) == (8 * 10 if not words else 4)
    assert opened.complaints == []


def test_the_keyboard_reaches_and_works_everything(opened):
    page, reached = opened.page, []
    for _ in range(60):
        page.keyboard.press("Tab")
        here = page.evaluate(
            """() => {
            const e = document.activeElement, style = getComputedStyle(e);
            return e === document.body ? null : [e.id || e.textContent.trim() || e.className, style.outlineStyle];
            }"""
        )
        if here is None:
            break
        reached.append(here)
    names = [name for name, _ in reached]
    assert {"search", "download", "gene", "direction", "All numbers"} <= set(names)
    assert [name for name, outline in reached if outline == "none"] == []  # where one is can be seen
    page.locator("thead button", has_text="mean").focus()
    page.keyboard.press("Enter")
    assert page.locator("thead th[aria-sort]").inner_text().startswith("mean")


def test_print_has_the_figures_and_the_first_rows_and_no_controls(opened, tmp_path):
    opened.page.emulate_media(media="print")
    opened.page.set_viewport_size({"width": 688, "height": 970})  # A4 within its margins at 96 dots per inch
    assert not opened.page.locator("#search").is_visible()
    assert not opened.page.locator("nav").is_visible()
    assert len(visible_rows(opened.page)) == 36
    assert opened.page.get_by_text("The first 36 rows are printed.").is_visible()
    assert page_checks.figure_faults(opened) == []
    assert page_checks.overflow_faults(opened) == []
    clipped = """() => [...document.querySelectorAll(".drawing, .scroll")].filter(e =>
        e.scrollWidth > e.clientWidth + 1).map(e => e.outerHTML.slice(0, 80))"""
    assert opened.page.evaluate(clipped) == []
    printed = opened.page.pdf(path=tmp_path / "report.pdf", prefer_css_page_size=True)
    assert printed.startswith(b"%PDF")
    assert 3 <= printed.count(b"/Type /Page\n") + printed.count(b"/Type /Page ") <= 20


def test_checks_can_fail(open_page, tmp_path):
    """A page with every fault that the checks look for."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<!doctype html><body><p style='color:#888'>pale</p><svg width=20 height=20><text>x</text></svg>"
        "<div style='width:3000px'>wide</div><table><tr><th>a</th></tr></table><input><button></button>"
        "<img src='https://example.org/a.png'><script>console.error('no'); missing()</script>"
    )
    opened = open_page(path)
    assert any("pale: 3." in fault for fault in page_checks.contrast_faults(opened))
    assert any("no text alternative" in fault for fault in page_checks.figure_faults(opened))
    assert page_checks.overflow_faults(opened)
    faults = page_checks.table_and_label_faults(opened)
    assert [fault.split(":")[0] for fault in faults] == [
        "no scope", "no headings", "no label", "no name", "no language", "no title",
    ]  # fmt: skip
    assert any("missing" in text for text in opened.complaints)
    assert any("error: no" in text for text in opened.complaints)
    assert page_checks.requests_elsewhere(opened) == ["https://example.org/a.png"]
