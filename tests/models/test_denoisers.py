"""Denoisers: the score, the residual form, its gate, guidance; each against a closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from hilbertcell.inference.samplers import Sampler, Split, asinh_grid
from hilbertcell.models.denoisers import (
    Condition,
    GuidedDenoiser,
    ResidualDenoiser,
    angle,
    colour,
    gaussian_denoiser,
    init_network,
    posterior_sd,
    residual,
    whiten,
    without_features,
)
from hilbertcell.models.forward_processes import HeavyTailed, process_of
from tests.mixture_law import bimodal

D, F = 3, 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(seed: int = 0, values: tuple[float, ...] = (2.0, 0.3, 0.01)) -> Condition:
    rng = np.random.default_rng(seed)
    vectors = np.linalg.qr(rng.standard_normal((D, D)))[0]
    leaves = (100.0 + rng.standard_normal(D), vectors, np.array(values), rng.standard_normal(F))
    return Condition(*map(jnp.asarray, leaves))


def covariance(condition: Condition) -> jnp.ndarray:
    return (condition.vectors * condition.values) @ condition.vectors.T


def trained(seed: int = 0, sigma_min: float = 0.05, dtype=jnp.float32) -> ResidualDenoiser:
    """A network that is not zero, as if it had been trained."""
    network = init_network(jax.random.key(seed), D, F, width=16, depth=2)
    leaves, tree = jax.tree.flatten(network)
    rng = np.random.default_rng(seed)
    moved = [leaf + 0.3 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves]
    return ResidualDenoiser(jax.tree.unflatten(tree, moved), jnp.asarray(sigma_min, dtype))


@pytest.mark.parametrize("sigma", [1e-3, 0.4, 30.0])
def test_the_gaussian_denoiser_is_tweedies_formula(sigma):
    condition = make()
    v = condition.mean + jnp.array([1.0, -2.0, 0.5])
    score = jax.grad(
        lambda v: multivariate_normal.logpdf(v, condition.mean, covariance(condition) + sigma**2 * jnp.eye(D))
    )
    np.testing.assert_allclose(gaussian_denoiser(v, sigma, condition), v + sigma**2 * score(v), rtol=1e-12)


def test_the_gaussian_denoiser_allows_no_variance_and_no_noise():
    condition = make(values=(2.0, 0.0, 0.0))
    v = condition.mean + condition.vectors @ jnp.array([1.0, 1.0, 1.0])
    kept = condition.vectors.T @ (gaussian_denoiser(v, jnp.asarray(1.0), condition) - condition.mean)
    np.testing.assert_allclose(kept, [2.0 / 3.0, 0.0, 0.0], atol=1e-12)
    np.testing.assert_allclose(gaussian_denoiser(v, jnp.asarray(0.0), condition), v, rtol=1e-12)


@pytest.mark.parametrize("sigma", [1e-3, 0.4, 30.0])
def test_the_mixture_of_the_tests_is_tweedies_formula(sigma):
    law = bimodal()
    v = jnp.array([0.3, -0.2])
    score = jax.grad(law.log_density)(v, sigma)
    np.testing.assert_allclose(law(v, sigma, law.condition()), v + sigma**2 * score, rtol=1e-9)


@pytest.mark.parametrize("values", [(2.0, 0.3, 0.01), (2.0, 0.0, 0.01)])
def test_whitened_points_come_back(values):
    condition = make(values=values)
    z = jnp.array([0.3, -1.0, 2.0])
    for sigma in (0.2, 20.0):
        np.testing.assert_allclose(whiten(colour(z, sigma, condition), sigma, condition), z, atol=1e-10)
    expected = jnp.where(jnp.array(values) > 0, z, 0.0)
    np.testing.assert_allclose(whiten(colour(z, 0.0, condition), 0.0, condition), expected, atol=1e-10)


@pytest.mark.parametrize("sigma", [0.02, 0.3, 5.0])
def test_the_flow_in_whitened_points_is_driven_by_the_residual(sigma):
    """Equation (2), by the chain rule along dv/dsigma = (v - D)/sigma."""
    law = bimodal()
    condition = law.condition(inflate=1.7)  # the program need not have the right width
    v, sigma = jnp.array([0.4, -0.1]), jnp.asarray(sigma)
    slope = (v - law(v, sigma, condition)) / sigma
    _, dz = jax.jvp(lambda v, s: whiten(v, s, condition), (v, sigma), (slope, jnp.ones(())))
    _, dtheta = jax.jvp(lambda s: angle(condition.values, s), (sigma,), (jnp.ones(()),))
    np.testing.assert_allclose(
        dz, -residual(law(v, sigma, condition), v, sigma, condition) * dtheta, rtol=1e-9
    )


def test_a_new_network_adds_nothing():
    denoiser = ResidualDenoiser(init_network(jax.random.key(0), D, F, width=8, depth=1), jnp.asarray(0.01))
    condition = make()
    v = condition.mean + 1.0
    for sigma in (0.0, 0.005, 0.3, 50.0):
        level = jnp.asarray(sigma)
        np.testing.assert_array_equal(denoiser(v, level, condition), gaussian_denoiser(v, level, condition))


def test_the_residual_is_the_gated_network_in_units_of_the_posterior_sd():
    denoiser, condition, sigma = trained(), make(), jnp.asarray(0.4)
    v = condition.mean + jnp.array([0.3, 1.0, -0.2])
    whitened = condition.vectors @ whiten(v, sigma, condition)
    relative = jnp.log(sigma) - 0.5 * jnp.log(condition.values.mean())
    low = (x.astype(jnp.float32) for x in (whitened, relative, condition.features))
    f = condition.vectors.T @ denoiser.network(*low)
    assert np.abs(f).min() > 1e-3
    np.testing.assert_allclose(residual(denoiser(v, sigma, condition), v, sigma, condition), f, atol=1e-10)
    added = condition.vectors.T @ (denoiser(v, sigma, condition) - gaussian_denoiser(v, sigma, condition))
    np.testing.assert_allclose(added, posterior_sd(condition.values, sigma) * f, atol=1e-12)


def test_a_network_of_fewer_coordinates_leaves_the_others_to_the_program():
    full, condition, sigma = trained(), make(), jnp.asarray(0.4)
    network = full.network
    leading = eqx.tree_at(
        lambda n: (n.entry.weight, n.exit.weight, n.exit.bias),
        network,
        (network.entry.weight[:, :2], network.exit.weight[:2], network.exit.bias[:2]),
    )
    silent = eqx.tree_at(
        lambda n: (n.entry.weight, n.exit.weight, n.exit.bias),
        network,
        (
            network.entry.weight.at[:, 2:].set(0.0),
            network.exit.weight.at[2:].set(0.0),
            network.exit.bias.at[2:].set(0.0),
        ),
    )
    v = condition.mean + jnp.array([0.3, 1.0, -0.2])
    own = ResidualDenoiser(leading, full.sigma_min)(v, sigma, condition)
    np.testing.assert_allclose(own, ResidualDenoiser(silent, full.sigma_min)(v, sigma, condition), rtol=1e-6)
    assert np.abs(own - full(v, sigma, condition)).max() > 1e-3


def test_below_sigma_min_the_program_alone_speaks_and_the_gate_opens_smoothly():
    denoiser, condition = trained(sigma_min=0.05), make()
    v = condition.mean + 0.1
    for sigma in (0.0, 0.01, 0.05):
        level = jnp.asarray(sigma)
        np.testing.assert_array_equal(denoiser(v, level, condition), gaussian_denoiser(v, level, condition))
    assert float(denoiser.gate(jnp.asarray(0.11))) == 1.0
    assert float(denoiser.gate(jnp.asarray(0.05 * 2**0.5))) == pytest.approx(0.5)
    for end in (0.05, 0.1):  # no kink at either end
        slopes = [float(jax.grad(denoiser.gate)(jnp.asarray(end * (1 + e)))) for e in (-1e-6, 1e-6)]
        assert np.abs(slopes).max() < 1e-3


def test_the_denoiser_does_not_depend_on_signs_and_order_of_eigenvectors():
    denoiser, condition = trained(), make()
    order = jnp.array([2, 0, 1])
    other = condition._replace(
        vectors=condition.vectors[:, order] * jnp.array([1.0, -1.0, -1.0]), values=condition.values[order]
    )
    v, sigma = condition.mean + 0.2, jnp.asarray(0.3)
    np.testing.assert_allclose(denoiser(v, sigma, other), denoiser(v, sigma, condition), rtol=1e-6)


def test_where_the_program_has_no_variance_the_network_says_nothing_and_gradients_are_finite():
    denoiser, condition = trained(), make(values=(2.0, 0.0, 0.0))
    v, sigma = condition.mean + 0.2, jnp.asarray(0.3)
    added = condition.vectors.T @ (denoiser(v, sigma, condition) - gaussian_denoiser(v, sigma, condition))
    assert np.abs(added[0]) > 1e-3
    np.testing.assert_allclose(added[1:], 0.0, atol=1e-12)
    for sd in (jnp.array([1.0, 0.0, 0.0]), jnp.zeros(3)):
        gradient = jax.grad(
            lambda sd, sigma=sigma: denoiser(v, sigma, condition._replace(values=sd**2)).sum()
        )(sd)
        assert np.isfinite(gradient).all()


def test_the_type_of_the_points_is_kept():
    for dtype in (jnp.float32, jnp.float64):
        condition = jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), make())
        out = trained()(condition.mean, jnp.asarray(0.3, dtype), condition)
        assert out.dtype == dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(trained())} == {jnp.dtype(jnp.float32)}


def shifted(condition: Condition) -> Condition:
    return condition._replace(mean=condition.mean - 0.2)


def test_guidance_moves_a_gaussian_law_away_from_the_null_and_keeps_its_width():
    """G is linear in the mean, so that the guided denoiser is that of N(m + w (m - m_null), S)."""
    condition = make(values=(2.0, 0.3, 0.1))
    guided = GuidedDenoiser(gaussian_denoiser, jnp.asarray(1.5), shifted)
    target = condition._replace(mean=condition.mean + 1.5 * 0.2)
    v, sigma = condition.mean + 0.7, jnp.asarray(0.4)
    np.testing.assert_allclose(guided(v, sigma, condition), gaussian_denoiser(v, sigma, target), rtol=1e-12)
    num_draws, sampler = 20_000, Sampler(Split(), 64, asinh_grid)
    keys = jax.random.split(jax.random.key(0), num_draws)
    draws = np.asarray(jax.jit(jax.vmap(lambda key: sampler(key, guided, condition, 0.0)))(keys))
    rotated = (draws - np.asarray(target.mean)) @ np.asarray(condition.vectors / jnp.sqrt(condition.values))
    # The shift is up to one sd, which the terminal law does not know of: 1/40 of it is never made up.
    assert np.abs(rotated.mean(0)).max() < 4.5 / np.sqrt(num_draws) + 1 / 40
    assert np.abs(np.cov(rotated.T) - np.eye(D)).max() < 4.5 * np.sqrt(2 / num_draws)


def test_guidance_of_a_network_drops_its_features_and_weight_zero_is_none():
    denoiser, condition = trained(), make()
    v, sigma = condition.mean + 0.2, jnp.asarray(0.3)
    plain, free = denoiser(v, sigma, condition), denoiser(v, sigma, without_features(condition))
    assert np.abs(plain - free).max() > 1e-3
    np.testing.assert_array_equal(GuidedDenoiser(denoiser, jnp.asarray(0.0))(v, sigma, condition), plain)
    np.testing.assert_allclose(
        GuidedDenoiser(denoiser, jnp.asarray(2.0))(v, sigma, condition), plain + 2.0 * (plain - free)
    )
    heavy = eqx.tree_at(lambda d: d.sigma_min, ResidualDenoiser(denoiser.network, 0.0, HeavyTailed(4)), 0.1)
    assert process_of(GuidedDenoiser(heavy, jnp.asarray(1.0))) == HeavyTailed(4)
