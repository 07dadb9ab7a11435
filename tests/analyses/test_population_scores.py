"""Whole drawn populations: the unsquared norm sees spread, and spread does not depend on how many cells are generated."""

import numpy as np
import pandas as pd
import pytest

from hilbertcell.analyses.law_scores import energy_score
from hilbertcell.analyses.population_scores import (
    NUM_POPULATIONS,
    SIZES,
    DrawnPopulations,
    population_energy_score,
    score_populations,
    spread_by_size,
)
from hilbertcell.models.feature_maps import fit_feature_map


@pytest.fixture
def rng():
    return np.random.default_rng(20)


def test_the_squared_norm_would_be_blind_to_spread(rng):
    # Populations spread with sd 1 in 5 features and are seen through 40 cells; one law is right, one is a point.
    num_truths, weights = 200, np.ones(5)
    truths = [rng.normal(size=5) + 2 * rng.normal(size=(40, 5)) for _ in range(num_truths)]

    def squared(draws, cells):
        truth, noise = cells.mean(0), cells.var(0, ddof=1) / len(cells)
        # E|X - X'|^2 / 2 is the sum of variances, to which the noise adds on both sides
        return ((draws - truth) ** 2 + noise).sum(1).mean() - (draws.var(0, ddof=1) + noise).sum()

    scores = {}
    for name, spread in {"right": 1.0, "point": 0.0}.items():
        laws = [spread * rng.normal(size=(60, 5)) for _ in truths]
        scores[name] = np.array(
            [
                (population_energy_score(draws, cells, weights, rng), squared(draws, cells))
                for draws, cells in zip(laws, truths, strict=True)
            ]
        )
    gain = scores["point"] - scores["right"]
    error = gain.std(0) / np.sqrt(num_truths)
    assert gain[:, 0].mean() > 5 * error[0]  # the unsquared norm prefers the right law
    assert abs(gain[:, 1].mean()) < 4 * error[1]  # the squared one cannot tell


def test_the_noise_of_the_truth_has_its_full_covariance(rng):
    mix = rng.normal(size=(4, 4))
    cells = rng.normal(size=(6, 4)) @ mix  # fewer cells than twice the features: a poor but exact covariance
    draws, weights = 0.1 * rng.normal(size=(3000, 4)), np.array([1.0, 4.0, 0.25, 1.0])
    noise = rng.multivariate_normal(np.zeros(4), np.cov(cells.T) / len(cells), size=3000)
    root = np.sqrt(weights)
    expected = energy_score((draws + noise) * root, cells.mean(0) * root)
    found = population_energy_score(draws, cells, weights, rng)
    spread = np.linalg.norm((draws + noise) * root, axis=1).std()
    assert abs(found - expected) < 5 * 2 * spread / np.sqrt(3000)


def pools(rng, spread, num_cells=60, repeats=40):
    """Populations whose means differ by `spread` (sd), cells of unit variance; many targets of 12 draws, 3 genes."""
    shape = repeats, NUM_POPULATIONS, num_cells, 3
    cells = rng.normal(size=shape)
    cells -= cells.mean(2, keepdims=True)  # whole populations have no sampling error
    return cells + spread * rng.normal(size=(repeats, NUM_POPULATIONS, 1, 3))


def test_spread_does_not_depend_on_the_number_of_cells(rng):
    found = np.array([list(spread_by_size(one, True, SIZES, rng).values()) for one in pools(rng, 0.5)])
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0) - 3 * 0.25) < 4 * error).all()
    difference = found - found[:, -1:]
    error = difference[:, :-1].std(0) / np.sqrt(len(found))
    assert (np.abs(difference[:, :-1].mean(0)) < 4 * error).all()


def test_cells_drawn_one_by_one_have_no_spread_left(rng):
    """Raw variances of means would fall as 1 / m; less their noise they are 0 at any m."""
    samples = rng.normal(size=(200, NUM_POPULATIONS, 256, 3))
    sizes = (16, 256)
    found = np.array([list(spread_by_size(one, False, sizes, rng).values()) for one in samples])
    error = found.std(0) / np.sqrt(len(found))
    assert (np.abs(found.mean(0)) < 4 * error).all()
    raw = samples[:, :, :16].mean(2).var(1, ddof=1).sum(1)
    assert raw.mean() == pytest.approx(3 / 16, rel=0.1)
    assert np.isnan(spread_by_size(samples[0], False, (1024,), rng)[1024])


def test_a_right_law_spreads_as_its_truth_and_scores_best(rng):
    num_targets, names = 60, pd.Index([f"t{t}" for t in range(60)])
    truth = [0.5 * rng.normal(size=3) + rng.normal(size=(50, 3)) for _ in names]
    feature_map = fit_feature_map(np.concatenate(truth), 3, 12)
    tables = {}
    for name, spread in {"right": 0.5, "point": 0.01, "wide": 2.0}.items():
        drawn = DrawnPopulations(list(pools(rng, spread, repeats=num_targets)), whole=True)
        tables[name] = score_populations(drawn, truth, feature_map, np.ones(3), names, 0)
    right = tables["right"]
    ratio = right["between_256"].mean() / right["between_true"].mean()
    assert ratio == pytest.approx(1.0, abs=4 * np.sqrt(2 / (3 * num_targets)))
    assert tables["point"]["between_4096"].mean() < 0.01 * right["between_4096"].mean()
    for other in ("point", "wide"):
        gain = tables[other]["population_energy"] - right["population_energy"]
        assert gain.mean() > 4 * gain.std() / np.sqrt(num_targets)
