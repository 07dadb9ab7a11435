"""Marks against closed forms: binomial thinning, gamma-Poisson margins, the floor beyond MAX_FOLD."""

import numpy as np
import pytest
from scipy import sparse, stats

from hilbertcell.models.marked_counts import FLOOR_SHAPE, MAX_FOLD, CellRates, MarkedCounts, reveal_marks

FALSE_ALARM = 1e-5  # each chi-square test of a fixed seed may fail once in 100,000 rewrites of the sampler


def reveal(counts, mean=1.0, shape=2.0, lower=0.0, upper=1.0, amplitude=None, seed=0):
    """Marks of counts (n, G) whose cells all have the expected count `mean`."""
    counts = sparse.csc_array(np.asarray(counts))
    num_cells, num_genes = counts.shape
    full = lambda value: np.full(num_genes, value)
    rates = CellRates(
        np.full((num_cells, 1), mean, np.float32),
        np.ones((1, num_genes), np.float32),
        full(np.float32(shape)),
        np.ones(num_cells, np.float32) if amplitude is None else np.asarray(amplitude, np.float32),
    )
    return reveal_marks(
        counts, np.arange(num_genes), rates, full(lower), full(upper), np.random.default_rng(seed)
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
@pytest.mark.parametrize("gain", [0.5, 1.3, 2.9])
def test_margins_stay_gamma_poisson_up_to_max_fold(mean, shape, gain):
    y = gamma_poisson(mean, shape, (40_000, 1))
    moved = dense(reveal(y, mean, shape, upper=MAX_FOLD), gain, len(y))[:, 0]
    assert agree(moved, stats.nbinom(shape, shape / (shape + gain * mean)))


def test_margins_are_those_of_each_kind_of_cell():
    """Molecules arrive in proportion to the rate of the cell that has the counts, not to that of the others."""
    n, shape, gain = 40_000, 3.0, 2.0
    mean = np.repeat([0.5, 4.0], n // 2)
    y = np.random.default_rng(1).poisson(mean * np.random.default_rng(2).gamma(shape, size=n) / shape)
    rates = CellRates(
        mean[:, None].astype(np.float32),
        np.ones((1, 1), np.float32),
        np.full(1, shape, np.float32),
        np.ones(n, np.float32),
    )
    one = np.ones(1)
    marked = reveal_marks(
        sparse.csc_array(y[:, None]), np.arange(1), rates, one, gain * one, np.random.default_rng(0)
    )
    moved = dense(marked, gain, n)[:, 0]
    for m, here in zip((0.5, 4.0), (moved[: n // 2], moved[n // 2 :]), strict=True):
        assert agree(here, stats.nbinom(shape, shape / (shape + gain * m)))


def test_posterior_mean_rates_would_lose_variance():
    mean, shape, gain, n = 0.5, 2.0, 3.0, 40_000
    y = gamma_poisson(mean, shape, n)
    exact = gain * mean + (gain * mean) ** 2 / shape
    drawn = dense(reveal(y[:, None], mean, shape, upper=gain), gain, n)[:, 0]
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
    path = [dense(marked, gain, 300) for gain in (0.0, 0.4, 1.0, 2.5, MAX_FOLD, 4.5, 20.0)]
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


def test_a_narrow_range_holds_the_law_of_the_whole_one():
    """Molecules outside the range are decided at once: margins at its ends are those of any range."""
    mean, shape, n = 2.0, 2.0, 40_000
    y = gamma_poisson(mean, shape, (n, 1))
    for lower, upper in ((0.6, 0.7), (0.9, 1.1), (1.4, 1.5)):
        marked = reveal(y, mean, shape, lower=lower, upper=upper)
        assert len(marked.marks) < 0.25 * y.sum()
        for gain in (lower, upper):
            assert agree(dense(marked, gain, n)[:, 0], stats.nbinom(shape, shape / (shape + gain * mean)))


def test_new_molecules_follow_the_rates_of_cells_and_genes():
    """Where nothing was counted: sums over cells and over genes of weights x programs, within Poisson errors."""
    rng = np.random.default_rng(3)
    weights, programs = rng.gamma(1.0, size=(500, 3)), rng.gamma(1.0, size=(3, 40))
    weights[::7] = 0.0
    rates = CellRates(
        weights.astype(np.float32),
        programs.astype(np.float32),
        np.full(40, 1e6, np.float32),
        np.ones(500, np.float32),
    )
    counts = sparse.csc_array((500, 40), dtype=int)
    marked = reveal_marks(
        counts, np.arange(40), rates, np.ones(40), np.full(40, 2.0), np.random.default_rng(0)
    )
    new, mu = dense(marked, 2.0, 500), weights @ programs
    for axis in (0, 1):
        expected = mu.sum(axis)
        assert (np.abs(new.sum(axis) - expected) <= 5 * np.sqrt(expected)).all()
    assert new[::7].sum() == 0


def test_sums_over_cells_and_changing_entries():
    y = gamma_poisson(2.0, 2.0, (200, 5))
    marked = reveal(y, 2.0, lower=0.8, upper=1.3)
    gain = np.array([0.8, 1.3, 1.0, 0.9, 1.2])
    np.testing.assert_array_equal(marked.cell_sums(gain), dense(marked, gain, 200).sum(1))
    chosen = np.array([True, False, True, True, False])
    part = marked.changing(chosen)
    assert len(part.cell) < 0.8 * chosen[np.repeat(np.arange(5), np.diff(marked.gene_start))].sum()
    change = dense(marked, 1.3, 200) - dense(marked, gain, 200)
    np.testing.assert_array_equal(dense(part, 1.3, 200) - dense(part, gain[chosen], 200), change[:, chosen])
