"""The program in coordinates: the same law, and the complement that goes with any coordinates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models.coordinates import (
    CoordinateMap,
    complete,
    given_draws,
    residual_basis,
)
from hilbertcell.models.microenvironment import Globals, Latents, draw_response, response_mean

C, E, D, Q, K = 2, 3, 5, 2, 1
CONTEXT = jnp.array([0, 1, 1])
CONDITION = jnp.array([0, 1, 2])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(seed: int = 0, **changes) -> tuple[Globals, Latents, CoordinateMap]:
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape))
    globals_ = Globals(
        alpha=100.0 + normal(C, D), effect=-10.0 + normal(E, D), effect_scale=jnp.ones(D),
        strength=jnp.array([1.0, 0.5, 0.0]), slope=normal(D), baseline_loading=normal(D, K),
        response_loading=normal(D, K), baseline_scale=jnp.ones((C, D)),
        response_scale=jnp.exp(normal(C, D)), batch_scale=jnp.ones(D), modulation=normal(K, E, D),
        modulation_scale=jnp.ones((K, D)),
    )._replace(**changes)  # fmt: skip
    latents = Latents(normal(K), normal(D), globals_.alpha + normal(C, D))
    return globals_, latents, CoordinateMap(normal(D, Q), normal(Q))


def test_response_mean_is_that_of_the_program():
    globals_, latents, _ = make(response_scale=jnp.zeros((C, D)))
    drawn = draw_response(jax.random.key(0), globals_, latents, CONDITION, CONTEXT, None)
    assert np.allclose(response_mean(globals_, latents, CONDITION, CONTEXT), drawn, rtol=1e-12)


def test_condition_holds_the_law_of_the_program_in_coordinates():
    globals_, latents, mapping = make()
    basis = residual_basis(globals_, mapping)
    given = given_draws(globals_, basis, mapping, latents, CONDITION, CONTEXT, jnp.zeros((3, 0)))
    for t in range(3):
        variance = (globals_.strength[t] * globals_.response_scale[CONTEXT[t]]) ** 2
        expected = mapping.directions.T @ (variance[:, None] * mapping.directions)
        assert np.allclose((given.vectors[t] * given.values[t]) @ given.vectors[t].T, expected)
    assert np.allclose(given.mean, mapping(response_mean(globals_, latents, CONDITION, CONTEXT)))


def test_completed_embeddings_have_the_coordinates_asked_for():
    globals_, latents, mapping = make()
    m = draw_response(jax.random.key(1), globals_, latents, CONDITION, CONTEXT, None)
    v = jnp.asarray(np.random.default_rng(5).normal(50.0, 3.0, (3, Q)))
    found = complete(m, v, globals_, residual_basis(globals_, mapping), mapping, CONTEXT)
    assert np.allclose(mapping(found), v)


def test_program_coordinates_and_their_complement_give_back_the_program():
    globals_, latents, mapping = make()
    basis, num = residual_basis(globals_, mapping), 40_000

    def one(key):
        first, second = (
            draw_response(k, globals_, latents, CONDITION, CONTEXT, None) for k in jax.random.split(key)
        )
        return complete(first, mapping(second), globals_, basis, mapping, CONTEXT)

    drawn = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(2), num)))
    mean = np.asarray(response_mean(globals_, latents, CONDITION, CONTEXT))
    for t in range(2):  # the third has strength 0
        sd = np.asarray(globals_.strength[t] * globals_.response_scale[CONTEXT[t]])
        assert (np.abs(drawn[:, t].mean(0) - mean[t]) / sd).max() < 4.5 / np.sqrt(num)
        correlation = np.cov((drawn[:, t] / sd).T)
        assert np.abs(correlation - np.eye(D)).max() < 4.5 * np.sqrt(2 / num)
    assert np.allclose(drawn[:, 2], mean[2])
