"""Marks against closed forms: binomial thinning, gamma-Poisson margins, the floor beyond MAX_FOLD."""

import numpy as np
import pytest
from scipy import sparse, stats

from hilbertcell.models.marked_counts import FLOOR_SHAPE, MAX_FOLD, MarkedCounts, reveal_marks

FALSE_ALARM = 1e-5  # each chi-square test of a fixed seed may fail once in 100,000 rewrites of the sampler


def reveal(counts, mean=1.0, shape=2.0, lower=0.0, upper=1.0, amplitude=None, seed=0):
    """Marks of counts (n, G) whose cells all have the expected count `mean`."""
    counts = sparse.csc_array(np.asarray(counts))
    num_cells, num_genes = counts.shape
    full = lambda value: np.full(num_genes, value)
    return reveal_marks(
        counts,
        np.arange(num_genes),
        lambda genes: np.full((len(genes), num_cells), mean, dtype=np.float32),
        full(np.float32(shape)),
        np.ones(num_cells, np.float32) if amplitude is None else np.asarray(amplitude, np.float32),
        full(lower),
        full(upper),
        np.random.default_rng(seed),
    )


def dense(marked: MarkedCounts, gain, num_cells: int) -> np.ndarray:
    result = np.zeros((num_cells, len(marked.genes)), dtype=int)
    gene = np.repeat(np.arange(len(marked.genes)), np.diff(marked.gene_start))
    result[marked.cell, gene] = marked.counts(np.broadcast_to(gain, (len(marked.genes),)))
    return result


def gamma_poisson(mean, shape, size, seed=1):
    rng = np.random.default_rng(seed)
    return rng.poisson(mean * rng.gamma(shape, size=size) / shape)


def agree(sample, law, seed_note=""):
    """Chi-square test of counts against a discrete law, classes pooled until each expects 20."""
    edges, tail = [], 0.0
    for k in range(int(law.ppf(1 - 1e-9)) + 1):
        tail += law.pmf(k)
        if tail * len(sample) >= 20:
            edges.append(k)
            tail = 0.0
    observed = np.bincount(np.searchsorted(edges[:-1], sample), minlength=len(edges))
    chance = np.diff([0.0, *law.cdf(edges[:-1]), 1.0])
    return stats.chisquare(observed, chance * len(sample)).pvalue > FALSE_ALARM


@pytest.mark.parametrize("gain", [0.05, 0.3, 0.9])
def test_below_one_counts_are_binomial(gain):
    for count in (1, 5, 40):
        thinned = dense(reveal(np.full((20_000, 1), count)), gain, 20_000)
        assert agree(thinned[:, 0], stats.binom(count, gain))


@pytest.mark.parametrize(("mean", "shape"), [(0.2, 0.7), (3.0, 2.0), (10.0, 5.0)])
@pytest.mark.parametrize("gain", [0.5, 1.3, 3.9])
def test_margins_stay_gamma_poisson_up_to_max_fold(mean, shape, gain):
    y = gamma_poisson(mean, shape, (40_000, 1))
    moved = dense(reveal(y, mean, shape, upper=MAX_FOLD), gain, len(y))[:, 0]
    assert agree(moved, stats.nbinom(shape, shape / (shape + gain * mean)))


def test_posterior_mean_rates_would_lose_variance():
    mean, shape, gain, n = 0.5, 2.0, 4.0, 40_000  # exact variance 4.0; with posterior means 3.1
    y = gamma_poisson(mean, shape, n)
    exact = gain * mean + (gain * mean) ** 2 / shape
    drawn = dense(reveal(y[:, None], mean, shape, upper=4.0), gain, n)[:, 0]
    plugged = y + np.random.default_rng(2).poisson((gain - 1) * (shape + y) / (shape / mean + 1))
    error = np.std((drawn - drawn.mean()) ** 2) / np.sqrt(n)
    assert abs(drawn.var() - exact) < 4 * error
    assert plugged.var() < exact - 10 * error


def test_margins_of_the_floor_and_its_amplitude():
    """Of a gene without counts, beyond MAX_FOLD: its own rate up to there, then mu x amplitude x fresh gamma."""
    n, mean, shape = 40_000, 0.05, 3.0
    amplitude = np.repeat([0.5, 2.0], n // 2)
    marked = reveal(np.zeros((n, 2), int), mean, shape, lower=1.0, upper=40.0, amplitude=amplitude)
    at_fold, far = dense(marked, MAX_FOLD, n), dense(marked, 40.0, n)
    # no molecule seen: rate ~ Gamma(shape, shape / mean + 1)
    assert agree(at_fold[:, 0], stats.nbinom(shape, 1 / (1 + (MAX_FOLD - 1) * mean / (mean + shape))))
    floor = (far - at_fold)[:, 0]
    for a, here in zip((0.5, 2.0), (floor[: n // 2], floor[n // 2 :]), strict=True):
        assert agree(here, stats.nbinom(FLOOR_SHAPE, 1 / (1 + (40.0 - MAX_FOLD) * mean * a / FLOOR_SHAPE)))
    # genes share the amplitude and nothing else
    within = np.corrcoef(floor[: n // 2], (far - at_fold)[: n // 2, 1])[0, 1]
    assert abs(within) < 4 / np.sqrt(n / 2)
    assert np.corrcoef(floor, (far - at_fold)[:, 1])[0, 1] > 0.2


def test_counts_rise_with_the_gain_and_are_the_observed_ones_at_one():
    y = gamma_poisson(2.0, 2.0, (300, 7))
    y[:, 3] = 0
    marked = reveal(y, 2.0, upper=20.0)
    path = [dense(marked, gain, 300) for gain in (0.0, 0.4, 1.0, 2.5, 4.0, 4.5, 20.0)]
    assert (path[0] == 0).all()
    np.testing.assert_array_equal(path[2], y)
    assert all((np.diff(path, axis=0) >= 0).ravel())
    assert (path[-1][:, 3] > 0).any()


def test_unmarked_molecules_stay():
    y = gamma_poisson(2.0, 2.0, (200, 3))
    marked = reveal(y, 2.0, lower=1.0, upper=2.0)
    assert marked.base.sum() == y.sum()
    np.testing.assert_array_equal(dense(marked, 0.1, 200), y)  # nothing was drawn to go


def test_gains_differ_by_gene_and_selected_genes_keep_their_counts():
    y = gamma_poisson(2.0, 2.0, (200, 5))
    marked = reveal(y, 2.0, upper=3.0)
    gain = np.array([0.2, 3.0, 1.0, 0.0, 2.0])
    chosen = np.array([False, True, True, False, True])
    part = marked.select(chosen)
    np.testing.assert_array_equal(part.genes, [1, 2, 4])
    np.testing.assert_array_equal(dense(part, gain[chosen], 200), dense(marked, gain, 200)[:, chosen])
    np.testing.assert_array_equal(
        part.gene_sums(part.counts(gain[chosen])), dense(marked, gain, 200)[:, chosen].sum(0)
    )


def test_sums_of_genes_without_entries_are_zero():
    marked = reveal(np.array([[0, 2, 0], [0, 1, 0]]))
    np.testing.assert_array_equal(marked.gene_sums(marked.counts(np.ones(3))), [0, 3, 0])
    empty = reveal(np.zeros((4, 2), int))
    np.testing.assert_array_equal(empty.gene_sums(empty.counts(np.ones(2))), [0, 0])
