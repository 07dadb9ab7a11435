"""Streaming moments against NumPy on the whole matrix, for any blocks and any order of the cells."""

import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.moments import Moments, stream_moments

FIELDS = ("n", "mean", "variance", "factor_covariance", "log_library")


def features(x):
    """Genes, two waves, and a constant far from zero whose variance must come out as zero."""
    return np.concatenate([x, np.cos(x[:, :2]), np.full((len(x), 1), 100.0)], axis=1)


LOADINGS = np.random.default_rng(1).normal(size=(10, 3))
CENTER = np.random.default_rng(2).normal(size=10)


def directly(populations):
    """The moments of each population from its own cells, read whole."""
    result = {name: [] for name in FIELDS}
    for j in range(len(populations.labels)):
        cells = np.flatnonzero(populations.cell_population == j)
        one = populations.select(np.arange(len(populations.labels)) == j)
        phi = features(np.concatenate([x for _, x in one.chunks(10_000)]))
        z = (phi - CENTER) @ LOADINGS
        unknown = len(phi) == 1
        result["n"].append(len(phi))
        result["mean"].append(phi.mean(axis=0))
        result["variance"].append(np.full(10, np.nan) if unknown else phi.var(axis=0, ddof=1))
        result["factor_covariance"].append(np.full((3, 3), np.nan) if unknown else np.cov(z.T))
        result["log_library"].append(np.log(populations.library_size[cells]).mean())
    return {name: np.array(values) for name, values in result.items()}


def one_lonely_cell(adata):
    """Leave population 'B | TNF | d0' one cell."""
    obs = adata.obs
    rows = np.flatnonzero((obs["cell_type"] == "B") & (obs["treatment"] == "TNF") & (obs["donor"] == "d0"))
    return adata[np.setdiff1d(np.arange(len(adata)), rows[1:])].copy()


@pytest.fixture
def adata(make_screen):
    return one_lonely_cell(make_screen())


@pytest.mark.parametrize("chunk_size", [1, 7, 64, 10_000])
def test_moments_equal_numpy(chunk_size, adata, read):
    populations = read(adata)
    moments = stream_moments(populations, features, LOADINGS, CENTER, chunk_size=chunk_size)
    for name, expected in directly(populations).items():
        np.testing.assert_allclose(getattr(moments, name), expected, rtol=1e-10, atol=1e-10, err_msg=name)
    pd.testing.assert_frame_equal(moments.labels, populations.labels)
    lonely = moments.labels.index.get_loc("B | TNF | d0")
    assert np.isnan(moments.variance[lonely]).all()
    assert np.isnan(moments.variance).sum() == 10


def test_moments_do_not_depend_on_the_order_of_rows(adata, read):
    whole = stream_moments(read(adata), features, LOADINGS, CENTER)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(len(adata))
        shuffled = stream_moments(read(adata[order].copy()), features, LOADINGS, CENTER, chunk_size=29)
        pd.testing.assert_frame_equal(shuffled.labels, whole.labels)
        for name in FIELDS:
            got, expected = getattr(shuffled, name), getattr(whole, name)
            np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-10, err_msg=name)


def test_a_large_mean_costs_no_precision(adata, read):
    """Sums of squares would lose everything: mean 1e8, standard deviation about 1."""
    populations = read(adata)
    shifted = stream_moments(populations, lambda x: x + 1e8, np.eye(7)[:, :2], np.zeros(7), chunk_size=11)
    plain = stream_moments(populations, lambda x: x, np.eye(7)[:, :2], np.zeros(7))
    np.testing.assert_allclose(shifted.variance, plain.variance, rtol=1e-6)
    np.testing.assert_allclose(shifted.factor_covariance, plain.factor_covariance, rtol=1e-6, atol=1e-6)


def test_factor_covariance_is_that_of_the_scores(adata, read):
    """With unit vectors as loadings its diagonal is the variance of these features."""
    moments = stream_moments(read(adata), features, np.eye(10)[:, [4, 1]], CENTER)
    diagonal = np.einsum("pll->pl", moments.factor_covariance)
    np.testing.assert_allclose(diagonal, moments.variance[:, [4, 1]], rtol=1e-10)


def test_selected_populations_have_the_same_moments(adata, read):
    populations = read(adata)
    mask = (populations.labels["context"] == "T").to_numpy()
    some = stream_moments(populations.select(mask), features, LOADINGS, CENTER)
    whole = stream_moments(populations, features, LOADINGS, CENTER).select(mask)
    pd.testing.assert_frame_equal(some.labels, whole.labels)
    for name in FIELDS:
        np.testing.assert_allclose(getattr(some, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_storage_round_trip(adata, read):
    moments = stream_moments(read(adata, dose="dose"), features, LOADINGS, CENTER)
    arrays = moments.to_arrays()
    assert all(array.dtype in (np.float64, np.uint8) for array in arrays.values())
    again = Moments.from_arrays(arrays)
    pd.testing.assert_frame_equal(again.labels, moments.labels)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(again, name), getattr(moments, name))


def test_library_sizes_only_for_counts(adata, read):
    adata.X = adata.X * np.float32(0.37)
    moments = stream_moments(read(adata, scale="other"), features, LOADINGS, CENTER)
    assert np.isnan(moments.log_library).all()


def test_shapes_that_do_not_agree_are_named(adata, read):
    populations = read(adata)
    with pytest.raises(ValueError, match=r"loadings must be \(10, L\)"):
        stream_moments(populations, features, LOADINGS[:9], CENTER)
    with pytest.raises(ValueError, match=r"feature_map must return \(\d+, 10\) .* got \(\d+, 7\)"):
        stream_moments(populations, lambda x: x, LOADINGS, CENTER)
