"""Bands that hold a right law as often as they say, dependence included, and that a wrong one leaves."""

import numpy as np
import pytest
from scipy.stats import binom

from hilbertcell.analyses.calibration_curves import (
    BAND,
    LEVELS,
    Checks,
    checks_of,
    coverage_by_batch,
    coverage_curve,
    ecdf_curve,
    pit,
)
from tests.fake_draws import fake_draws

NUM_DRAWS, NUM_VALUES, NUM_BATCHES = 300, 120, 6
BATCH = np.repeat([f"d{b}" for b in range(NUM_BATCHES)], NUM_VALUES // NUM_BATCHES)


def dependent(rng: np.random.Generator, size: int, shared: float = 0.6) -> np.ndarray:
    """Standard normal (size, N) whose values of one batch have correlation `shared`."""
    own = rng.standard_normal((size, NUM_VALUES))
    common = np.repeat(rng.standard_normal((size, NUM_BATCHES)), NUM_VALUES // NUM_BATCHES, axis=1)
    return np.sqrt(shared) * common + np.sqrt(1 - shared) * own


def checks(seed: int, shift: float = 0.0, scale: float = 1.0) -> Checks:
    rng = np.random.default_rng(seed)
    return Checks(shift + scale * dependent(rng, 1)[0], dependent(rng, NUM_DRAWS), BATCH)


def test_pit_and_coverage_are_shares_of_draws():
    found = checks(0)
    measured, replicated = pit(found)
    below = (found.drawn < found.observed).sum(axis=0)
    np.testing.assert_allclose(measured, (below + 0.5) / (NUM_DRAWS + 1))
    assert all(
        np.allclose(np.sort(column), (np.arange(NUM_DRAWS) + 0.5) / NUM_DRAWS) for column in replicated.T
    )
    curve = coverage_curve(measured, replicated)
    low, high = np.quantile(found.drawn, (0.05, 0.95), axis=0)
    inside = ((low <= found.observed) & (found.observed <= high)).mean()
    assert curve.value[LEVELS == 0.9][0] == pytest.approx(inside, abs=0.02)  # a value or two on the edge
    names, by_batch = coverage_by_batch(measured, replicated, BATCH, 0.9)
    assert list(names) == sorted(set(BATCH))
    assert (by_batch.x == NUM_VALUES // NUM_BATCHES).all()
    assert by_batch.value.mean() == pytest.approx(curve.value[LEVELS == 0.9][0])


def test_a_right_law_leaves_its_band_as_often_as_said():
    """500 data sets from the law itself; values of one batch hang together, which other bands would not forgive."""
    number = 500
    outside = {"ecdf": 0, "levels": 0, "batches": 0}
    for seed in range(number):
        found = checks(seed)
        values = pit(found)
        outside["ecdf"] += not ecdf_curve(*values).inside
        outside["levels"] += not coverage_curve(*values).inside
        outside["batches"] += not coverage_by_batch(*values, BATCH, 0.9)[1].inside
    low, high = binom.ppf([0.005, 0.995], number, 1 - BAND)
    assert low <= outside["ecdf"] <= high, outside
    assert low <= outside["levels"] <= high, outside
    assert low <= outside["batches"] <= high, outside


@pytest.mark.parametrize(
    ("fault", "seen_by"),
    [
        ({"scale": 2.5}, "levels"),
        ({"scale": 0.2}, "levels"),
        ({"shift": 1.5}, "ecdf"),
        ({"shift": -1.5}, "ecdf"),
    ],
)
def test_a_wrong_law_leaves_the_band(fault, seen_by):
    curve = {"ecdf": ecdf_curve, "levels": coverage_curve}[seen_by]
    assert sum(not curve(*pit(checks(seed, **fault))).inside for seed in range(10)) >= 8


def test_values_that_are_not_known_are_left_out():
    draws = fake_draws()
    draws["observed_data"]["population_mean"][:50] = np.nan
    found = checks_of(draws)
    assert found.observed.shape == (150,)
    assert found.drawn.shape == (100, 150)
    assert found.batch.shape == (150,)
