"""Feature map: exact gene block, random features that converge to their kernel, independence of row order."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from scipy import sparse

from hilbertcell.models.feature_maps import (
    MAX_DEVIATION,
    FeatureMap,
    fit_feature_map,
    leading_directions,
    median_distance,
    squared_distances,
)


def correlated_cells(num_cells=600, num_genes=8, seed=1):
    """Cells with two factors; genes of very different units and offsets."""
    rng = np.random.default_rng(seed)
    factors = rng.standard_normal((num_cells, 2)) @ rng.standard_normal((2, num_genes))
    return (factors + rng.standard_normal((num_cells, num_genes))) * np.logspace(-2, 2, num_genes) + 100


def random_block(feature_map, X):
    return feature_map(X)[:, feature_map.num_genes :]


def test_the_gene_block_is_the_cells_themselves():
    X = correlated_cells()
    feature_map = fit_feature_map(X, num_components=4, num_random=6)
    phi = feature_map(X)
    assert phi.dtype == np.float64
    assert phi.shape == (600, 14) == (600, feature_map.num_features)
    np.testing.assert_array_equal(phi[:, :8], X)
    assert list(feature_map.names(np.array(list("abcdefgh"))))[6:10] == ["g", "h", "random_0", "random_1"]


def test_components_are_standardised_and_uncorrelated_in_the_pilot():
    X = correlated_cells()
    components = fit_feature_map(X, num_components=5, num_random=3).components(X)
    np.testing.assert_allclose(np.cov(components.T, bias=True), np.eye(5), atol=1e-9)


def test_units_of_genes_do_not_change_the_random_features():
    X = correlated_cells()
    other = fit_feature_map(X * np.arange(1, 9) - 3)
    expected = random_block(fit_feature_map(X), X)
    np.testing.assert_allclose(random_block(other, X * np.arange(1, 9) - 3), expected, atol=1e-8)


def test_random_features_approximate_their_kernels_at_the_monte_carlo_rate():
    # For one frequency and phase, 2 cos a cos b = cos(a - b) + cos(a + b) has mean k(d) and
    # second moment 1 + k(2 d) / 2 (d the difference of the components); R of them are independent.
    X = correlated_cells()
    x, y = X[:25], X[25:50]
    sizes, num_maps = np.array([96, 384, 1536]), 30
    ratios = []
    for size in sizes:
        errors = []
        for seed in range(num_maps):
            feature_map = fit_feature_map(X, num_components=3, num_random=int(size), seed=seed)
            squared = squared_distances(feature_map.components(x), feature_map.components(y)).diagonal()
            k, k2, variance = [], [], []
            for h in np.unique(feature_map.bandwidths):
                k.append(np.exp(-squared / (2 * h**2)))
                k2.append(np.exp(-4 * squared / (2 * h**2)))
                variance.append(1 + k2[-1] / 2 - k[-1] ** 2)
            estimate = (random_block(feature_map, x) * random_block(feature_map, y)).sum(1)
            errors.append((estimate - np.mean(k, 0)) ** 2 / (np.mean(variance, 0) / size))
        ratios.append(np.mean(errors))
        # Pairs share frequencies: count maps, not pairs, as independent; the mean of a chi-square / 1.
        standard_error = np.std(np.mean(errors, 1), ddof=1) / np.sqrt(num_maps)
        assert abs(ratios[-1] - 1) < 4 * standard_error
        assert standard_error < 0.15
    slope = np.polyfit(np.log(sizes), np.log(np.sqrt(ratios / sizes)), 1)[0]
    assert abs(slope + 0.5) < 0.06  # 4 x the standard error of three points a factor 4 apart


def test_kernel_is_the_weighted_inner_product_of_features():
    X = correlated_cells()
    feature_map = fit_feature_map(X, num_components=3, num_random=6_000)
    phi = feature_map(X[:20])
    exact = feature_map.kernel(X[:20], X[:20])
    approximate = (phi * feature_map.weights) @ phi.T
    # 400 pairs, each of sd <= sqrt(1.5 / 6000) times the weight of the random block.
    assert np.abs(exact - approximate).max() < 4.5 * np.sqrt(1.5 / 6_000) * feature_map.weights[-1]
    assert np.ptp(exact) > 0.5  # the agreement is not that of two constants


def test_blocks_weigh_the_same_in_the_pilot():
    X = correlated_cells()
    feature_map = fit_feature_map(X)
    contributions = feature_map.weights * feature_map(X).var(0)
    np.testing.assert_allclose([contributions[:8].sum(), contributions[8:].sum()], 1.0, rtol=1e-9)


def test_row_order_does_not_matter_and_the_seed_does():
    X = correlated_cells(num_cells=2_500)
    shuffled = np.random.default_rng(3).permutation(X)
    phi = random_block(fit_feature_map(X), X[:9])
    np.testing.assert_allclose(random_block(fit_feature_map(shuffled), X[:9]), phi, atol=1e-8)
    np.testing.assert_array_equal(random_block(fit_feature_map(X), X[:9]), phi)
    assert np.abs(random_block(fit_feature_map(X, seed=1), X[:9]) - phi).max() > 0.01


def test_median_heuristic_uses_the_median_of_all_pairs():
    components = np.random.default_rng(0).standard_normal((3_000, 4))
    pairs = np.sqrt(squared_distances(components, components)[np.triu_indices(3_000, 1)])
    # A U-statistic of the 1,000 stratified cells: its relative sd is about 1 %.
    assert median_distance(components) == pytest.approx(np.median(pairs), rel=0.03)
    assert median_distance(np.array([[0.0], [0.0], [0.0], [4.0]])) > 0  # half of the pairs are equal cells


def test_leading_directions_are_those_of_an_exact_decomposition():
    X = correlated_cells(300, 60) / np.logspace(-2, 2, 60)
    X = X - X.mean(0)
    directions, singular = leading_directions(X, 2, np.random.default_rng(0))
    _, exact, rotation = np.linalg.svd(X, full_matrices=False)
    np.testing.assert_allclose(singular, exact[:2], rtol=1e-8)
    np.testing.assert_allclose(np.abs(rotation[:2] @ directions), np.eye(2), atol=1e-6)


def test_rank_deficient_pilot_gives_fewer_components():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((50, 2)) @ rng.standard_normal((2, 6))
    X = np.column_stack([X, np.full(50, 3.0)])
    feature_map = fit_feature_map(X, num_components=5)
    assert feature_map.directions.shape == (7, 2)
    assert feature_map.weights[6] == 0  # the constant gene
    assert np.isfinite(feature_map(X)).all()


def test_a_gene_seen_in_one_cell_is_clipped():
    X = correlated_cells()
    feature_map = fit_feature_map(X, num_components=4)
    moved = X[:1].copy()
    moved[0, 0] += 1e6
    limit = X[:1].copy()
    limit[0, 0] = feature_map.center[0] + MAX_DEVIATION * feature_map.scale[0]
    np.testing.assert_allclose(feature_map.components(moved), feature_map.components(limit), atol=1e-9)


@pytest.mark.parametrize("what", ["counts", "clipped", "negative", "zero is clipped", "empty"])
def test_compressed_rows_give_the_features_of_dense_ones(what):
    rng = np.random.default_rng(5)
    X = np.log1p(rng.poisson(0.3, (300, 12)) * rng.uniform(1, 9, (300, 1)))
    feature_map = fit_feature_map(X, num_components=4, num_random=6)
    if what == "clipped":
        X[:9, 3] += 1e3
    elif what == "negative":
        X[X > 0] *= -1e3
    elif what == "zero is clipped":
        feature_map = replace(feature_map, center=feature_map.center + np.where(np.arange(12) == 2, 99, 0))
    elif what == "empty":
        X = np.zeros_like(X)
    expected = feature_map(X)
    for rows in (sparse.csr_array(X), sparse.csc_array(X), sparse.csr_matrix(X).astype(np.float64)):
        assert isinstance(feature_map(rows), np.ndarray)
        np.testing.assert_allclose(feature_map(rows), expected, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(
            feature_map.random_features(rows), expected[:, 12:], rtol=1e-11, atol=1e-12
        )
    with pytest.raises(ValueError, match=r"fitted on 12 genes .* shape \(300, 11\)"):
        feature_map(sparse.csr_array(X[:, 1:]))


def test_random_features_are_the_cosines_they_say():
    X = correlated_cells()
    feature_map = fit_feature_map(X, num_components=4, num_random=50)
    angles = feature_map.components(X) @ feature_map.frequencies + feature_map.phase
    np.testing.assert_allclose(random_block(feature_map, X), np.sqrt(2 / 50) * np.cos(angles), atol=1e-15)
    assert np.abs(angles).max() > 2 * np.pi


def test_round_trip_through_safetensors(tmp_path):
    X = correlated_cells()
    feature_map = fit_feature_map(X)
    save_file(feature_map.to_arrays(), tmp_path / "map.safetensors")
    again = FeatureMap.from_arrays(load_file(tmp_path / "map.safetensors"))
    np.testing.assert_array_equal(again(X), feature_map(X))


def test_wrong_shapes_are_named():
    X = correlated_cells()
    feature_map = fit_feature_map(X)
    with pytest.raises(ValueError, match=r"fitted on 8 genes .* shape \(600, 7\)"):
        feature_map(X[:, :7])
    with pytest.raises(ValueError, match="at least two training cells"):
        fit_feature_map(X[:1])
    with pytest.raises(ValueError, match="every gene is constant"):
        fit_feature_map(np.ones((5, 3)))


def test_no_random_features_leave_the_genes_alone():
    pilot = np.random.default_rng(0).standard_normal((30, 4))
    alone = fit_feature_map(pilot, num_components=2, num_random=0)
    np.testing.assert_array_equal(alone(pilot), pilot)
    assert alone.weights.shape == (4,)
