"""The closed-form batch law against the same Gaussian written out densely, term by term."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from hilbertcell.models.dose_curves import dose_curve
from hilbertcell.models.microenvironment import (
    Globals,
    Observations,
    PopulationMeans,
    draw_latents,
    draw_response,
    extend_modulation,
    log_density,
)

C, J, D, K, E = 3, 5, 4, 2, 6


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(seed: int = 0, hidden: tuple[int, ...] = (), num_factors: int = K) -> tuple[Globals, Observations]:
    """Globals and one batch; slots in `hidden` are not observed."""
    rng = np.random.default_rng(seed)
    positive = lambda *shape: np.exp(0.4 * rng.standard_normal(shape))
    strength = positive(E)
    strength[2] = 0.0  # a null perturbation
    globals_ = Globals(
        alpha=100.0 + rng.standard_normal((C, D)),  # far from the effects: a swapped array would show
        effect=rng.standard_normal((E, D)),
        effect_scale=positive(D),
        strength=strength,
        slope=-0.4 + 0.3 * rng.standard_normal(D),
        baseline_loading=rng.standard_normal((D, num_factors)),
        response_loading=rng.standard_normal((D, num_factors)),
        baseline_scale=positive(C, D),
        response_scale=positive(C, D),
        batch_scale=positive(D),
        modulation=0.5 * rng.standard_normal((num_factors, E, D)),
        modulation_scale=positive(num_factors, D),
    )
    observed = np.ones(C + J, bool)
    observed[list(hidden)] = False
    batch = Observations(
        mean=100.0 + rng.standard_normal((C + J, D)),
        noise=0.3 * positive(C + J, D),
        observed=observed,
        condition=rng.permutation(E)[:J],
        context=np.array([0, 0, 1, 2, 2]),
    )
    return jax.tree.map(jnp.asarray, globals_), jax.tree.map(jnp.asarray, batch)


def dense(globals_: Globals, batch: Observations) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, covariance of [observations (C + J) D, u K, d D, control means C D, perturbed means J D], and the map used.

    Built by pushing a vector of independent standard normals through the generative process as a matrix.
    """
    g = jax.tree.map(np.asarray, globals_)
    b = jax.tree.map(np.asarray, batch)
    num_factors = g.baseline_loading.shape[1]
    sizes = {"u": num_factors, "d": D, "x": C * D, "e": J * D, "n": (C + J) * D}
    starts = dict(zip(sizes, np.cumsum([0, *list(sizes.values())[:-1]]), strict=True))
    total = sum(sizes.values())

    def unit(name: str, index: int) -> np.ndarray:
        row = np.zeros(total)
        row[starts[name] + index] = 1.0
        return row

    u = np.stack([unit("u", k) for k in range(num_factors)]) if num_factors else np.zeros((0, total))
    d = np.stack([g.batch_scale[f] * unit("d", f) for f in range(D)])
    x = np.zeros((C, D, total))
    for c in range(C):
        for f in range(D):
            x[c, f] = g.baseline_loading[f] @ u + g.baseline_scale[c, f] * unit("x", c * D + f)
    perturbed, mean_perturbed = np.zeros((J, D, total)), np.zeros((J, D))
    for j in range(J):
        c, e = b.context[j], b.condition[j]
        s = g.strength[e]
        for f in range(D):
            shared = d[f] + (g.response_loading[f] + g.modulation[:, e, f]) @ u
            residual = g.response_scale[c, f] * unit("e", j * D + f)
            perturbed[j, f] = x[c, f] + s * (g.slope[f] * x[c, f] + shared + residual)
        mean_perturbed[j] = g.alpha[c] + g.effect[e]
    latent = np.concatenate([x.reshape(-1, total), perturbed.reshape(-1, total)])
    noise = np.sqrt(b.noise).reshape(-1, 1) * np.stack([unit("n", i) for i in range((C + J) * D)])
    mean = np.concatenate([g.alpha.ravel(), mean_perturbed.ravel()])
    rows = np.concatenate([latent + noise, u, d, latent])
    return np.concatenate([mean, np.zeros(num_factors + D), mean]), rows @ rows.T, rows


HIDDEN = [(), (0,), (1, 2), tuple(range(C, C + J)), (0, 3, 7)]


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("num_factors", [0, K])
def test_log_density_is_that_of_the_dense_gaussian(hidden, num_factors):
    globals_, batch = make(1, hidden, num_factors)
    mean, covariance, _ = dense(globals_, batch)
    kept = np.repeat(np.asarray(batch.observed), D).nonzero()[0]
    expected = multivariate_normal(mean[kept], covariance[np.ix_(kept, kept)]).logpdf(
        np.asarray(batch.mean).ravel()[kept]
    )
    assert float(log_density(globals_, batch)) == pytest.approx(expected, rel=1e-10)


def test_log_density_does_not_see_hidden_slots_and_is_finite_without_a_batch_effect():
    globals_, batch = make(2, (1, 4))
    moved = batch._replace(mean=batch.mean.at[jnp.array([1, 4])].add(50.0))
    assert float(log_density(globals_, moved)) == float(log_density(globals_, batch))
    without = globals_._replace(batch_scale=jnp.zeros(D))
    tiny = globals_._replace(batch_scale=jnp.full(D, 1e-7))
    assert float(log_density(without, batch)) == pytest.approx(float(log_density(tiny, batch)), rel=1e-9)


@pytest.mark.parametrize("hidden", [(), (0, 3), tuple(range(C, C + J))])
def test_draws_have_the_law_of_the_dense_conditional(hidden):
    globals_, batch = make(3, hidden)
    mean, covariance, _ = dense(globals_, batch)
    num_observed = (C + J) * D
    kept = np.repeat(np.asarray(batch.observed), D).nonzero()[0]
    rest = np.arange(num_observed, len(mean))
    gain = covariance[np.ix_(rest, kept)] @ np.linalg.inv(covariance[np.ix_(kept, kept)])
    expected = mean[rest] + gain @ (np.asarray(batch.mean).ravel()[kept] - mean[kept])
    spread = covariance[np.ix_(rest, rest)] - gain @ covariance[np.ix_(kept, rest)]

    seen = Observations(batch.mean[C:], batch.noise[C:], batch.observed[C:], batch.condition, batch.context)

    def one(key):
        latent_key, response_key = jax.random.split(key)
        latents = draw_latents(latent_key, globals_, batch)
        response = draw_response(response_key, globals_, latents, batch.condition, batch.context, seen)
        parts = [latents.microenvironment, latents.batch_effect, latents.control_mean, response]
        return jnp.concatenate([part.ravel() for part in parts])

    num_draws = 20_000
    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_draws)))
    sd = np.sqrt(np.diag(spread))
    # 4.5 standard errors: about one false alarm in 1,000 runs over the ~40 means and ~900 covariances.
    assert np.abs((draws.mean(0) - expected) / sd).max() < 4.5 / np.sqrt(num_draws)
    correlation_error = (np.cov(draws.T) - spread) / np.outer(sd, sd)
    assert np.abs(correlation_error).max() < 4.5 * np.sqrt(2 / num_draws)


def test_sample_agrees_with_log_prob():
    globals_, batch = make(4, (2, 6))
    table = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), batch)
    law = PopulationMeans(globals_, table)
    draws = law.sample(jax.random.key(1), (4_000,))
    assert draws.shape == (4_000, 2, C + J, D)
    mean, covariance, _ = dense(globals_, batch)
    kept = np.repeat(np.asarray(batch.observed), D).nonzero()[0]
    # E log p(y) under p is minus the entropy of the Gaussian; its variance is half the dimension.
    entropy = multivariate_normal(mean[kept], covariance[np.ix_(kept, kept)]).entropy()
    densities = np.asarray(jax.vmap(law.log_prob)(draws)).ravel()
    assert abs(densities.mean() + entropy) < 4 * np.sqrt(len(kept) / 2 / len(densities))


def test_a_null_perturbation_transmits_nothing_of_the_batch():
    globals_, batch = make(5)
    latents = draw_latents(jax.random.key(0), globals_, batch)
    null = jnp.array([2])
    response = draw_response(jax.random.key(1), globals_, latents, null, jnp.array([1]), None)
    np.testing.assert_allclose(response[0], latents.control_mean[1] + globals_.effect[2], rtol=1e-12)


def test_a_condition_never_seen_shares_the_modulation_of_its_level_or_draws_one():
    globals_, _ = make(6)
    level = np.array([0, 1, 2, 3, 4, 5, 1, 6, 6])  # one more condition of level 1, two of a level never seen
    keys = jax.random.split(jax.random.key(0), 4000)
    curve = dose_curve([(f"P{i}", -1.0) for i in range(7)], E)
    first = np.arange(E)
    drawn = np.asarray(jax.vmap(lambda key: extend_modulation(key, globals_, level, first, curve))(keys))
    np.testing.assert_array_equal(drawn[:, :, :E], np.broadcast_to(globals_.modulation, (4000, K, E, D)))
    np.testing.assert_array_equal(drawn[:, :, 6], drawn[:, :, 1])
    np.testing.assert_array_equal(drawn[:, :, 7], drawn[:, :, 8])
    ratio = drawn[:, :, 7].std(0) / np.asarray(globals_.modulation_scale)
    assert np.abs(ratio - 1).max() < 4.5 / np.sqrt(2 * 4000)
    assert extend_modulation(keys[0], globals_._replace(modulation=None), level, first, curve) is None


def test_without_modulations_all_conditions_load_alike():
    globals_, batch = make(7)
    none = globals_._replace(modulation=None)
    zero = globals_._replace(modulation=jnp.zeros((K, E, D)))
    assert float(log_density(none, batch)) == pytest.approx(float(log_density(zero, batch)), rel=1e-12)
    assert float(log_density(none, batch)) != pytest.approx(float(log_density(globals_, batch)), rel=1e-3)


@jax.jit
def density_and_gradient(globals_: Globals, table: Observations) -> tuple[jax.Array, Globals]:
    """Log density of a table and its gradient in the globals."""
    return jax.value_and_grad(lambda g: PopulationMeans(g, table).log_prob(table.mean).sum())(globals_)


def test_gradients_are_those_of_finite_differences():
    """No gradient passes through where the quadratic form has its minimum: it has to be the minimum."""
    globals_, batch = make(4, hidden=(1, 5))
    table = jax.tree.map(lambda leaf: leaf[None], batch)
    rng = np.random.default_rng(5)
    gradient = density_and_gradient(globals_, table)[1]
    for name, value in globals_._asdict().items():
        step = 1e-5 * rng.standard_normal(value.shape)
        up, down = (
            density_and_gradient(globals_._replace(**{name: value + sign * step}), table)[0]
            for sign in (1, -1)
        )
        # Central differences: of second order in the step, and rounding of a density of some ten thousands.
        assert float((getattr(gradient, name) * step).sum()) == pytest.approx(
            float(up - down) / 2, rel=1e-4, abs=1e-9
        ), name


@pytest.mark.parametrize("noise", [1.0, 1e-5])
def test_a_table_in_single_precision_keeps_the_density_and_its_gradients(noise):
    """Populations of a dozen cells and of a million: nothing large may be subtracted from something as large."""
    globals_, batch = make(6)
    globals_ = globals_._replace(alpha=globals_.alpha - 100.0, strength=globals_.strength + 0.3)
    batch = batch._replace(mean=batch.mean - 100.0, noise=noise * batch.noise)
    table = jax.tree.map(lambda leaf: leaf[None], batch)
    double, gradient = density_and_gradient(globals_, table)
    found, single = density_and_gradient(globals_, table._replace(noise=table.noise.astype(jnp.float32)))
    assert float(found) == pytest.approx(float(double), rel=1e-5)
    assert found.dtype == jnp.float64
    for name, one, other in zip(Globals._fields, gradient, single, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-5 * float(jnp.abs(one).max()), err_msg=name)
