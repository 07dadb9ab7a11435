"""Samplers on a law whose denoiser is known exactly, the truncated start among them; guidance; errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff import sampling

SCHEDULE = perturbdiff.linear_schedule()
MEAN, SD = np.array([0.0, 0.3, 0.6]), np.array([0.1, 0.2, 0.3])  # of independent Gaussian genes


def spread(time):
    """Standard deviation of X_t when the cells have sd `SD`."""
    signal = SCHEDULE.alphas_cumprod[time]
    return np.sqrt(signal * SD**2 + 1 - signal)


def exact(x_t, _previous, t):
    """E[X_0 | X_t] of cells N(MEAN, SD^2)."""
    signal = jnp.asarray(SCHEDULE.alphas_cumprod, x_t.dtype)[t][:, None, None]
    gain = SD**2 * jnp.sqrt(signal) / (signal * SD**2 + 1 - signal)
    return MEAN + gain * (x_t - jnp.sqrt(signal) * MEAN)


def affine_map(times):
    """Offset and slope of the deterministic map from start noise to cells."""
    with jax.enable_x64(True):
        noise = jnp.stack([jnp.zeros((1, 3)), jnp.ones((1, 3))])
        low, high = np.asarray(sampling.sample(exact, sampling.ddim_steps(SCHEDULE, times), noise))[:, 0]
    return low, high - low


def test_ddim_is_of_order_one_in_the_number_of_steps():
    # The probability flow keeps quantiles; the last step replaces X_0-ish by its estimate.
    first = SCHEDULE.alphas_cumprod[0]
    limit = SD**2 * np.sqrt(first) / (spread(0) * spread(999))
    numbers = np.array([50, 100, 200, 400])
    errors = [np.linalg.norm(affine_map(sampling.strided_times(k))[1] - limit) for k in numbers]
    slope = np.polyfit(np.log(numbers), np.log(errors), 1)[0]
    assert -1.1 < slope < -0.85
    assert np.all(np.diff(errors) < 0)


def test_the_whole_chain_gives_the_law():
    offset, slope = affine_map(sampling.published_times(1000))
    np.testing.assert_allclose(slope, SD, rtol=0.02)
    np.testing.assert_allclose(offset, MEAN, atol=2e-3)


def test_the_published_truncated_start_does_not():
    """Pure noise at t = 99, where cells still carry 95 % of their signal: the closed form of the damage."""
    offset, slope = affine_map(sampling.published_times(100))
    signal = SCHEDULE.alphas_cumprod[99]
    np.testing.assert_allclose(offset, MEAN * (1 - SD * np.sqrt(signal) / spread(99)), rtol=0.02)
    np.testing.assert_allclose(slope, SD / spread(99), rtol=0.02)
    assert (slope / SD > 2.2).all()


@pytest.mark.parametrize(
    "steps",
    [
        sampling.ddpm_steps(SCHEDULE, 1000),
        sampling.ddim_steps(SCHEDULE, sampling.strided_times(1000), eta=1.0),
    ],
)
def test_stochastic_rules_give_the_law(steps):
    num_cells = 4000
    key_start, key = jax.random.split(jax.random.key(3))
    start = jax.random.normal(key_start, (1, num_cells, 3))
    cells = np.asarray(sampling.sample(exact, steps, start, key))[0]
    # Four standard errors, and 4 % for the discretisation of the narrowest gene.
    assert (np.abs(cells.mean(0) - MEAN) < 4 * SD / np.sqrt(num_cells)).all()
    assert (np.abs(cells.std(0) / SD - 1) < 4 / np.sqrt(2 * num_cells) + 0.04).all()


def test_ddim_without_noise_ends_on_the_estimate_exactly():
    steps = sampling.ddim_steps(SCHEDULE, sampling.published_times(100), eta=0.5)
    assert (steps.estimate[-1], steps.state[-1], steps.noise[-1]) == (1.0, 0.0, 0.0)


def test_guidance_and_threshold():
    conditional, null = np.array([0.5, 0.1, 2e-4, 0.3]), np.array([0.25, 0.3, 2e-4, 0.3001])

    def denoiser(x_t, previous_x0, control, t, covariates, **_):
        np.testing.assert_array_equal(control, np.full((1, 1, 4), 7.0))  # both passes see the controls
        return jnp.asarray(null if covariates is None else conditional)[None, None]

    x, control = jnp.zeros((1, 1, 4)), jnp.full((1, 1, 4), 7.0)
    guided = sampling.guided(denoiser, control, jnp.zeros((1, 1, 4)), 2.0)
    result = np.asarray(guided(x, x, jnp.zeros(1, int)))[0, 0]
    np.testing.assert_allclose(result, [1.0, 0.0, 2e-4, 0.2998], rtol=1e-5)
    small = sampling.guided(lambda *_, **__: jnp.array([[[-1.0, 0.99e-4, 1.01e-4, 5.0]]]), control, None, 0)
    np.testing.assert_allclose(small(x, x, jnp.zeros(1, int))[0, 0], [0, 0, 1.01e-4, 5.0], rtol=1e-6)


def test_cells_are_zero_or_above_the_cutoff(tiny):
    keys = jax.random.split(jax.random.key(0), 3)
    start, control, covariates = (jax.random.normal(key, (2, 3, 5)) for key in keys)
    cells = np.asarray(perturbdiff.ddim_sample(tiny[0], start, control, covariates, 5, 1.0))
    assert np.isfinite(cells).all()
    assert (cells == 0).any()
    assert (cells[cells != 0] >= 1e-4).all()
    from_numpy = perturbdiff.ddim_sample(tiny[0], *map(np.asarray, (start, control, covariates)), 5, 1.0)
    np.testing.assert_array_equal(from_numpy, cells)


def test_a_key_is_needed_exactly_for_noise(tiny):
    keys = jax.random.split(jax.random.key(0), 4)
    arguments = tiny[0], *(jax.random.normal(key, (1, 2, 5)) for key in keys[:3]), 4, 0.0
    with pytest.raises(ValueError, match="give a random key"):
        perturbdiff.ddim_sample(*arguments, eta=0.5)
    one, same, other = (
        perturbdiff.ddim_sample(*arguments, eta=0.5, key=jax.random.key(k)) for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 0


def test_grids():
    np.testing.assert_array_equal(sampling.published_times(3), [2, 1, 0])
    np.testing.assert_array_equal(sampling.strided_times(1000), np.arange(1000)[::-1])
    np.testing.assert_array_equal(sampling.strided_times(4, 10), [9, 6, 3, 0])
    np.testing.assert_array_equal(sampling.strided_times(100, 100), sampling.published_times(100))
    with pytest.raises(ValueError, match="has 2 to start_time = 1000 steps"):
        sampling.strided_times(1)
    with pytest.raises(ValueError, match="falls from at most T - 1 = 999 to 0"):
        sampling.ddim_steps(SCHEDULE, np.array([1000, 0]))
    with pytest.raises(ValueError, match="falls from at most"):
        sampling.ddim_steps(SCHEDULE, np.array([5, 5, 0]))


def test_schedule_refuses_what_is_none():
    with pytest.raises(ValueError, match=r"betas must be float64, one-dimensional and in \(0, 1\]"):
        perturbdiff.Schedule(np.array([0.0, 0.1]))
