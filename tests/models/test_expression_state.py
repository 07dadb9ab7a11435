"""The posterior of the rates: planted programs and gamma shapes come back, means are kept."""

import numpy as np
import pytest
from scipy import sparse

from hilbertcell.models.expression_state import SPREAD_PRIOR, fit_expression_state


def planted(n=800, G=120, programs=3, shape=np.inf, depth=400.0, seed=0):
    """Counts of cells that each mix a few programs; also the true rates (n, G)."""
    rng = np.random.default_rng(seed)
    h = rng.gamma(0.3, size=(programs, G)) + 0.01
    h /= h.sum(1, keepdims=True)
    share = rng.dirichlet(np.full(programs, 0.4), n)
    rates = depth * rng.lognormal(0, 0.3, n)[:, None] * (share @ h)
    factor = 1.0 if np.isinf(shape) else rng.gamma(shape, size=rates.shape) / shape
    return rng.poisson(rates * factor), rates


def expected(state):
    return state.weight_shape / state.weight_rate @ state.programs


def log_likelihood(counts, rates):
    return (counts * np.log(rates) - rates).sum() / counts.sum()


def test_programs_predict_fresh_counts_better_than_the_size_factor():
    counts, rates = planted()
    fresh = np.random.default_rng(9).poisson(rates)
    library = counts.sum(1)
    state = fit_expression_state(sparse.csr_array(counts), library)
    size_factor = library[:, None] * counts.sum(0) / counts.sum()
    truth, found, null = (log_likelihood(fresh, r) for r in (rates, expected(state), size_factor))
    assert null < found < truth
    assert found - null > 0.8 * (truth - null)


def test_fresh_counts_are_not_predicted_worse_where_there_are_no_programs():
    counts, rates = planted(n=300, programs=1)
    fresh = np.random.default_rng(9).poisson(rates)
    state = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    assert state.programs.shape[0] > 1
    size_factor = counts.sum(1)[:, None] * counts.sum(0) / counts.sum()
    gap = log_likelihood(fresh, size_factor) - log_likelihood(fresh, expected(state))
    assert (
        gap < 0.02
    )  # a parameter for each of 300 x 3 weights is paid for by fewer than 2 % of a nat per molecule


@pytest.mark.parametrize("n", [30, 400])
def test_rates_keep_the_mean_of_every_gene(n):
    counts, _ = planted(n=n, shape=2.0)
    state = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    np.testing.assert_allclose(expected(state).sum(0), counts.sum(0) + 0.5)


@pytest.mark.parametrize("shape", [1.0, 3.0, np.inf])
def test_gamma_shapes_come_back_where_counts_are_many(shape):
    rng = np.random.default_rng(3)
    n, mean = 90, rng.uniform(5, 20, 200)  # one program
    factor = 1.0 if np.isinf(shape) else rng.gamma(shape, size=(n, 200)) / shape
    counts = rng.poisson(mean * factor, (n, 200))
    spread = 1 / fit_expression_state(sparse.csr_array(counts), np.full(n, mean.sum())).shape
    error = spread.std() / np.sqrt(200)
    bias = 0.15 / shape + 0.005  # shrinkage, and the mean fitted to the same cells
    assert abs(spread.mean() - 1 / shape) < 4 * error + bias


def test_genes_without_counts_have_small_rates_and_the_prior_shape():
    counts, _ = planted(n=50)
    counts[:, :5] = 0
    state = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    total = expected(state).sum(0)[:5]
    np.testing.assert_allclose(total, 0.5, rtol=1e-6)
    np.testing.assert_allclose(1 / state.shape[:5], SPREAD_PRIOR, rtol=0.05)


def test_order_of_cells_does_not_matter():
    counts, _ = planted(n=250)
    order = np.random.default_rng(4).permutation(250)
    one = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    other = fit_expression_state(sparse.csr_array(counts[order]), counts.sum(1)[order])
    np.testing.assert_allclose(expected(one)[order], expected(other), rtol=1e-6)
    np.testing.assert_allclose(one.shape, other.shape, rtol=1e-6)


def test_draws_of_the_weights_spread_about_the_posterior_mean():
    counts, _ = planted(n=200)
    state = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    rng = np.random.default_rng(5)
    draws = np.stack([state.draw_weights(rng) for _ in range(400)])
    mean, sd = state.weight_shape / state.weight_rate, np.sqrt(state.weight_shape) / state.weight_rate
    assert (np.abs(draws.mean(0) - mean) < 5.5 * sd / 20).all()
    np.testing.assert_allclose(draws.std(0) / sd, 1, atol=0.35)


def test_selected_cells_may_repeat():
    counts, _ = planted(n=200)
    state = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    rows = np.array([3, 3, 150])
    np.testing.assert_array_equal(expected(state.select(rows)), expected(state)[rows])


def test_cells_without_counts_and_a_single_cell_are_legal():
    counts, _ = planted(n=5)
    counts[2] = 0
    state = fit_expression_state(sparse.csr_array(counts), counts.sum(1))
    assert expected(state)[2].max() < 1e-9
    assert np.isfinite(expected(fit_expression_state(sparse.csr_array(counts[:1]), counts[:1].sum(1)))).all()
