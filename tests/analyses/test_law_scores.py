import numpy as np
import pytest
import scoringrules

from hilbertcell.analyses.law_scores import (
    LEVELS,
    crps_sample,
    energy_score,
    excess_squared_error,
    interval,
    pit,
    score_law,
    variogram_score,
)


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def test_sample_scores_equal_scoringrules(rng):
    # Not centred and of unequal scales, so that a swapped axis or argument shows.
    scale = np.array([0.1, 1.0, 5.0, 2.0])
    draws, truth = 100 + scale * rng.normal(size=(37, 4)), 98 + scale * rng.normal(size=4)
    crps = scoringrules.crps_ensemble(truth, draws, m_axis=0, estimator="fair")
    np.testing.assert_allclose(crps_sample(draws, truth), crps, rtol=1e-10)
    energy = scoringrules.es_ensemble(truth, draws, estimator="fair")
    np.testing.assert_allclose(energy_score(draws, truth), energy, rtol=1e-10)
    for power in (0.5, 1.0):
        variogram = scoringrules.vs_ensemble(truth, draws, p=power, estimator="fair")
        np.testing.assert_allclose(variogram_score(draws, truth, power), variogram, rtol=1e-10)


def test_crps_agrees_with_the_closed_form_of_a_gaussian(rng):
    truth = np.array([0.0, 1.5, -3.0])
    draws = 1.0 + 2.0 * rng.normal(size=(40_000, 3))
    expected = scoringrules.crps_normal(truth, 1.0, 2.0)
    error = np.abs(draws - truth).std(0) / np.sqrt(len(draws))
    assert (np.abs(crps_sample(draws, truth) - expected) < 4 * error).all()


@pytest.mark.parametrize("score", [energy_score, variogram_score])
def test_fair_scores_do_not_depend_on_the_number_of_draws(rng, score):
    truth = rng.normal(size=3)
    few = np.array([score(rng.normal(size=(4, 3)), truth) for _ in range(4000)])
    many = np.array([score(rng.normal(size=(40, 3)), truth) for _ in range(1000)])
    error = np.hypot(few.std() / np.sqrt(len(few)), many.std() / np.sqrt(len(many)))
    assert abs(few.mean() - many.mean()) < 4 * error


def test_only_the_truths_noise_is_subtracted(rng):
    latent, noise = 3.0, 0.5
    truth = latent + np.sqrt(noise) * rng.normal(size=20_000)
    excess = excess_squared_error(np.full_like(truth, latent + 0.7), truth, noise)
    assert abs(excess.mean() - 0.49) < 4 * excess.std() / np.sqrt(len(truth))


def test_intervals_are_calibrated_with_few_draws(rng):
    draws, truth = rng.normal(size=(19, 40_000)), rng.normal(size=40_000)
    for level in (50, 80, 90):  # with 19 draws the end points of these are order statistics
        lower, upper = interval(draws, level)
        cover = ((lower <= truth) & (truth <= upper)).mean()
        assert abs(cover - level / 100) < 4 * np.sqrt(level / 100 * (1 - level / 100) / len(truth))


def test_pit_is_uniform_for_the_right_law_and_not_for_wrong_ones(rng):
    draws, truth = rng.poisson(3, size=(50, 20_000)), rng.poisson(3, size=20_000)  # ties

    def counts(truth):
        return np.histogram(pit(draws, truth, rng), 10, (0, 1))[0]

    chi_square = ((counts(truth) - 2000) ** 2 / 2000).sum()
    assert (
        chi_square < 40
    )  # chi-square(9) exceeds it with probability 1e-5; without sharing ties it is > 1,000
    too_wide = counts(rng.poisson(9, size=20_000) - 6)
    assert too_wide[0] > 3000  # truth more spread than the law: mass at the ends
    assert too_wide[-1] > 3000


def test_score_law_is_calibrated_when_the_law_is_true_and_says_so_when_it_is_narrow(rng):
    num_targets, num_genes, noise = 60, 50, 0.3
    latent = rng.normal(size=(num_targets, num_genes))
    truth = latent + np.sqrt(noise) * rng.normal(size=latent.shape)
    variance = np.full_like(truth, noise)
    right = score_law(rng.normal(size=(200, *latent.shape)), truth, variance, rng)
    assert set(right) == {"excess", "crps", "pit", "residual"} | {
        f"{k}_{lev}" for lev in LEVELS for k in ("covered", "width")
    }
    for level in LEVELS:
        cover = right[f"covered_{level}"].mean()
        assert abs(cover - level / 100) < 4 * np.sqrt(level / 100 * (1 - level / 100) / truth.size)
    assert abs(right["excess"].mean() - 1) < 4 * right["excess"].std() / np.sqrt(truth.size)
    narrow = score_law(0.2 * rng.normal(size=(200, *latent.shape)), truth, variance, rng)
    assert narrow["covered_90"].mean() < 0.75
    assert narrow["crps"].mean() > right["crps"].mean()
    # the same mean: the squared error does not see the spread, with few draws either
    few = score_law(rng.normal(size=(3, *latent.shape)), truth, variance, rng)
    error = few["excess"].std() / np.sqrt(truth.size)
    assert abs(few["excess"].mean() - narrow["excess"].mean()) < 5 * error


def test_score_law_marks_missing_entries_and_refuses_wrong_shapes(rng):
    draws, truth, noise = rng.normal(size=(10, 2, 3)), np.zeros((2, 3)), np.ones((2, 3))
    truth[0, 1] = np.nan
    draws[:, 1, 2] = np.nan
    crps = score_law(draws, truth, noise, rng)["crps"]
    assert np.array_equal(np.isnan(crps), [[False, True, False], [False, False, True]])
    with pytest.raises(ValueError, match=r"draws \(10, 2, 3\), truth \(3, 2\)"):
        score_law(draws, truth.T, noise.T, rng)
    with pytest.raises(ValueError, match="at least 2 draws, got 1"):
        score_law(draws[:1], truth, noise, rng)
