"""The response program against the closed forms: its marginal law, its conditional, and what `do` and masks mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density as program_density

from hilbertcell.models.microenvironment import (
    Globals,
    Latents,
    Observations,
    PopulationMeans,
    draw_latents,
    draw_response,
    response_mean,
)
from hilbertcell.models.response_program import in_microenvironments, response_program

C, J, D, K, E, B = 2, 3, 2, 2, 4, 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(num_factors: int = K, hidden: tuple[tuple[int, int], ...] = ()) -> tuple[Globals, Observations]:
    """Globals and two batches; (batch, slot) in `hidden` are not observed."""
    rng = np.random.default_rng(num_factors)
    positive = lambda *shape: np.exp(0.4 * rng.standard_normal(shape))
    globals_ = Globals(
        alpha=10.0 + rng.standard_normal((C, D)),
        effect=rng.standard_normal((E, D)),
        effect_scale=positive(D),
        strength=positive(E),
        slope=-0.4 + 0.3 * rng.standard_normal(D),
        baseline_loading=rng.standard_normal((D, num_factors)),
        response_loading=rng.standard_normal((D, num_factors)),
        baseline_scale=positive(C, D),
        response_scale=positive(C, D),
        batch_scale=positive(D),
        modulation=0.5 * rng.standard_normal((num_factors, E, D)),
        modulation_scale=positive(num_factors, D),
    )
    observed = np.ones((B, C + J), bool)
    for place in hidden:
        observed[place] = False
    layout = Observations(
        mean=10.0 + rng.standard_normal((B, C + J, D)),
        noise=0.3 * positive(B, C + J, D),
        observed=observed,
        condition=np.array([[0, 3, 1], [2, 1, 0]]),
        context=np.array([[0, 1, 0], [1, 0, 0]]),
    )
    return jax.tree.map(jnp.asarray, (globals_, layout))


def posterior(
    globals_: Globals, layout: Observations
) -> tuple[np.ndarray, np.ndarray, float, dict[str, slice]]:
    """Mean and covariance of all latents given the observed means, log evidence, and where each site lies.

    The joint density is the exponential of a quadratic form: one Newton step from anywhere is exact.
    """
    traced = handlers.trace(handlers.seed(response_program, 0)).get_trace(globals_, layout, layout.mean)
    latent = {
        name: jnp.zeros_like(site["value"])
        for name, site in traced.items()
        if site["type"] == "sample" and not site["is_observed"]
    }
    start, unravel = ravel_pytree(latent)

    def joint(flat: jax.Array) -> jax.Array:
        return program_density(response_program, (globals_, layout, layout.mean), {}, unravel(flat))[0]

    gradient, hessian = jax.jit(lambda x: (jax.grad(joint)(x), jax.hessian(joint)(x)))(start)
    covariance = np.linalg.inv(-np.asarray(hessian))
    mean = covariance @ np.asarray(gradient)
    evidence = float(joint(jnp.asarray(mean)))
    evidence += 0.5 * (len(mean) * np.log(2 * np.pi) + np.linalg.slogdet(covariance)[1])
    ends = np.cumsum([latent[name].size for name in sorted(latent)])
    places = {n: slice(end - latent[n].size, end) for n, end in zip(sorted(latent), ends, strict=True)}
    return mean, covariance, evidence, places


@pytest.mark.parametrize("num_factors", [0, K])
@pytest.mark.parametrize("hidden", [(), ((0, 1), (0, 3), (1, 0), (1, 1), (1, 2))])
def test_integrating_the_latents_out_gives_the_collapsed_density(num_factors, hidden):
    globals_, layout = make(num_factors, hidden)
    expected = PopulationMeans(globals_, layout).log_prob(layout.mean).sum()
    assert posterior(globals_, layout)[2] == pytest.approx(float(expected), rel=1e-10)


def test_its_conditional_is_the_law_of_the_closed_form_draws():
    globals_, layout = make(K, ((0, 1), (1, 3)))
    mean, covariance, _, places = posterior(globals_, layout)

    def one(key: jax.Array) -> jax.Array:
        def batch(key: jax.Array, own: Observations) -> dict[str, jax.Array]:
            key_latents, key_response = jax.random.split(key)
            latents = draw_latents(key_latents, globals_, own)
            seen = Observations(own.mean[C:], own.noise[C:], own.observed[C:], own.condition, own.context)
            response = draw_response(key_response, globals_, latents, own.condition, own.context, seen)
            return latents._asdict() | {"response": response}

        return ravel_pytree(jax.vmap(batch)(jax.random.split(key, B), layout))[0]

    num_draws = 10_000
    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_draws)))
    assert draws.shape[1] == len(mean)
    assert list(places) == [
        "batch_effect",
        "control_mean",
        "microenvironment",
        "response",
    ]  # both in this order
    sd = np.sqrt(np.diag(covariance))
    # 4.5 standard errors: less than one false alarm in 1,000 runs over 28 means and 406 covariances.
    assert np.abs((draws.mean(0) - mean) / sd).max() < 4.5 / np.sqrt(num_draws)
    error = (np.cov(draws.T) - covariance) / np.outer(sd, sd)
    assert np.abs(error).max() < 4.5 * np.sqrt(2 / num_draws)


def test_slots_that_are_not_observed_keep_their_latents_and_add_no_density():
    globals_, layout = make(K, ((0, 1), (1, 4)))
    trace = handlers.trace(handlers.seed(response_program, 0)).get_trace(globals_, layout, layout.mean)
    assert trace["response"]["value"].shape == (B, J, D)
    moved = layout.mean.at[0, 1].add(100.0).at[1, 4].add(100.0)
    density = [trace["observed_mean"]["fn"].log_prob(value) for value in (layout.mean, moved)]
    np.testing.assert_array_equal(*density)
    assert not np.allclose(density[0], trace["observed_mean"]["fn"].log_prob(layout.mean.at[0, 0].add(1.0)))


def test_predictive_given_drawn_latents_puts_the_response_around_its_mean():
    """`Predictive` over posterior draws of the latents: responses of the mean and spread that the globals say."""
    globals_, layout = make()
    num_draws = 2_000
    given = {"microenvironment": 1.0, "batch_effect": -0.5, "control_mean": 11.0}
    shapes = {"microenvironment": (B, K), "batch_effect": (B, D), "control_mean": (B, C, D)}
    draws = {name: jnp.full((num_draws, *shapes[name]), value) for name, value in given.items()}
    predicted = Predictive(response_program, draws)(jax.random.key(0), globals_, layout)["response"]
    for b in range(B):
        latents = [draws[name][0, b] for name in given]
        expected = response_mean(globals_, Latents(*latents), layout.condition[b], layout.context[b])
        spread = globals_.strength[layout.condition[b]][:, None] * globals_.response_scale[layout.context[b]]
        found = np.asarray(predicted[:, b])
        # 4.5 standard errors, 12 means and sds in all: one false alarm in 6,000 runs.
        assert np.abs((found.mean(0) - expected) / spread).max() < 4.5 / np.sqrt(num_draws)
        assert np.abs(found.std(0) / spread - 1).max() < 4.5 / np.sqrt(2 * num_draws)


def test_populations_are_put_into_each_microenvironment():
    """Differences between rows are what the microenvironments say; what `do` sets is not a random site any more."""
    globals_, layout = make()
    slots = jax.tree.map(lambda leaf: leaf[0], layout)
    u = jnp.array([[0.0, 0.0], [1.0, -1.0], [5.0, 2.0]])
    calm = globals_._replace(
        baseline_scale=jnp.full((C, D), 1e-9),
        response_scale=jnp.full((C, D), 1e-9),
        batch_scale=jnp.full(D, 1e-9),
    )
    trace = handlers.trace(handlers.seed(in_microenvironments(calm, slots, u), 0)).get_trace()
    control = calm.alpha + (u @ calm.baseline_loading.T)[:, None]
    np.testing.assert_allclose(trace["control_mean"]["value"], control, atol=1e-7)
    for b in range(len(u)):
        latents = Latents(u[b], jnp.zeros(D), control[b])
        expected = response_mean(calm, latents, slots.condition, slots.context)
        np.testing.assert_allclose(trace["response"]["value"][b], expected, atol=1e-6)
    assert trace["observed_mean"]["value"].shape == (3, C + J, D)


@pytest.mark.parametrize(("num_factors", "shape"), [(K, (3, K + 1)), (K, (K,)), (0, (3, 0))])
def test_microenvironments_of_other_factors_are_refused(num_factors, shape):
    globals_, layout = make(num_factors)
    with pytest.raises(ValueError, match=rf"expected \(B, {num_factors}\)"):
        in_microenvironments(globals_, jax.tree.map(lambda leaf: leaf[0], layout), jnp.zeros(shape))
