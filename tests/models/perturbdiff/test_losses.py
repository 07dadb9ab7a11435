"""The energy term against its definition, in blocks, and in float32 far from the origin."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist

from hilbertcell.models import perturbdiff

RNG = np.random.default_rng(0)
X = RNG.normal(0.0, 1.0, (2, 9, 4))
Y = RNG.normal(0.3, 1.5, (2, 7, 4))


def reference(x, y):
    def mean_distance(a, b):
        return np.maximum(cdist(a, b), 1e-4).mean()

    return mean_distance(x, y) - 0.5 * mean_distance(x, x) - 0.5 * mean_distance(y, y)


@pytest.mark.parametrize("block_size", [1, 4, 9, 512])
def test_energy_is_its_definition_whatever_the_blocks(block_size):
    with jax.enable_x64(True):
        energy = perturbdiff.energy_loss(jnp.asarray(X), jnp.asarray(Y), block_size=block_size)
    np.testing.assert_allclose(energy, [reference(x, y) for x, y in zip(X, Y, strict=True)], rtol=1e-12)


@pytest.mark.parametrize("block_size", [2, 512])
def test_gradient_is_that_of_the_definition(block_size):
    direction = RNG.normal(size=Y.shape)
    with jax.enable_x64(True):
        gradient = jax.grad(
            lambda y: perturbdiff.energy_loss(jnp.asarray(X), y, block_size=block_size).sum()
        )(jnp.asarray(Y))

    def at(step):
        return sum(reference(x, y) for x, y in zip(X, Y + step * direction, strict=True))

    np.testing.assert_allclose(
        np.sum(np.asarray(gradient) * direction), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-7
    )


def test_gradient_of_coinciding_cells_is_finite():
    y = jnp.asarray(np.repeat(Y[:, :1], 3, axis=1), jnp.float32)
    gradient = jax.grad(lambda y: perturbdiff.energy_loss(y, y).sum())(y)
    np.testing.assert_array_equal(gradient, np.zeros_like(gradient))


def test_float32_keeps_its_digits_far_from_the_origin():
    x, y = X.astype(np.float32) + 1000, Y.astype(np.float32) + 1000  # 1000 +- 1 leaves 14 bits
    expected = [reference(a.astype(float), b.astype(float)) for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(perturbdiff.energy_loss(x, y), expected, rtol=1e-4)


def test_two_samples_of_one_law_differ_by_the_mean_distance_over_their_size():
    """The V-statistic's bias, named in the model page."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 400, 64, 10)).astype(np.float32)
    energy = np.asarray(perturbdiff.energy_loss(x, y))
    expected = np.mean([cdist(a, b).mean() for a, b in zip(x, y, strict=True)]) / 64
    assert abs(energy.mean() - expected) < 4 * energy.std() / np.sqrt(len(energy))


def test_squared_error_pairs_cells():
    x = np.zeros((1, 2, 3), np.float32)
    y = np.array([[[1.0, 0, 0], [0, 2.0, 0]]], np.float32)
    np.testing.assert_allclose(perturbdiff.squared_error(x, y), [5 / 6], rtol=1e-6)


def test_sets_that_cannot_be_compared():
    with pytest.raises(
        ValueError, match=r"compares \(B, N, G\) with \(B, M, G\); given \(2, 9, 4\) and \(1, 7, 4\)"
    ):
        perturbdiff.energy_loss(X, Y[:1])
