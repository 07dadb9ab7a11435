"""Within covariances: exact where they can be, shrunk by as much as the data ask, defined for a single cell."""

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hilbertcell.models.within_covariance import (
    EXACT_FEATURES,
    WithinCovariance,
    WithinPrior,
    fit_loadings,
    fit_within_prior,
    split_unique,
)


def moments_of(cells, scores):
    """(n, variance, factor covariance) of a list of cell arrays, as the streaming pass gives them."""
    n = np.array([len(x) for x in cells], float)
    rank = scores.shape[1]
    variance = np.full((len(cells), scores.shape[0]), np.nan)
    factor = np.full((len(cells), rank, rank), np.nan)
    for j, x in enumerate(cells):
        if len(x) > 1:
            variance[j] = x.var(0, ddof=1)
            factor[j] = np.cov((x @ scores).T).reshape(rank, rank)
    return n, variance, factor


def factor_model(num_features, rank, seed=0):
    """A covariance B B^T + diag(psi) with features in very different units; returns (B, psi)."""
    rng = np.random.default_rng(seed)
    units = np.logspace(-1, 1, num_features)
    return units[:, None] * rng.standard_normal((num_features, rank)), units**2 * rng.uniform(
        0.5, 2, num_features
    )


def draw_cells(B, psi, num_cells, rng):
    return rng.standard_normal((num_cells, B.shape[1])) @ B.T + np.sqrt(psi) * rng.standard_normal(
        (num_cells, len(psi))
    )


@pytest.fixture
def small():
    """Twelve populations of five features in two classes, one of them a single cell; identity scores."""
    rng = np.random.default_rng(5)
    codes = np.repeat([0, 1], 6)
    mixing = rng.standard_normal((2, 5, 5))
    sizes = [60, 9, 25, 40, 1, 30, 12, 50, 33, 21, 17, 45]
    cells = [
        rng.standard_normal((m, 5)) @ mixing[c] * rng.uniform(0.7, 1.4)
        for m, c in zip(sizes, codes, strict=True)
    ]
    return *moments_of(cells, np.eye(5)), codes


def test_with_identity_scores_the_covariance_is_the_credibility_blend(small):
    n, variance, covariance, codes = small
    prior = fit_within_prior(n, variance, covariance, codes, np.eye(5))
    within = prior.shrink(n, variance, covariance, codes)
    d0, d1 = prior.population_df, prior.class_df
    assert 1 < d0 < 1e4
    df = n - 1
    usable = df > 0
    by_class = [
        np.tensordot(df[(codes == c) & usable], covariance[(codes == c) & usable], 1) / df[codes == c].sum()
        for c in (0, 1)
    ]
    class_df = np.array([df[codes == c].sum() for c in (0, 1)])
    pool = np.tensordot(class_df, by_class, 1) / class_df.sum()
    for j in range(12):
        c = codes[j]
        of_class = (d1 * pool + class_df[c] * by_class[c]) / (d1 + class_df[c])
        expected = of_class if n[j] == 1 else (d0 * of_class + df[j] * covariance[j]) / (d0 + df[j])
        # The features' own part is kept above 1e-6 of their variance.
        np.testing.assert_allclose(within.dense(j), expected, atol=3e-6 * np.abs(expected).max())
    np.testing.assert_allclose(within.noise_variance[1], within.diagonal[1] / 9)
    np.testing.assert_allclose(prior.pooled().dense(0), pool, atol=3e-6 * np.abs(pool).max())


def test_a_class_the_fit_has_not_seen_leans_on_the_pool(small):
    n, variance, covariance, codes = small
    prior = fit_within_prior(n, variance, covariance, codes, np.eye(5))
    new = prior.shrink(np.ones(1), np.full((1, 5), np.nan), np.full((1, 5, 5), np.nan), np.array([-1]))
    np.testing.assert_allclose(new.dense(0), prior.pooled().dense(0), rtol=1e-12)
    with pytest.raises(ValueError, match="the fit has 2 classes"):
        prior.shrink(np.ones(1), variance[:1], covariance[:1], np.array([2]))


def test_a_class_of_single_cells_takes_the_pool_and_a_large_one_keeps_its_own():
    rng = np.random.default_rng(2)
    cells = [rng.standard_normal((400, 3)) for _ in range(8)]
    cells += [4 * rng.standard_normal((400, 3)) for _ in range(8)] + [rng.standard_normal((1, 3))] * 2
    n, variance, covariance = moments_of(cells, np.eye(3))
    prior = fit_within_prior(n, variance, covariance, np.repeat([0, 1, 2], [8, 8, 2]), np.eye(3))
    np.testing.assert_array_equal(prior.class_variance[2], prior.pooled_variance)
    # 3,200 cells each: the classes are known to 2.5 % and differ by a factor 16.
    np.testing.assert_allclose(prior.class_variance[:2], np.array([1, 16])[:, None] * np.ones(3), rtol=0.15)


@pytest.mark.parametrize("kind", ["gaussian", "laplace"])
def test_equal_variances_are_shrunk_all_the_way_whatever_the_tails(kind):
    # s^2 of 20 Laplace cells (kurtosis 6) has relative variance 5/n, not 2/n: taken for Gaussian, that scatter
    # would pass for a spread of variances and give 2 / (3/20) = 13 prior degrees of freedom.
    rng = np.random.default_rng(0)
    sizes = np.tile([10, 20, 40, 80, 160], 12)
    cells = [getattr(rng, {"gaussian": "normal", "laplace": "laplace"}[kind])(size=(m, 40)) for m in sizes]
    moments = moments_of(cells, np.eye(40))
    prior = fit_within_prior(*moments, np.repeat([0, 1, 2], 20), np.eye(40))
    assert prior.population_df > 300
    assert prior.class_df > 300


def test_prior_degrees_of_freedom_are_those_of_the_simulated_spread():
    # The posterior mean of an inverse-gamma variance with d0 prior degrees of freedom is linear in s^2 and its prior
    # mean, with weight d0 - 2 on the latter: here the credibility estimate is the exact one.
    rng = np.random.default_rng(1)
    estimates = []
    for _ in range(8):
        sizes = np.tile([10, 20, 40, 80, 160], 12)
        sd = np.sqrt(22 / rng.chisquare(24, (60, 40)))
        cells = [s * rng.standard_normal((m, 40)) for s, m in zip(sd, sizes, strict=True)]
        moments = moments_of(cells, np.eye(40))
        estimates.append(
            float(fit_within_prior(*moments, np.repeat([0, 1, 2], 20), np.eye(40)).population_df)
        )
    log = np.log(estimates)
    assert abs(log.mean() - np.log(22)) < 4 * log.std(ddof=1) / np.sqrt(8)
    assert log.std(ddof=1) < 0.3


def test_shrinkage_beats_the_raw_and_the_class_variance():
    rng = np.random.default_rng(3)
    sizes = np.tile([6, 12, 25, 50], 20)
    truth = 22 / rng.chisquare(24, (80, 30))
    cells = [np.sqrt(v) * rng.standard_normal((m, 30)) for v, m in zip(truth, sizes, strict=True)]
    n, variance, covariance = moments_of(cells, np.eye(30))
    codes = np.zeros(80, int)
    prior = fit_within_prior(n, variance, covariance, codes, np.eye(30))
    error = ((prior.shrink(n, variance, covariance, codes).diagonal - truth) ** 2).mean()
    assert error < 0.8 * ((variance - truth) ** 2).mean()
    assert error < 0.9 * ((prior.class_variance[0] - truth) ** 2).mean()


def test_split_recovers_a_factor_model_that_projection_alone_would_overstate():
    B, psi = factor_model(40, 3)
    C = B @ B.T + np.diag(psi)
    scores = B / psi[:, None] @ np.linalg.inv(B.T @ (B / psi[:, None]))
    factor, rest = split_unique(C.diagonal()[None], (scores.T @ C @ scores)[None], scores, B)
    np.testing.assert_allclose(factor[0], np.eye(3), atol=1e-6)
    np.testing.assert_allclose(rest[0], psi, rtol=1e-5)
    overstated = scores.T @ C @ scores
    assert np.linalg.eigvalsh(overstated).min() > 1.02


def test_split_stays_a_covariance_when_the_moments_do_not_fit():
    rng = np.random.default_rng(0)
    B, _ = factor_model(30, 4)
    scores = np.linalg.pinv(B).T
    variance = rng.uniform(0.01, 50, (6, 30))
    factor, rest = split_unique(variance, np.tile(np.eye(4), (6, 1, 1)), scores, B)
    assert (rest > 0).all()
    assert np.linalg.eigvalsh(factor).min() > -1e-12
    diagonal = np.einsum("dl,plk,dk->pd", B, factor, B) + rest
    assert (diagonal >= variance * (1 - 1e-9)).all()
    fits = rest > 2e-6 * variance
    np.testing.assert_allclose(diagonal[fits], variance[fits], rtol=1e-9)


def test_low_rank_covariance_of_simulated_cells_is_recovered():
    # More features than EXACT_FEATURES, so the streaming pass keeps factors only.
    num_features = EXACT_FEATURES + 40
    B, psi = factor_model(num_features, 3)
    rng = np.random.default_rng(4)
    cells = [draw_cells(B, psi, 1_500, rng) for _ in range(4)]
    codes = np.repeat(np.arange(4), 1_500)
    scores, _ = fit_loadings(np.concatenate(cells), codes, rank=6)
    assert scores.shape == (num_features, 6)
    n, variance, covariance = moments_of(cells, scores)
    prior = fit_within_prior(n, variance, covariance, np.zeros(4, int), scores)
    C = B @ B.T + np.diag(psi)
    scale = np.sqrt(np.outer(C.diagonal(), C.diagonal()))
    error = (prior.pooled().dense(0) - C) / scale
    # Correlations from 6,000 cells have an sd of at most 1/sqrt(6000) = 0.013.
    assert np.sqrt((error**2).mean()) < 0.013
    within = prior.shrink(n, variance, covariance, np.zeros(4, int))
    A = rng.standard_normal((num_features, 7)) / np.sqrt(C.diagonal())[:, None]
    np.testing.assert_allclose(within.project(A)[2], A.T @ within.dense(2) @ A, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(within.apply(2, A), within.dense(2) @ A, rtol=1e-9, atol=1e-9)


def test_loadings_do_not_depend_on_units_or_on_differences_between_populations():
    num_features = EXACT_FEATURES + 10
    B, psi = factor_model(num_features, 2)
    rng = np.random.default_rng(0)
    phi, codes = draw_cells(B, psi, 400, rng), np.arange(400) % 5
    scores, center = fit_loadings(phi, codes, rank=2)
    units = rng.uniform(0.1, 10, num_features)
    shifts = 50 * rng.standard_normal((5, num_features))
    changed, _ = fit_loadings((phi + shifts[codes]) * units, codes, rank=2)
    np.testing.assert_allclose(changed * units[:, None], scores, atol=1e-6 * np.abs(scores).max())
    np.testing.assert_allclose(center, phi.mean(0))


def test_loadings_of_few_features_are_the_identity():
    phi = np.random.default_rng(0).standard_normal((50, EXACT_FEATURES))
    np.testing.assert_array_equal(fit_loadings(phi, np.zeros(50, int), rank=3)[0], np.eye(EXACT_FEATURES))


def test_a_constant_feature_has_no_loading_and_a_tiny_variance():
    rng = np.random.default_rng(0)
    phi = rng.standard_normal((300, EXACT_FEATURES + 5))
    phi[:, 3] = 7.0
    codes = np.repeat([0, 1, 2], 100)
    scores, _ = fit_loadings(phi, codes, rank=4)
    assert (scores[3] == 0).all()
    moments = moments_of([phi[codes == c] for c in range(3)], scores)
    prior = fit_within_prior(*moments, np.zeros(3, int), scores)
    within = prior.shrink(*moments, np.zeros(3, int))
    assert (within.diagonal[:, 3] > 0).all()
    assert (within.diagonal[:, 3] < 1e-5).all()


def test_without_two_cells_anywhere_the_error_says_so():
    nothing = (np.ones(3), np.full((3, 2), np.nan), np.full((3, 2, 2), np.nan), np.zeros(3, int), np.eye(2))
    with pytest.raises(ValueError, match="none of the 3 populations has two cells"):
        fit_within_prior(*nothing)
    phi = np.random.default_rng(0).standard_normal((4, EXACT_FEATURES + 1))
    with pytest.raises(ValueError, match="none of the 4 pilot populations has two cells"):
        fit_loadings(phi, np.arange(4))


def test_selection_and_storage_keep_the_covariances(small, tmp_path):
    n, variance, covariance, codes = small
    prior = fit_within_prior(n, variance, covariance, codes, np.eye(5))
    save_file(prior.to_arrays(), tmp_path / "prior.safetensors")
    stored = WithinPrior.from_arrays(load_file(tmp_path / "prior.safetensors"))
    within = prior.shrink(n, variance, covariance, codes)
    again = WithinCovariance.from_arrays(stored.shrink(n, variance, covariance, codes).to_arrays())
    np.testing.assert_array_equal(again.select(codes == 1).dense(2), within.dense(8))
