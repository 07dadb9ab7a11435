"""The variational family: its density, and SVI with it on a posterior known in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer.util import log_density
from scipy.stats import multivariate_normal, norm

from hilbertcell.inference import guides
from hilbertcell.inference.guides import BlockGuide
from hilbertcell.inference.svi import fit_svi, usual_steps
from hilbertcell.models.microenvironment import Observations

D, N = 3, 8


def regression(design, outcome=None):
    """Per-feature linear regression with two coefficients and a shared positive noise scale."""
    scale = numpyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with numpyro.plate("feature", D):
        weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        mean = weights @ design.T
        numpyro.sample("outcome", dist.Normal(mean, 0.5 + 0.0 * scale).to_event(1), obs=outcome)


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    design = rng.standard_normal((N, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])  # correlated coefficients
    outcome = rng.standard_normal((D, 2)) @ design.T + 0.5 * rng.standard_normal((D, N))
    with jax.enable_x64(True):
        yield jnp.asarray(design), jnp.asarray(outcome)


def make_guide(problem):
    spread = {"weights": np.full((D, 2), 0.3)}
    return BlockGuide(
        regression, *problem, initial={"weights": np.zeros((D, 2)), "scale": 1.0}, initial_sd=spread
    )


def test_density_of_the_guide_is_that_of_its_gaussian(problem):
    guide = make_guide(problem)
    rng = np.random.default_rng(1)
    tril = np.tril(0.3 * rng.standard_normal((D, 2, 2))) + np.eye(2)
    params = guide.initial_params() | {
        "shared_loc": jnp.array([0.7]),
        "shared_tril": jnp.array([[1.3]]),
        "feature_loc": jnp.asarray(rng.standard_normal((D, 2))),
        "feature_tril": jnp.asarray(tril),
        "feature_common": jnp.asarray(rng.standard_normal((D, 2, 1))),
    }
    seeded = handlers.seed(guide, 3)
    trace = handlers.trace(handlers.substitute(seeded, data=params)).get_trace(*problem)
    data = {name: trace[name]["value"] for name in ("_shared", "_feature")}
    density = log_density(handlers.substitute(seeded, data=params), problem, {}, data)[0]
    log_scale = np.log(float(trace["scale"]["value"]))
    expected = norm(0.1 * 0.7, 0.1 * 1.3).logpdf(log_scale) - log_scale
    for g in range(D):
        # Given the noise of what is shared, features are shifted by it and keep their Gaussian.
        follow = np.asarray(params["feature_common"][g]) @ np.asarray(data["_shared"])
        mean = 0.3 * (np.asarray(params["feature_loc"][g]) + follow)
        expected += multivariate_normal(mean, 0.09 * tril[g] @ tril[g].T).logpdf(trace["weights"]["value"][g])
    assert float(density) == pytest.approx(expected, rel=1e-9)


def test_svi_finds_the_conjugate_posterior_with_its_correlations(problem):
    design, outcome = problem
    guide = make_guide(problem)
    result = fit_svi(
        jax.random.key(0), regression, guide, problem, num_steps=2_000, learning_rate=0.05, num_particles=4
    )
    draws = jax.vmap(lambda key: guide.sample(key, result.params))(
        jax.random.split(jax.random.key(1), 20_000)
    )
    precision = np.eye(2) + design.T @ design / 0.25
    covariance = np.linalg.inv(precision)
    mean = np.asarray(outcome @ design / 0.25 @ covariance)
    weights = np.asarray(draws["weights"])
    sd = np.sqrt(np.diag(covariance))
    # The optimum is exact; what is left is the noise of the last gradients, a few percent of a posterior sd.
    assert np.abs((weights.mean(0) - mean) / sd).max() < 0.1
    for g in range(D):
        np.testing.assert_allclose(
            np.cov(weights[:, g].T) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.15
        )
    assert result.losses[-200:].mean() < result.losses[:20].mean()


def test_a_diverging_elbo_is_an_error_that_names_the_step(problem):
    with pytest.raises(FloatingPointError, match="not finite from step 0"):
        fit_svi(
            jax.random.key(0), regression, make_guide(problem), (problem[0], problem[1] * jnp.nan),
            num_steps=10, learning_rate=0.05, num_particles=1,
        )  # fmt: skip


@pytest.mark.parametrize("objective", ["iwae", "renyi"])
def test_other_bounds_are_tighter_than_the_elbo(problem, objective):
    options = {"num_steps": 200, "learning_rate": 0.05, "num_particles": 8}
    losses = {
        name: fit_svi(
            jax.random.key(0), regression, make_guide(problem), problem, objective=name, **options
        ).losses
        for name in ("elbo", objective)
    }
    # Same start: the first hundred steps hold guides that are alike and poor, where the bounds differ most.
    assert losses[objective][:100].mean() < losses["elbo"][:100].mean()


def test_features_follow_what_is_shared():
    """Weights are the shared scale plus noise: their correlations with it, and with each other, are in the guide."""

    def program(outcome):
        level = numpyro.sample("level", dist.Normal(0.0, 1.0))
        with numpyro.plate("feature", D):
            weight = numpyro.sample("weight", dist.Normal(level, 0.5))
            numpyro.sample("outcome", dist.Normal(weight, 0.5), obs=outcome)

    with jax.enable_x64(True):
        args = (jnp.asarray([0.3, -0.2, 0.6]),)
        guide = BlockGuide(
            program,
            *args,
            initial={"level": 0.0, "weight": np.zeros(D)},
            initial_sd={"weight": np.full(D, 0.3)},
        )
        result = fit_svi(
            jax.random.key(0), program, guide, args, num_steps=1_000, learning_rate=0.05, num_particles=4
        )
        draw = jax.vmap(lambda key: guide.sample(key, result.params))
        draws = draw(jax.random.split(jax.random.key(1), 10_000))
    joint = np.column_stack([draws["level"], draws["weight"]])
    precision = np.diag([1.0 + D / 0.25, *([2 / 0.25] * D)])
    precision[0, 1:] = precision[1:, 0] = -1 / 0.25
    covariance = np.linalg.inv(precision)
    sd = np.sqrt(np.diag(covariance))
    # What is left is the noise of the last gradients; dropping the coupling loses correlations of 0.3 and more.
    np.testing.assert_allclose(np.cov(joint.T) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.12)


def test_small_tables_get_more_steps():
    def steps(*shape: int) -> int:
        return usual_steps(Observations(*(np.broadcast_to(0.0, shape),) * 2, *(np.zeros(0),) * 3))

    assert [steps(6, 10, 72), steps(6, 10, 250), steps(20, 100, 2048)] == [6000, 2000, 1000]


def test_many_features_are_not_coupled_to_what_they_share(problem, monkeypatch):
    assert "feature_common" in make_guide(problem).initial_params()
    monkeypatch.setattr(guides, "_MAX_COUPLINGS", 5)  # 3 features x 2 weights x 1 scale
    assert "feature_common" not in make_guide(problem).initial_params()
