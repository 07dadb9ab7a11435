import numpy as np
import pytest
from scipy.stats import mannwhitneyu, rankdata
from scipy.stats import norm as gaussian

from hilbertcell.analyses.differential_expression import benjamini_hochberg, de_summary, rank_sum


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def test_rank_sum_equals_scipy_gene_by_gene_and_its_formula(rng):
    x, y = rng.poisson(1.0, size=(23, 12)).astype(float), rng.poisson(1.6, size=(41, 12)).astype(float)
    pvalue, shift = rank_sum(x, y)
    for g in range(12):
        expected = mannwhitneyu(x[:, g], y[:, g], method="asymptotic", use_continuity=True)
        assert pvalue[g] == pytest.approx(expected.pvalue, rel=1e-12)
        # by hand: U with mid-ranks, variance with the tie term, continuity 1/2 (Lehmann 1975, ch. 1)
        ranks = rankdata(np.concatenate([x[:, g], y[:, g]]))
        u = ranks[:23].sum() - 23 * 24 / 2
        _, ties = np.unique(ranks, return_counts=True)
        variance = 23 * 41 / 12 * (65 - (ties**3 - ties).sum() / (64 * 63))
        z = (abs(u - 23 * 41 / 2) - 0.5) / np.sqrt(variance)
        assert pvalue[g] == pytest.approx(2 * gaussian.sf(z), rel=1e-9)
    np.testing.assert_allclose(shift, x.mean(0) - y.mean(0))


def test_constant_genes_are_not_called(rng):
    x, y = rng.normal(size=(10, 3)), rng.normal(size=(12, 3))
    x[:, 1] = y[:, 1] = 0.0
    x[:, 2], y[:, 2] = 0.0, 1.0  # constant on each side, but different: as significant as can be
    pvalue, _ = rank_sum(x, y)
    assert pvalue[1] == 1.0
    assert pvalue[2] < 1e-4
    assert (rank_sum(x[:, 1:2], y[:, 1:2])[0] == 1.0).all()


def test_benjamini_hochberg_against_a_worked_example():
    # m = 4: 0.01 * 4/1, 0.02 * 4/2, 0.03 * 4/3, 0.5; then the running minimum from the right
    np.testing.assert_allclose(benjamini_hochberg(np.array([0.02, 0.5, 0.01, 0.03])), [0.04, 0.5, 0.04, 0.04])


def screen(rng, num_cells, shift):
    return rng.normal(size=(num_cells, len(shift))) + shift


def test_summary_of_a_perfect_prediction_and_of_none(rng):
    shift = np.where(np.arange(200) < 30, 1.5, 0.0) * np.where(np.arange(200) % 2, 1, -1)
    truth, reference = screen(rng, 80, shift), screen(rng, 80, np.zeros(200))
    perfect = de_summary(truth, truth, reference)
    assert perfect["true"] >= 28
    assert perfect["called_ratio"] == perfect["overlap_at_N"] == perfect["precision_at_N"] == 1.0
    assert perfect["lfc_spearman"] == pytest.approx(1.0)
    assert perfect["direction_match"] == 1.0
    nothing = de_summary(screen(rng, 80, 0 * shift), truth, reference)
    assert nothing["called"] <= 3
    assert nothing["overlap_at_N"] < 0.1


def test_fresh_cells_score_high_and_a_swap_of_control_and_perturbed_low(rng):
    shift = np.where(np.arange(200) < 30, np.linspace(0.8, 3, 200), 0.0) * np.where(np.arange(200) % 2, 1, -1)
    truth, reference = screen(rng, 80, shift), screen(rng, 80, np.zeros(200))
    fresh = de_summary(screen(rng, 80, shift), truth, reference)
    assert fresh["precision_at_N"] > 0.85
    assert fresh["lfc_spearman"] > 0.8
    swapped = de_summary(screen(rng, 80, -shift), truth, reference)
    assert swapped["direction_match"] < 0.15  # a few genes are called by chance
    assert swapped["lfc_spearman"] < -0.7
    assert swapped["called"] > 25  # its number of genes alone would not show it


def test_precision_and_overlap_by_hand():
    # Genes of disjoint supports: significance is certain, |shift| is known.
    reference = np.tile(np.arange(40.0)[:, None] / 1000, (1, 6))
    base = np.random.default_rng(0).permuted(reference, axis=0)
    truth = base + np.array([5, 4, 3, 0, 0, 0])
    prediction = base + np.array([9, 0, 2, 0, 7, 0])
    summary = de_summary(prediction, truth, reference)
    assert (summary["called"], summary["true"]) == (3, 3)
    # truth in order: 0, 1, 2; prediction in order: 0, 4, 2
    assert summary["overlap_at_N"] == summary["precision_at_N"] == pytest.approx(2 / 3)
    two = de_summary(base + np.array([9, 0, 0, 0, 7, 0]), truth, reference)
    assert two["precision_at_N"] == pytest.approx(1 / 2)  # of 0, 4 only 0 is among the first two true genes
    assert two["overlap_at_N"] == pytest.approx(1 / 3)
    nobody = de_summary(base, base, reference)
    assert np.isnan(nobody["overlap_at_N"])
    assert np.isnan(nobody["precision_at_N"])


def test_shrunken_cells_call_more_genes(rng):
    shift = np.where(np.arange(200) < 30, 1.5, 0.3)
    truth, reference = screen(rng, 80, shift), screen(rng, 80, np.zeros(200))
    narrow = shift + 0.05 * rng.normal(size=(80, 200))
    fresh = de_summary(screen(rng, 80, shift), truth, reference)
    assert 0.8 < fresh["called_ratio"] < 1.2
    assert de_summary(narrow, truth, reference)["called_ratio"] > 1.3
