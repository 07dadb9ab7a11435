"""Log density by the flow against closed forms; its trace, its errors, its gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import multivariate_normal

from hilbertcell.inference.probability_flow import ProbabilityFlow, log_density
from hilbertcell.models.denoisers import Condition, ResidualDenoiser, gaussian_denoiser, init_network
from hilbertcell.models.forward_processes import HeavyTailed
from tests.mixture_law import bimodal, skewed


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def gaussian() -> Condition:
    turn = jnp.array([[0.8, -0.6], [0.6, 0.8]])
    return Condition(jnp.array([100.0, -3.0]), turn, jnp.array([1.0, 0.01]), jnp.zeros(0))


@pytest.mark.parametrize("sigma", [0.0, 0.3])
def test_the_program_is_exact_with_one_step(sigma):
    condition, v = gaussian(), jnp.array([101.0, -2.5])
    covariance = (condition.vectors * (condition.values + sigma**2)) @ condition.vectors.T
    expected = multivariate_normal.logpdf(v, condition.mean, covariance)
    assert float(ProbabilityFlow(1)(v, gaussian_denoiser, condition, sigma)) == pytest.approx(
        float(expected), rel=1e-10
    )


# The defaults err by 5e-5 at most on these laws; what is left at many steps is the terminal law, 40 sd out.
@pytest.mark.parametrize(("law", "sigma"), [(skewed(), 0.3), (bimodal(), 0.0)], ids=["skewed", "bimodal"])
def test_a_mixture_is_right_to_four_digits(law, sigma):
    points = jnp.asarray(law.draws(0, 200, sigma))
    density = jax.jit(jax.vmap(lambda v: log_density(v, law, law.condition(), sigma)))(points)
    np.testing.assert_allclose(density, jax.vmap(law.log_density, (0, None))(points, sigma), atol=2e-4)


@pytest.mark.slow
def test_more_steps_are_better_by_their_fourth_power_until_the_terminal_law_limits():
    law, errors = bimodal(), []
    points = jnp.asarray(law.draws(0, 50, 0.3))
    exact = jax.vmap(law.log_density, (0, None))(points, 0.3)
    for num_steps in (6, 12):
        flow = ProbabilityFlow(num_steps)
        density = jax.jit(jax.vmap(lambda v, flow=flow: flow(v, law, law.condition(), 0.3)))(points)
        errors.append(float(jnp.abs(density - exact).mean()))
    assert errors[0] / errors[1] > 2**3


def test_a_program_of_the_wrong_width_costs_accuracy_and_not_truth():
    law = skewed()
    points = jnp.asarray(law.draws(0, 100))
    density = jax.jit(jax.vmap(lambda v: log_density(v, law, law.condition(inflate=0.6), 0.0)))(points)
    np.testing.assert_allclose(density, jax.vmap(law.log_density)(points), atol=2e-3)


@pytest.mark.slow
def test_hutchinsons_trace_is_unbiased():
    law, v = bimodal(), jnp.array([0.1, 0.2])
    exact = float(ProbabilityFlow(12)(v, law, law.condition(), 0.2))
    values = [
        float(ProbabilityFlow(12, probes=4, seed=seed)(v, law, law.condition(), 0.2)) for seed in range(8)
    ]
    error = np.std(values, ddof=1) / np.sqrt(8)
    assert 1e-4 < error < 0.2
    assert abs(np.mean(values) - exact) < 4.5 * error


def test_gradients_of_the_program_are_those_of_its_density():
    condition, v = gaussian(), jnp.array([101.0, -2.5])
    flow = ProbabilityFlow(1)
    gradient = jax.jit(jax.grad(lambda v: flow(v, gaussian_denoiser, condition, 0.1)))(v)
    covariance = (condition.vectors * (condition.values + 0.01)) @ condition.vectors.T
    expected = jax.grad(multivariate_normal.logpdf)(v, condition.mean, covariance)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


def test_a_heavy_tailed_denoiser_has_no_density():
    network = init_network(jax.random.key(0), 2, 0, width=8, depth=1)
    heavy = ResidualDenoiser(network, jnp.asarray(0.01), HeavyTailed(4))
    with pytest.raises(ValueError, match="log_prob needs noise like that of a mean over cells"):
        log_density(jnp.zeros(2), heavy, gaussian(), 0.0)
    assert hash(ProbabilityFlow(4)) == hash(ProbabilityFlow(4))
