"""The referee itself: it passes exact posteriors, and catches wrong ones; NUTS passes, a wrong sampler does not."""

import jax
import numpy as np
import pytest

from hilbertcell.inference import calibration
from hilbertcell.inference.calibration import (
    calibrate,
    calibration_p,
    coverage,
    holm,
    nuts_posterior,
    ranks,
    shrunk,
    small_experiment,
    svi_posterior,
    tarp_ranks,
    uniformity_p,
)

N, S = 300, 50


def conjugate(seed: int, shrink: float = 1.0, shift: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Truths (N,) and posterior draws (N, S) of a Gaussian mean seen once with unit noise; spread times `shrink`."""
    rng = np.random.default_rng(seed)
    truth = rng.standard_normal(N)
    mean = (truth + rng.standard_normal(N)) / 2
    return truth, mean[:, None] + shift + shrink * np.sqrt(0.5) * rng.standard_normal((N, S))


def test_level_of_the_uniformity_test_is_the_nominal_one(monkeypatch):
    monkeypatch.setattr(calibration, "_NULL_DRAWS", 1000)
    rng = np.random.default_rng(0)
    p = np.array(
        [uniformity_p(rng.integers(0, 21, 100), 20, np.random.default_rng(seed)) for seed in range(200)]
    )
    # Binomial(200, 0.1): 20 expected, sd 4.2; discreteness can only lower it.
    assert 6 < (p <= 0.1).sum() < 34
    assert 70 < (p <= 0.5).sum() < 130


@pytest.mark.parametrize(("shrink", "shift"), [(0.7, 0.0), (1.4, 0.0), (1.0, 0.3)])
def test_draws_that_are_too_narrow_too_wide_or_shifted_are_caught(shrink, shift):
    rng = np.random.default_rng(1)
    exact = ranks(*conjugate(2))
    assert exact.min() >= 0
    assert exact.max() <= S
    assert uniformity_p(exact, S, rng) > 0.05
    assert uniformity_p(ranks(*conjugate(2, shrink, shift)), S, rng) < 0.001


def test_coverage_has_its_level_even_with_few_draws_and_sees_the_shrinkage():
    truth, draws = conjugate(3)
    se = np.sqrt(0.9 * 0.1 / N)
    assert abs(coverage(truth, draws[:, :25]).mean() - 0.9) < 3.5 * se
    # Nominal 90 % intervals of half the width cover 2 Phi(0.82) - 1 = 0.59.
    assert abs(coverage(truth, conjugate(3, shrink=0.5)[1]).mean() - 0.59) < 0.1


def test_tarp_sees_wrong_correlations_that_no_margin_shows():
    rng = np.random.default_rng(4)
    truth = rng.standard_normal((N, 2)) @ np.array([[1.0, 0.95], [0.0, 0.3]])
    exact = rng.standard_normal((N, S, 2)) @ np.array([[1.0, 0.95], [0.0, 0.3]])
    apart = exact.copy()
    apart[..., 1] = exact[:, rng.permutation(S), 1]  # margins kept, correlation lost
    assert uniformity_p(tarp_ranks(truth, exact, rng), S, rng) > 0.05
    assert uniformity_p(tarp_ranks(truth, apart, rng), S, rng) < 0.05
    assert uniformity_p(ranks(truth[:, 1], apart[..., 1]), S, rng) > 0.05


def test_holm_adjusts_in_order():
    adjusted = holm({"a": 0.01, "b": 0.04, "c": 0.03})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})


@pytest.mark.slow
def test_nuts_is_calibrated_and_a_wrong_sampler_is_not():
    """300 simulations, 9 quantities and their joint coverage, level 1 % for all of them together (Holm)."""
    with jax.enable_x64(True):
        result = calibrate(jax.random.key(0), small_experiment(), nuts_posterior(200, 30, 10, 5), 300)
    rng = np.random.default_rng(0)
    right = calibration_p(result.truth, result.draws, rng)
    assert min(right.values()) > 0.01, right
    assert min(calibration_p(result.truth, shrunk(result.draws), rng).values()) < 0.01
    assert result.notes["_diverging"].mean() < 0.03  # a draw is marked where any of its ten steps diverged
    for name in ("Gamma u", "B Gamma u + Lambda u", "prediction"):
        cover = coverage(result.truth[name], result.draws[name])
        assert abs(cover.mean() - 0.9) < 0.04, name


@pytest.mark.slow
def test_svi_covers_predictions_and_effects():
    """Of the invariants of the program SVI is too sure (docs: benchmarks); predictions and effects have their level."""
    with jax.enable_x64(True):
        result = calibrate(jax.random.key(0), small_experiment(), svi_posterior(200, 6000, 0.05), 300)
    for name in ("prediction", "effect"):
        cover = coverage(result.truth[name], result.draws[name])
        assert abs(cover.mean() - 0.9) < 0.04, name
