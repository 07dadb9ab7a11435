"""Coordinates of populations: their noise law, their algebra, and what they leave out."""

import numpy as np
import pytest
from anndata import read_h5ad
from safetensors.numpy import load_file, save_file

from hilbertcell.models import embedding
from hilbertcell.models.embedding import Coordinates, fit_coordinates
from hilbertcell.models.feature_maps import fit_feature_map
from hilbertcell.models.within_covariance import EXACT_FEATURES, fit_loadings, fit_within_prior

UNITS = np.array([0.1, 1.0, 10.0, 1.0, 0.3, 3.0])  # features on very different scales
DIMENSION = len(UNITS)


def within_root(seed=0):
    """R with C = R R^T, a common within covariance with correlations."""
    rng = np.random.default_rng(seed)
    return UNITS[:, None] * (np.eye(DIMENSION) + 0.5 * rng.standard_normal((DIMENSION, DIMENSION)))


def between_root():
    """B with Sigma = B B^T of rank 2, in the same units."""
    return UNITS[:, None] * np.random.default_rng(9).standard_normal((DIMENSION, 2)) * np.array([0.8, 0.4])


def exact_covariances(n, covariance):
    """Prior and within covariance of populations that all have `covariance`."""
    moments = np.tile(covariance.diagonal(), (len(n), 1)), np.tile(covariance, (len(n), 1, 1))
    prior = fit_within_prior(np.maximum(n, 2), *moments, np.zeros(len(n), int), np.eye(len(covariance)))
    return prior, prior.shrink(n, *moments, np.zeros(len(n), int))


def simulated(n, conditions, rng, signal=1.0):
    """Observed means with common within covariance, batch effects of rank 2 and large condition effects."""
    R, B = within_root(), between_root() * signal
    effects = 20 * UNITS * rng.standard_normal((conditions.max() + 1, DIMENSION))
    noise = rng.standard_normal((len(n), DIMENSION)) @ R.T / np.sqrt(n)[:, None]
    return effects[conditions] + rng.standard_normal((len(n), 2)) @ B.T + noise


@pytest.fixture
def fitted():
    rng = np.random.default_rng(0)
    n, conditions = rng.integers(20, 300, 60).astype(float), np.arange(60) % 6
    mean = simulated(n, conditions, rng)
    prior, within = exact_covariances(n, within_root() @ within_root().T)
    return mean, within, prior, conditions, fit_coordinates(mean, within, prior, conditions)


def test_coordinates_are_orthonormal_in_the_noise_of_one_cell(fitted):
    mean, _, prior, _, coordinates = fitted
    C = prior.pooled().dense(0)
    identity = np.eye(coordinates.A.shape[1])
    np.testing.assert_allclose(coordinates.A.T @ C @ coordinates.A, identity, atol=1e-9)
    np.testing.assert_allclose(coordinates.back_map, C @ coordinates.A, rtol=1e-9)
    v = coordinates.project(mean)
    np.testing.assert_allclose(coordinates.project(coordinates.back(v)), v, atol=1e-9)
    np.testing.assert_allclose(coordinates.back(v) + coordinates.residual(mean), mean, atol=1e-9)
    np.testing.assert_allclose(coordinates.residual(mean) @ coordinates.A, 0, atol=1e-9)
    expected = (mean - coordinates.mean) @ (np.eye(DIMENSION) - coordinates.A @ coordinates.back_map.T)
    np.testing.assert_allclose(coordinates.residual(mean), expected, atol=1e-9)
    assert (np.diff(coordinates.spectrum) <= 0).all()


def test_the_two_directions_of_the_signal_are_found_and_no_others(fitted):
    *_, coordinates = fitted
    assert coordinates.A.shape == (DIMENSION, 2)
    # C A spans the between-batch covariance: C^{-1} Sigma has its range there.
    B, R = between_root(), within_root()
    span = np.linalg.qr(np.linalg.solve(R, B))[0]
    found = np.linalg.qr(np.linalg.solve(R, coordinates.back_map))[0]
    cosines = np.linalg.svd(span.T @ found, compute_uv=False)
    # Noise 1/n ~ 1/100 against signals of 0.3 and more over 54 degrees of freedom: a few degrees at most.
    assert cosines.min() > 0.98


def test_single_cells_do_not_drown_the_signal_of_large_populations():
    # Sixty populations of one cell beside sixty of 500: with equal weights their noise, 500 times larger, would
    # turn the weaker direction (signal 0.43 in units of one cell) by tens of degrees.
    R, B = within_root(), between_root()
    span = np.linalg.qr(np.linalg.solve(R, B))[0]
    cosines = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        n, conditions = np.repeat([1.0, 500.0], 60), np.arange(120) % 6
        prior, within = exact_covariances(n, R @ R.T)
        mean = simulated(n, conditions, rng)
        coordinates = fit_coordinates(mean, within, prior, conditions, max_coordinates=2)
        found = np.linalg.qr(np.linalg.solve(R, coordinates.back_map))[0]
        cosines.append(np.linalg.svd(span.T @ found, compute_uv=False).min())
    assert np.median(cosines) > 0.98


def test_pure_noise_keeps_next_to_nothing():
    kept = []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        n, conditions = rng.integers(5, 200, 40).astype(float), np.arange(40) % 4
        prior, within = exact_covariances(n, within_root() @ within_root().T)
        mean = simulated(n, conditions, rng, signal=0.0)
        coordinates = fit_coordinates(mean, within, prior, conditions)
        kept.append((coordinates.spectrum > coordinates.cut).sum())
    # The cut is the mean of the largest value under noise: exceeded by the first in half of the cases or less.
    assert np.mean(kept) < 1.0
    assert max(kept) <= 2


@pytest.mark.parametrize("batches", [2, 5])
def test_spectrum_is_unbiased_by_noise_and_by_few_batches(batches):
    # Many conditions, each seen in few batches of very unequal size: without the corrections for sampling noise
    # and for the estimated condition means the values are far off (half of them with two batches).
    rng = np.random.default_rng(1)
    conditions = np.repeat(np.arange(3_000), batches)
    n = rng.choice([2.0, 5.0, 60.0], len(conditions))
    C, B = within_root() @ within_root().T, between_root()
    prior, within = exact_covariances(n, C)
    coordinates = fit_coordinates(simulated(n, conditions, rng), within, prior, conditions)
    truth = np.linalg.eigvals(np.linalg.solve(C, B @ B.T)).real
    truth = np.sort(truth)[::-1][:2]
    # Relative sd of a variance from 3,000 (batches - 1) degrees of freedom or less, weights unequal: 5 %.
    np.testing.assert_allclose(coordinates.spectrum[:2], truth, rtol=0.2 / np.sqrt(batches - 1))
    # The bound is sharp enough to see what would be left of the noise of the mean population.
    assert 0.2 / np.sqrt(batches - 1) < np.mean(1 / n) / truth[1]


def test_differences_between_conditions_do_not_enter(fitted):
    mean, within, prior, conditions, coordinates = fitted
    shifts = 100 * np.random.default_rng(3).standard_normal((6, DIMENSION))
    moved = fit_coordinates(mean + shifts[conditions], within, prior, conditions)
    np.testing.assert_allclose(moved.A, coordinates.A, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(moved.spectrum, coordinates.spectrum, rtol=1e-6)


def test_a_condition_seen_once_contributes_nothing(fitted):
    mean, within, prior, conditions, coordinates = fitted
    n = np.append(within.n, np.median(within.n))
    _, more = exact_covariances(n, within_root() @ within_root().T)
    added = fit_coordinates(np.vstack([mean, 1e3 * UNITS]), more, prior, np.append(conditions, 6))
    np.testing.assert_allclose(added.A, coordinates.A, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match=r"60 .* seen in one population only"):
        fit_coordinates(mean, within, prior, np.arange(60))


def test_coordinates_depend_on_every_population_passed_in(fitted):
    # The leak that a split has to prevent: a batch with a direction of its own bends the coordinates towards it.
    mean, within, prior, conditions, _ = fitted
    held_out = np.arange(60) >= 54
    own = np.linalg.qr(between_root(), mode="complete")[0][:, -1] * UNITS * 3
    shifted = mean + np.where(held_out[:, None], own, 0.0)
    kept = within.select(~held_out)
    honest = fit_coordinates(shifted[~held_out], kept, prior, conditions[~held_out])
    leaking = fit_coordinates(shifted, within, prior, conditions)
    again = fit_coordinates(mean[~held_out], kept, prior, conditions[~held_out])
    np.testing.assert_array_equal(honest.A, again.A)
    assert leaking.A.shape[1] > honest.A.shape[1]
    left_out = np.linalg.norm(honest.residual(own + honest.mean) / UNITS)
    assert np.linalg.norm(leaking.residual(own + leaking.mean) / UNITS) < 0.5 * left_out


def non_gaussian_cells(root, num_cells, rng):
    """Skewed cells with covariance root root^T."""
    return (rng.exponential(size=(num_cells, DIMENSION)) - 1) @ root.T


def resampled_coordinates(cells, num_cells, count, coordinates, rng):
    """(count, Q) coordinates of means of `num_cells` cells drawn with replacement, around those of the population."""
    chosen = rng.integers(0, len(cells), (count, num_cells))
    center = coordinates.project(cells.mean(0))
    return np.stack([coordinates.project(cells[rows].mean(0)) for rows in chosen]) - center


def assert_covariance(v, expected, relative):
    """Covariance of the rows of v against `expected`: total chi-square and every entry, 4 standard errors + bias."""
    count, dimension = v.shape
    chi_square = np.einsum("rq,rq->r", v, np.linalg.solve(expected, v.T).T)
    se = chi_square.std(ddof=1) / np.sqrt(count)
    assert abs(chi_square.mean() - dimension) < 4 * se + relative * dimension
    root = np.linalg.inv(np.linalg.cholesky(expected))
    whitened = root @ np.cov(v.T) @ root.T
    assert np.abs(whitened - np.eye(dimension)).max() < 4.5 * np.sqrt(2 / count) + relative


def test_resampled_cells_have_the_noise_of_their_own_population():
    # Populations with covariances of their own: the noise is W_j / n, and I / n would be wrong.
    rng = np.random.default_rng(7)
    roots = [within_root() @ np.diag(rng.uniform(0.4, 2, DIMENSION)) for _ in range(30)]
    offsets = rng.standard_normal((30, 2)) @ between_root().T
    cells = [non_gaussian_cells(R, 4_000, rng) + o for R, o in zip(roots, offsets, strict=True)]
    n = np.full(30, 4_000.0)
    covariances = np.stack([np.cov(x.T) for x in cells])
    variances = np.stack([c.diagonal() for c in covariances])
    codes = np.zeros(30, int)
    prior = fit_within_prior(n, variances, covariances, codes, np.eye(DIMENSION))
    within = prior.shrink(n, variances, covariances, codes)
    coordinates = fit_coordinates(np.stack([x.mean(0) for x in cells]), within, prior, np.arange(30) % 3)
    W = within.project(coordinates.A)
    spectrum = coordinates.noise_spectrum(within)
    assert spectrum.max() > 1.5
    assert spectrum.min() < 0.6
    np.testing.assert_allclose(spectrum[4], np.sort(np.linalg.eigvalsh(W[4]))[::-1])
    for j in (0, 4, 11):
        v = resampled_coordinates(cells[j], 25, 4_000, coordinates, rng)
        # Shrinkage by prior_df / 4,000 towards the class is the only bias.
        assert_covariance(v, W[j] / 25, relative=3 * prior.population_df / 4_000)
    with pytest.raises(AssertionError):
        assert_covariance(
            resampled_coordinates(cells[4], 25, 4_000, coordinates, rng),
            np.eye(len(W[4])) / 25,
            relative=0.05,
        )


def test_resampled_cells_have_noise_one_over_n_under_a_common_covariance():
    rng = np.random.default_rng(8)
    offsets = rng.standard_normal((12, 2)) @ between_root().T
    cells = [non_gaussian_cells(within_root(), 4_000, rng) + o for o in offsets]
    n = np.full(12, 4_000.0)
    covariances = np.stack([np.cov(x.T) for x in cells])
    variances = np.stack([c.diagonal() for c in covariances])
    prior = fit_within_prior(n, variances, covariances, np.zeros(12, int), np.eye(DIMENSION))
    within = prior.shrink(n, variances, covariances, np.zeros(12, int))
    coordinates = fit_coordinates(np.stack([x.mean(0) for x in cells]), within, prior, np.arange(12) % 2)
    # W_j = I up to the error of a covariance from 4,000 exponential cells: sd of a variance sqrt(8/4000) = 4.5 %.
    assert np.abs(coordinates.noise_spectrum(within) - 1).max() < 4.5 * np.sqrt(8 / 4_000)
    for size in (10, 80):
        v = resampled_coordinates(cells[3], size, 4_000, coordinates, rng)
        assert_covariance(v, np.eye(v.shape[1]) / size, relative=4 * np.sqrt(8 / 4_000))


def test_mixtures_are_linear_and_the_order_of_cells_is_nothing(fitted):
    rng = np.random.default_rng(0)
    X = rng.gamma(1.0, size=(300, 4))
    phi = fit_feature_map(X, num_components=2, num_random=2)
    _, _, _, _, coordinates = fitted
    first, second = X[:120], X[120:]
    v = [coordinates.project(phi(x).mean(0)) for x in (first, second, X)]
    np.testing.assert_allclose(0.4 * v[0] + 0.6 * v[1], v[2], atol=1e-10)
    shuffled = coordinates.project(phi(rng.permutation(X)).mean(0))
    np.testing.assert_allclose(shuffled, v[2], atol=1e-10)
    assert np.abs(v[0] - v[1]).max() > 1e-3


def test_noise_spectrum_is_one_where_populations_have_the_pooled_covariance(fitted):
    _, within, _, _, coordinates = fitted
    np.testing.assert_allclose(coordinates.noise_spectrum(within), 1.0, rtol=1e-6)


def test_functionals_are_exact_plus_the_residual(fitted):
    mean, _, _, _, coordinates = fitted
    w = np.random.default_rng(2).standard_normal((DIMENSION, 3))
    functional = coordinates.functional(w)
    v = coordinates.project(mean)
    approximation = functional.intercept + v @ functional.coefficients
    np.testing.assert_allclose(approximation + coordinates.residual(mean) @ w, mean @ w, atol=1e-9)
    single = coordinates.functional(w[:, 1])
    np.testing.assert_allclose(single.error, functional.error[1])
    genes = coordinates.functional(np.eye(DIMENSION))
    np.testing.assert_allclose(genes.intercept + v @ genes.coefficients, coordinates.back(v), atol=1e-9)
    assert coordinates.functional(coordinates.A[:, 0]).error < 1e-6


def test_reported_error_is_that_of_the_training_populations_without_noise():
    # Practically infinite populations, one coordinate kept of two: the error is an empirical sd, exactly.
    rng = np.random.default_rng(3)
    conditions = np.arange(40) % 4
    n = np.full(40, 1e12)
    prior, within = exact_covariances(n, within_root() @ within_root().T)
    mean = simulated(n, conditions, rng)
    coordinates = fit_coordinates(mean, within, prior, conditions, max_coordinates=1)
    w = rng.standard_normal((DIMENSION, 5)) / UNITS[:, None]
    left_out = coordinates.residual(mean) @ w
    centred = left_out - np.stack([left_out[conditions == c].mean(0) for c in range(4)])[conditions]
    truth = np.sqrt((centred**2).sum(0) / 36)
    assert (truth > 1e-2).all()
    np.testing.assert_allclose(coordinates.functional(w).error, truth, rtol=1e-6)


def test_reported_error_is_that_of_the_truth_with_noise():
    # Small populations: the noise of the left-out part is larger than the part itself and must not be reported.
    rng = np.random.default_rng(4)
    conditions = np.repeat(np.arange(2_500), 4)
    n = rng.choice([4.0, 30.0], len(conditions))
    prior, within = exact_covariances(n, within_root() @ within_root().T)
    mean = simulated(n, conditions, rng)
    coordinates = fit_coordinates(mean, within, prior, conditions, max_coordinates=1)
    w = rng.standard_normal((DIMENSION, 4)) / UNITS[:, None]
    left_out = w - coordinates.A @ (coordinates.back_map.T @ w)
    truth = (left_out.T @ between_root()) ** 2
    variance = coordinates.functional(w).error ** 2
    noise = np.mean(1 / n) * np.square(left_out.T @ within_root()).sum(1)
    # Variance of signal plus noise from 7,500 degrees of freedom, unequal weights: sd below 2.5 %.
    assert (np.abs(variance - truth.sum(1)) < 0.1 * (truth.sum(1) + noise)).all()
    assert (truth.sum(1) > 0.3 * noise).any()


def test_many_features_give_the_same_answer_by_either_eigensolver(monkeypatch):
    # Low-rank within covariances, more features than populations: Lanczos against the dense matrix.
    rng = np.random.default_rng(5)
    num_features, rank = EXACT_FEATURES + 60, 3
    loadings = rng.standard_normal((num_features, rank))
    n = rng.integers(10, 100, 30).astype(float)
    unique = rng.uniform(0.5, 2, num_features)
    covariance = loadings @ loadings.T + np.diag(unique)
    scores = loadings / covariance.diagonal()[:, None]
    moments = (
        np.tile(covariance.diagonal(), (30, 1)),
        np.tile(scores.T @ covariance @ scores, (30, 1, 1)),
    )
    codes = np.zeros(30, int)
    prior = fit_within_prior(n, *moments, codes, scores)
    within = prior.shrink(n, *moments, codes)
    mean = rng.standard_normal((30, 4)) @ rng.standard_normal((4, num_features))
    noise = rng.standard_normal((30, rank)) @ loadings.T + np.sqrt(unique) * rng.standard_normal(
        (30, num_features)
    )
    mean += noise / np.sqrt(n)[:, None]
    dense = fit_coordinates(mean, within, prior, np.arange(30) % 2, max_coordinates=8)
    C = prior.pooled().dense(0)
    np.testing.assert_allclose(dense.A.T @ C @ dense.A, np.eye(dense.A.shape[1]), atol=1e-8)
    assert 3 <= dense.A.shape[1] <= 5
    # All four directions of the signal are kept: features have no error beyond the scatter, of relative sd
    # sqrt(2/28), of their noise variance; without the correction for noise they would report all of it.
    error = dense.functional(np.eye(num_features)).error
    assert (error**2).mean() < 0.3 * (unique.mean() / np.median(n))
    monkeypatch.setattr(embedding, "DENSE_FEATURES", 10)
    lanczos = fit_coordinates(mean, within, prior, np.arange(30) % 2, max_coordinates=8)
    np.testing.assert_allclose(lanczos.A, dense.A, atol=1e-7 * np.abs(dense.A).max())
    np.testing.assert_allclose(lanczos.spectrum, dense.spectrum, rtol=1e-8)


def test_twenty_cells_of_a_sparse_gene_are_not_gaussian_yet():
    # The number in the docstring of `embedding`: the limits of the central limit theorem, on record.
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.1, (40_000, 20))
    means = np.log1p(1e4 * counts / 2_000).mean(1)
    standardised = (means - means.mean()) / means.std()
    skewness = (standardised**3).mean()
    assert skewness == pytest.approx(
        0.63, abs=0.07
    )  # 4 sd of a skewness from 40,000 draws, with room for its tails
    assert (means == 0).mean() == pytest.approx(
        np.exp(-2), abs=0.01
    )  # a seventh of such populations show nothing


@pytest.mark.parametrize(
    ("name", "scale"), [("bodenmiller_bcrxl_cytof", "other"), ("kang_ifnb_wide", "counts")]
)
def test_real_cells_split_at_random_show_no_signal(data_dir, name, scale):
    # Pseudo-batches of one population differ by sampling only, whatever the distribution of the cells: the noise law,
    # estimated from moments as in a fit, must account for all of it. The first coordinates are the hardest test:
    # they are chosen for what it does not account for.
    cells = read_h5ad(data_dir / f"{name}.h5ad")
    X = cells.X.toarray().astype(float) if scale == "counts" else np.asarray(cells.X, float)
    if scale == "counts":
        X = np.log1p(1e4 * X / X.sum(1, keepdims=True))
    keys = cells.obs[["cell_type", "perturbation", "donor"]].astype(str)
    population = keys.groupby(list(keys)).ngroup().to_numpy()
    large = np.bincount(population)[population] >= 30
    X, population = X[large], population[large]
    batch = np.random.default_rng(0).choice(3, len(X), p=[0.2, 0.3, 0.5])
    (pairs, codes) = np.unique(3 * population + batch, return_inverse=True)
    condition = pairs // 3
    kind = keys[large].groupby(["cell_type", "perturbation"]).ngroup().to_numpy()
    classes = kind[np.unique(codes, return_index=True)[1]]
    phi = fit_feature_map(X)(X)
    scores, center = fit_loadings(phi, codes)
    members = [phi[codes == j] for j in range(len(pairs))]
    n = np.array([len(x) for x in members], float)
    variance = np.stack([x.var(0, ddof=1) for x in members])
    factor = np.stack([np.cov(((x - center) @ scores).T) for x in members])
    prior = fit_within_prior(n, variance, factor, classes, scores)
    within = prior.shrink(n, variance, factor, classes)
    mean = np.stack([x.mean(0) for x in members])
    coordinates = fit_coordinates(mean, within, prior, condition)
    assert (coordinates.spectrum > coordinates.cut).sum() <= 2
    # 10-30 % is what 32 factors leave of the noise of single coordinates (see EXACT_FEATURES).
    assert coordinates.spectrum[0] < 1.2 * coordinates.cut


def test_round_trip_through_safetensors(fitted, tmp_path):
    mean, _, _, _, coordinates = fitted
    save_file(coordinates.to_arrays(), tmp_path / "coordinates.safetensors")
    again = Coordinates.from_arrays(load_file(tmp_path / "coordinates.safetensors"))
    np.testing.assert_array_equal(again.project(mean), coordinates.project(mean))
    np.testing.assert_array_equal(
        again.functional(np.eye(DIMENSION)).error, coordinates.functional(np.eye(DIMENSION)).error
    )
