"""What the figures of the report are made of: the numbers of the draws, ranked, and nothing left behind."""

import numpy as np
import pytest

from hilbertcell.analyses import plots
from hilbertcell.analyses.batch_plots import one_population_in_every_batch
from hilbertcell.analyses.calibration_plots import coverage, predictive_distribution, predictive_pit
from hilbertcell.analyses.response_plots import gene_posteriors, shift_forest, shift_overview
from hilbertcell.analyses.shift_summary import (
    certain_shift,
    conditions,
    populations_of,
    shift_table,
    summarise_shifts,
    top_genes,
)
from tests.fake_draws import fake_draws


def test_summaries_rank_by_certainty_and_size():
    draws = fake_draws(num_genes=9)
    summary = summarise_shifts(draws)
    assert [c.perturbation for c in conditions(summary)] == ["A", "A", "inert", "inert"]
    first = summary.isel(population=populations_of(summary, conditions(summary)[0]))
    assert set(top_genes(first, 3)) == {0, 1, 2}
    certain = certain_shift(summary)
    expected = np.where(
        summary["lower"] > 0, summary["lower"], np.where(summary["upper"] < 0, -summary["upper"], 0)
    )
    np.testing.assert_array_equal(certain, expected)
    assert (certain.values[:, :3] > 0.5)[summary["perturbation"] == "A"].all()
    table = shift_table(draws, summary, 5)
    assert len(table) == 5
    assert table["clear"].all()
    low = np.where(table["lower"] > 0, table["lower"], -table["upper"])
    assert (np.diff(low) <= 0).all()


def test_coverage_counts_the_means_inside_their_interval():
    draws = fake_draws(num_draws=400)
    share, number = coverage(draws)
    assert number == 200
    predicted = draws["posterior_predictive"]["population_mean"].values[0]
    low, high = np.quantile(predicted, (0.05, 0.95), axis=0)
    observed = draws["observed_data"]["population_mean"].values
    # Ranks, not interpolated quantiles: values right on the edge of their interval may differ.
    assert share == pytest.approx(((observed >= low) & (observed <= high)).mean(), abs=0.011)
    assert coverage(fake_draws(observed_shift=6.0))[0] < 0.01


def test_figures_show_what_they_say():
    draws = fake_draws(predicted=("d4", "d5"))
    bars = plots.variance_decomposition(draws).axes[0].patches
    np.testing.assert_allclose([bar.get_width() for bar in bars], [40, 10, 5, 10, 20, 5, 10])
    summary = summarise_shifts(draws)
    condition = conditions(summary)[0]
    forest = shift_forest(draws, condition, summary).axes[0]
    names = [label.get_text() for label in forest.get_yticklabels()]
    part = summary.isel(population=populations_of(summary, condition)).sel(gene=names)
    dots = [line for line in forest.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(np.stack([dot.get_xdata() for dot in dots]), part["shift"].values)
    u = draws["posterior"]["microenvironment"]
    panels = plots.microenvironments(draws).axes
    assert len(panels) == 2
    drawn = np.concatenate([line.get_xdata() for line in panels[0].get_lines() if line.get_marker() in "oD"])
    np.testing.assert_allclose(drawn, u.isel(factor=0).mean(("chain", "draw")), atol=1e-12)


def test_the_picture_of_one_population_holds_the_numbers_of_the_draws():
    draws = fake_draws(predicted=("d4", "d5"))
    posterior, condition = draws["posterior"].dataset, "B | A"
    panels = one_population_in_every_batch(draws, condition).axes
    own = posterior["batch_response"].sel(leading_condition=condition).mean(("chain", "draw"))
    for g, axes in enumerate(panels[:4]):
        drawn = {line.get_marker(): line.get_xdata() for line in axes.get_lines()}
        expected = own.isel(leading_gene=g).values
        np.testing.assert_allclose(np.concatenate([drawn["o"], drawn["D"]]), expected)
        shared = posterior["fixed_response"].sel(leading_condition=condition).isel(leading_gene=g)
        np.testing.assert_allclose(drawn["s"], float(shared.mean()))
        measured = draws["constant_data"]["measured_response"].sel(leading_condition=condition)
        np.testing.assert_allclose(drawn["x"], measured.isel(leading_gene=g))
    names = [label.get_text() for label in panels[0].get_yticklabels()]
    assert names == ["d1", "d2", "d3", "d4", "d5", "shared by all"]


def test_densities_say_how_probable_the_direction_is():
    draws = fake_draws(num_draws=200, num_genes=3)
    shift = draws["predictions"]["shift"]
    shift[:] = np.random.default_rng(1).standard_normal(shift.shape) + np.array([9.0, 1.0, -1.0])
    summary = summarise_shifts(draws)
    titles = {}
    for axes in gene_posteriors(draws, conditions(summary)[0], summary).axes[:3]:
        gene, text = axes.get_title("left").split(": ")
        titles[gene] = text
    condition = populations_of(summary, conditions(summary)[0])
    assert titles["gene0"] == "up > 99 %"
    for name, way, sign in (("gene1", "up", 1), ("gene2", "down", -1)):
        one = sign * shift.isel(population=condition[0]).sel(gene=name).values
        assert titles[name] == f"{way} {100 * (one > 0).mean():.0f} %"


def test_figures_leave_no_trace_in_pyplot():
    from matplotlib import pyplot, rcParams

    before = dict(rcParams)
    draws = fake_draws()
    predictive_pit(draws)
    predictive_distribution(draws)
    shift_overview(draws)
    assert pyplot.get_fignums() == []
    assert dict(rcParams) == before
