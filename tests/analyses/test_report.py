"""The report: complete, self-contained, safe, and its numbers are those of the draws."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
import xarray as xr

from hilbertcell.analyses import plots
from hilbertcell.analyses.report import MAX_TABLE_ROWS, report
from hilbertcell.analyses.report_sections import MAX_PANELS
from hilbertcell.data.validation import DataError
from tests.fake_draws import fake_draws, fake_scores

SECTIONS = (
    "warnings",
    "overview",
    "variance",
    "microenvironment",
    "trust",
    "shifts",
    "genes",
    "batches",
    "width",
    "table",
    "data",
)


class Page(HTMLParser):
    """What the tests look at: ids, figures, rows of the table, references and visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html, self.ids, self.figures, self.references, self.rows, self.text = html, [], [], [], [], []
        self.tags = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.figures += [attrs] if tag in ("svg", "img") else []
        self.references += [
            attrs[name] for name in ("href", "src", "xlink:href", "srcset", "data") if name in attrs
        ]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data.strip()


@pytest.fixture
def page(tmp_path):
    def write(draws: xr.DataTree) -> Page:
        report(draws, tmp_path / "report.html")
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    draws = fake_draws(predicted=("d4", "d5"), warnings=["three genes were renamed"])
    path = tmp_path_factory.mktemp("report") / "report.html"
    report(draws, path)
    return draws, Page(path.read_text(encoding="utf-8"))


def without(draws: xr.DataTree, *groups: str) -> xr.DataTree:
    kept = {name: node.dataset for name, node in draws.children.items() if name not in groups}
    tree = xr.DataTree.from_dict(kept)
    tree.attrs = draws.attrs
    return tree


def test_all_sections_and_their_figures_are_there(whole):
    _, page = whole
    assert [name for name in SECTIONS if name not in page.ids] == []
    # overview, four of calibration, four conditions, densities, variance, two of batches, microenvironment, width
    assert len(page.figures) == 15
    assert "Not shown" not in page.html
    assert len(set(page.ids)) == len(page.ids)


def test_every_figure_has_a_text_alternative(whole):
    _, page = whole
    for figure in page.figures:
        assert figure["role"] == "img"
        assert len(figure["aria-label"]) > 20
    assert any("perturbation 40 %" in figure["aria-label"] for figure in page.figures)


def test_nothing_is_loaded_from_elsewhere(whole):
    _, page = whole
    assert "http" not in page.html
    assert not {"link", "img", "iframe", "object"} & set(page.tags)
    outward = [
        reference for reference in page.references if not reference.startswith("data:image/png;base64,")
    ]
    assert {reference[0] for reference in outward} == {"#"}
    assert {reference[1:] for reference in outward} <= set(page.ids)
    assert "url(" in page.html  # clip paths, of this page only
    assert set(re.findall(r"url\(#([^)]*)\)", page.html)) <= set(page.ids)
    assert page.html.count("url(") == page.html.count("url(#")


def test_the_same_draws_give_the_same_page(whole, tmp_path):
    draws, page = whole
    report(draws, tmp_path / "again.html")
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == page.html


def test_the_first_screen_says_what_was_predicted_and_warns(whole):
    _, page = whole
    text = " ".join(" ".join(page.text).split())
    assert "Predicted responses of donors d4 and d5" in text
    assert "three genes were renamed" in text
    assert "8 populations predicted, 10 genes each" in text
    assert "DMSO" in text


def test_the_numbers_of_the_table_are_those_of_the_draws(whole):
    draws, page = whole
    header, *rows = page.rows
    assert header == [
        "gene",
        "drug",
        "cell_type",
        "donor",
        "shift",
        "from",
        "to",
        "direction",
        "mean",
        "training shift",
    ]
    assert len(rows) == 8 * 10
    shift = draws["predictions"]["shift"].isel(chain=0)
    for gene, drug, cell_type, donor, *numbers in rows[::7]:
        one = shift.sel(population=f"{cell_type} | {drug} | {donor}", gene=gene).values.astype(float)
        mean = draws["predictions"]["mean"].isel(chain=0)
        mean = mean.sel(population=f"{cell_type} | {drug} | {donor}", gene=gene).values.astype(float).mean()
        up = (one > 0).mean()
        direction = up if one.mean() > 0 else 1 - up
        training = float(
            draws["constant_data"]["training_shift"].sel(
                population=f"{cell_type} | {drug} | {donor}", gene=gene
            )
        )
        expected = [one.mean(), *np.quantile(one, (0.05, 0.95)), direction, mean, training]
        np.testing.assert_allclose([float(n) for n in numbers], expected, atol=6e-4)


def test_the_table_starts_with_the_largest_certain_shifts(whole):
    _, page = whole
    active = {f"gene{g}" for g in range(3)}
    leading = page.rows[1 : 1 + 3 * 4]
    assert {row[0] for row in leading} == active
    assert {row[1] for row in leading} == {"A"}


@pytest.mark.parametrize(
    ("groups", "sections"),
    [
        (("posterior",), ("posterior: microenvironment", "posterior: batch_response")),
        (("posterior_predictive",), ("posterior_predictive and observed_data: population_mean",)),
        (("observed_data",), ("posterior_predictive and observed_data: population_mean",)),
        (
            ("constant_data",),
            ("variance_decomposition", "constant_data: control_n", "constant_data: data_summary"),
        ),
    ],
)
def test_a_section_whose_group_is_absent_says_so(groups, sections, page):
    shown = page(without(fake_draws(), *groups))
    assert shown.html.count("Not shown") == len(sections)
    assert all(name in shown.html for name in sections)
    assert [name for name in SECTIONS if name not in shown.ids] == []


def test_draws_of_before_batches_were_named_lack_one_figure(page):
    draws = fake_draws()
    draws["posterior_predictive"] = xr.DataTree(draws["posterior_predictive"].dataset.drop_vars("batch_name"))
    shown = page(draws)
    assert len(shown.figures) == 14
    assert not any("training batches, lowest in" in figure["aria-label"] for figure in shown.figures)


def test_only_predictions_are_needed_and_they_are(page, tmp_path):
    rest = (
        "posterior",
        "posterior_predictive",
        "observed_data",
        "constant_data",
        "log_likelihood",
        "sample_stats",
    )
    shown = page(without(fake_draws(), *rest))
    assert len(shown.figures) == 1 + 4 + 1
    with pytest.raises(KeyError, match="predictions"):
        report(without(fake_draws(), "predictions"), tmp_path / "none.html")
    assert not (tmp_path / "none.html").exists()


def test_names_are_text_and_never_markup(page):
    evil = "<script>alert(1)</script>"
    genes = [evil, "$\\alpha", "a&b", '"quoted"', "基因", *(f"g{i}" for i in range(5))]
    shown = page(fake_draws(genes=genes, perturbations=(evil, "$x$"), predicted=(evil,), warnings=[evil]))
    assert evil not in shown.html
    assert shown.tags.count("script") == 1
    assert {row[0] for row in shown.rows[1:]} == set(genes)
    assert {row[1] for row in shown.rows[1:]} == {evil, "$x$"}


def test_a_large_file_gives_a_page_of_limited_size_that_counts_what_it_leaves_out(page):
    draws = fake_draws(
        num_draws=20,
        num_genes=1500,
        contexts=[f"type {i}" for i in range(5)],
        perturbations=[f"drug {i}" for i in range(8)],
        training=[f"d{i}" for i in range(60)],
        predicted=[f"new {i}" for i in range(6)],
    )
    shown = page(draws)
    assert len(shown.html.encode()) < 5_000_000
    assert len(shown.rows) == 1 + MAX_TABLE_ROWS
    text = " ".join(" ".join(shown.text).split())
    assert f"{5 * 8 * 6 * 1500 - MAX_TABLE_ROWS:,} with less evidence" in text
    assert f"{5 * 8 - MAX_PANELS} are left out" in text
    assert "2 more batches" in text  # of each condition
    assert f"{66 - plots.MAX_BATCH_ROWS} more batches are not shown" in text
    assert sum("Predicted shifts with" in figure["aria-label"] for figure in shown.figures) == MAX_PANELS


def test_what_the_draws_give_reason_to_warn_of(page):
    draws = fake_draws(predicted=("d4", "d5"), observed_shift=3.0)
    draws["predictions"]["shift"][0, 0, 0, 0] = np.nan
    constant = draws["constant_data"]
    constant["control_n"][:] = np.array([0, 5, *(50 for _ in range(6))])
    constant["target_observed"][3] = True
    constant["training_num_batches"][4:6] = 0
    text = " ".join(page(draws).text)
    for expected in (
        "1 populations have draws that are not finite",
        "intervals are too narrow",
        "1 predicted populations have no DMSO cells",
        "1 predicted populations have fewer than 20 DMSO cells",
        "2 predicted populations are of a condition that training never saw",
        "1 predicted populations were themselves seen",
        "too narrow",
    ):
        assert expected in text
    calm = page(fake_draws())
    assert "No warnings." in calm.html
    assert "about right" in calm.html


def test_doses_have_a_column_and_panels_of_their_own(page):
    shown = page(fake_draws(doses=(0.5, 10.0)))
    assert shown.rows[0][2] == "dose"
    assert {row[2] for row in shown.rows[1:]} == {"0.5", "10"}
    labels = " ".join(figure["aria-label"] for figure in shown.figures)
    assert "A @ 0.5 in B" in labels
    assert "A @ 10 in T" in labels


def test_no_factor_is_said_and_not_drawn(page):
    draws = fake_draws()
    draws["posterior"] = xr.DataTree(draws["posterior"].dataset.isel(factor=slice(0)))
    assert "Not shown: these draws hold no posterior: microenvironment" in page(draws).html


def test_the_page_says_what_is_measured_against_what(page, tmp_path):
    draws = fake_draws(predicted=("d4", "d5"))
    text = " ".join(" ".join(page(draws).text).split())
    assert "have not been compared with measurements of the same donors" in text
    assert "hide some and score them" in text
    report(draws, tmp_path / "scored.html", fake_scores(draws, covered_90=0.7))
    scored = Page((tmp_path / "scored.html").read_text(encoding="utf-8"))
    text = " ".join(" ".join(scored.text).split())
    assert "in donors hidden from training, 70 % of what was measured lay inside" in text
    assert "too narrow" in text
    assert "have not been compared" not in text
    assert any("In hidden populations, 70 %" in figure["aria-label"] for figure in scored.figures)


def test_scores_of_other_draws_are_refused(tmp_path):
    draws = fake_draws()
    other = tmp_path / "scores.json"
    for scores, culprit in (
        (fake_scores(fake_draws(predicted=("d9",))), "d9"),
        (fake_scores(fake_draws(num_draws=7)), "7 draws, not 100"),
        ({"targets": {}}, "not what hilbertcell evaluate writes"),
    ):
        with pytest.raises(DataError, match=culprit):
            report(draws, tmp_path / "report.html", scores)
    other.write_text("no JSON")
    with pytest.raises(DataError, match="not what hilbertcell evaluate writes"):
        report(draws, tmp_path / "report.html", other)
    assert not (tmp_path / "report.html").exists()
