"""Forward processes: their noise, their clocks, and the way from cells to levels and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import f, kstest

from hilbertcell.models.forward_processes import (
    HeavyTailed,
    VarianceExploding,
    VariancePreserving,
    cells,
    level,
    process_of,
    terminal_level,
    top_up,
)

D = 3


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("process", [VarianceExploding(), VariancePreserving()])
@pytest.mark.parametrize("sigma", [0.2, 3.0])
def test_gaussian_noise_has_the_level_of_sigma_and_the_scale_of_the_process(process, sigma):
    num_draws = 40_000
    v = jnp.broadcast_to(jnp.array([100.0, -50.0, 1.0]), (num_draws, D))
    x = process.perturb(jax.random.key(0), v, jnp.full(num_draws, sigma))
    error = np.asarray(x / process.scale(sigma) - v) / sigma
    assert np.abs(error.mean(0)).max() < 4.5 / np.sqrt(num_draws)
    assert np.abs(np.cov(error.T) - np.eye(D)).max() < 4.5 * np.sqrt(2 / num_draws)


def test_each_point_is_noised_to_its_own_level():
    sigma = jnp.array([1e-6, 1e3])
    moved = VarianceExploding().perturb(jax.random.key(0), jnp.zeros((2, D)), sigma)
    assert np.abs(moved[0]).max() < 1e-5
    assert np.abs(moved[1]).min() > 1.0


def test_the_clock_of_the_variance_preserving_process_is_the_integral_of_beta():
    process = VariancePreserving(beta_start=0.2, beta_end=12.0)
    for time in (0.01, 0.4, 1.0):
        integral = quad(lambda s: 0.2 + s * (12.0 - 0.2), 0, time)[0]
        assert float(process.scale(process.sigma(time))) == pytest.approx(np.exp(-0.5 * integral), rel=1e-12)


@pytest.mark.parametrize("augmented", [2, 16])
def test_heavy_tailed_noise_has_the_kernel_of_pfgm(augmented):
    """(|x|^2 + D sigma^2)^(-(N + D)/2) in N dimensions: |x|^2 / (N sigma^2) has the law F(N, D), any direction."""
    num_draws, sigma = 20_000, 0.7
    x = np.asarray(
        HeavyTailed(augmented).perturb(
            jax.random.key(1), jnp.full((num_draws, D), 9.0), jnp.full(num_draws, sigma)
        )
    )
    error = x - 9.0
    assert kstest(np.square(error).sum(1) / (D * sigma**2), f(D, augmented).cdf).pvalue > 1e-3
    direction = error / np.linalg.norm(error, axis=1, keepdims=True)
    assert np.abs(direction.mean(0)).max() < 4.5 / np.sqrt(D * num_draws)


def test_a_population_enters_at_the_level_of_its_cells():
    n = jnp.array([20.0, 1_000.0])
    np.testing.assert_allclose(cells(level(n, jnp.broadcast_to(jnp.eye(D), (2, D, D)))), n, rtol=1e-12)
    rng = np.random.default_rng(0)
    root = rng.standard_normal((D, D))
    within = jnp.asarray(root @ root.T)
    sigma = level(20.0, within)
    left = np.linalg.eigvalsh(sigma**2 * np.eye(D) - within / 20.0)
    assert abs(left.min()) < 1e-12  # the smallest possible: nothing is left to add in one direction
    num_draws = 40_000
    v_hat = jnp.array([5.0, 0.0, -5.0])
    keys = jax.random.split(jax.random.key(2), num_draws)
    added = (
        np.asarray(jax.vmap(top_up, (0, None, None, None))(keys, v_hat, within / 20.0, 1.5 * sigma)) - v_hat
    )
    expected = 2.25 * float(sigma) ** 2 * np.eye(D) - np.asarray(within) / 20.0
    sd = np.sqrt(np.diag(expected))
    assert np.abs(added.mean(0) / sd).max() < 4.5 / np.sqrt(num_draws)
    assert np.abs((np.cov(added.T) - expected) / np.outer(sd, sd)).max() < 4.5 * np.sqrt(2 / num_draws)


def test_the_terminal_level_is_above_any_level_and_exists_for_a_point_mass():
    values = jnp.array([0.25, 0.0])
    assert float(terminal_level(values)) == pytest.approx(20.0)
    assert float(terminal_level(values, 1e4)) > 1e4
    assert float(terminal_level(jnp.zeros(2))) > 0
    assert float(terminal_level(jnp.zeros(2), 0.1)) >= 0.1


def test_the_heavy_tailed_kernel_has_no_cells_and_no_likelihood():
    process = HeavyTailed(8)
    assert not process.has_likelihood
    for ask in (
        lambda: cells(0.1, process),
        lambda: level(20, jnp.eye(D), process),
        lambda: process.require_likelihood("the ELBO"),
    ):
        with pytest.raises(
            ValueError, match=r"(cell count|ELBO) needs noise .*unconditional sampling only: use a denoiser"
        ):
            ask()
    with pytest.raises(ValueError, match="at least 1; given 0"):
        HeavyTailed(0)
    assert all(p.has_likelihood for p in (VarianceExploding(), VariancePreserving()))
    assert process_of(lambda v, sigma, condition: v) == VarianceExploding()
