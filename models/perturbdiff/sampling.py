"""Sampling cell sets: schedule, denoiser, guidance, step rule and time grid are five separate parts.

Every rule here is linear in the estimate X^ of the clean cells, the one before, the state and a fresh Gaussian z,

    X_next = a X^ + b X_t + c X^_previous + s z,                X^ = estimate(X_t, X^_previous, t)

so a rule is a table of (t, a, b, s, c), computed on the host in float64. The estimate of one step is the
self-conditioning input of the next; the first step gets zeros.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from hilbertcell.models.perturbdiff.denoiser import Denoiser
from hilbertcell.models.perturbdiff.schedule import Schedule, linear_schedule

CUTOFF = 1e-4  # published; smaller estimates, all negative ones among them, become exactly zero

Estimate = Callable[[Array, Array, Array], Array]  # (x_t, previous_x0, t (B,)) -> x0


class Steps(NamedTuple):
    """A step rule on a time grid, one row per step; host arrays (K,) outside a loop, scalars inside."""

    time: NDArray | Array  # int, step index t before the step
    estimate: NDArray | Array  # a
    state: NDArray | Array  # b
    noise: NDArray | Array  # s
    previous: NDArray | Array  # c


class State(NamedTuple):
    """What the next step needs."""

    x_t: Array  # (B, S, G)
    previous_x0: Array  # (B, S, G)


def published_times(start_time: int) -> NDArray[np.int64]:
    """Indices start_time - 1, ..., 1, 0: the *end* of the chain, not a stride through it.

    Below T the published sampler puts pure noise where training saw noised cells (docs/models/perturbdiff.md says
    what that does to the spread).
    """
    return np.arange(start_time)[::-1]


def strided_times(num_steps: int, start_time: int = 1000) -> NDArray[np.int64]:
    """`num_steps` indices spread evenly from `start_time` - 1 down to 0, both included; `start_time` = T: all of the chain."""
    if not 2 <= num_steps <= start_time:
        raise ValueError(f"num_steps = {num_steps}: a strided grid has 2 to start_time = {start_time} steps")
    return np.round(np.linspace(start_time - 1, 0, num_steps)).astype(np.int64)


def ddim_steps(schedule: Schedule, times: NDArray[np.integer], eta: float = 0.0) -> Steps:
    """The DDIM rule (Song, Meng & Ermon 2021, equation 12) from each time of a descending grid to the next.

    The last step goes to the clean cells: a = 1, b = s = 0. `eta` = 0 is deterministic, 1 as noisy as DDPM.
    """
    _check_grid(times, schedule)
    alpha_bar = schedule.alphas_cumprod[times]
    following = np.append(alpha_bar[1:], 1.0)
    noise = eta * np.sqrt((1.0 - following) / (1.0 - alpha_bar)) * np.sqrt(1.0 - alpha_bar / following)
    # The direction to X_t is eps = (X_t - sqrt(alpha_bar) X^) / sqrt(1 - alpha_bar).
    state = np.sqrt(np.maximum(1.0 - following - noise**2, 0.0)) / np.sqrt(1.0 - alpha_bar)
    return Steps(times, np.sqrt(following) - state * np.sqrt(alpha_bar), state, noise, np.zeros_like(noise))


def dpm_steps(schedule: Schedule, times: NDArray[np.integer]) -> Steps:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): as DDIM without noise, of second order in the step.

    With lambda = log(signal / spread), h its step and r the step before divided by h, the estimate of a DDIM step is
    extrapolated to X^ + (X^ - X^_previous) / (2 r). The first step and the last, to the clean cells, are those of DDIM.
    """
    plain = ddim_steps(schedule, times)
    alpha_bar = schedule.alphas_cumprod[times]
    step = np.diff(0.5 * np.log(alpha_bar / (1.0 - alpha_bar)))
    weight = np.zeros(len(times))
    weight[1:-1] = 0.5 * step[1:] / step[:-1]
    return plain._replace(estimate=plain.estimate * (1.0 + weight), previous=-plain.estimate * weight)


def ddpm_steps(schedule: Schedule, start_time: int) -> Steps:
    """The ancestral rule (Ho et al. 2020, algorithm 2) with the fixed large variance, every index in turn."""
    times = published_times(start_time)
    _check_grid(times, schedule)
    noise = np.exp(0.5 * schedule.fixed_large_log_variance[times]) * (times > 0)
    return Steps(
        times, schedule.posterior_mean_coef1[times], schedule.posterior_mean_coef2[times], noise, 0.0 * noise
    )


def guided(
    denoiser: Denoiser,
    control: Array,
    covariates: Array | None,
    guidance: float | Array,
    *,
    source: Array | None = None,
    u: Array | None = None,
) -> Estimate:
    """Classifier-free guidance (Ho & Salimans 2022), written on the clean cells, then the threshold.

        X^ = (1 + w) f(X_t, cov) - w f(X_t, null);      X^ below 1e-4 becomes 0

    The same as guidance on the noise, because noise is affine in X^ at fixed X_t; that detour costs float32 up to
    1 / sqrt(alpha_bar) = 157. Both passes see the controls. Two network evaluations a step; one if `guidance` is
    the number 0 or there are no covariates.

    Args:
        denoiser: the network.
        control: (B, S, G) control cells, model units.
        covariates: (B, S, width) or (B, 1, width), or None.
        guidance: w; 0 is none.
        source: see `Denoiser`.
        u: see `Denoiser`; given in both passes.
    """
    single = covariates is None or (isinstance(guidance, (int, float)) and guidance == 0)

    def estimate(x_t: Array, previous_x0: Array, t: Array) -> Array:
        x0 = denoiser(x_t, previous_x0, control, t, covariates, source=source, u=u)
        if not single:
            x0 = (1.0 + guidance) * x0 - guidance * denoiser(
                x_t, previous_x0, control, t, None, source=source, u=u
            )
        return jnp.where(x0 < CUTOFF, 0.0, x0)

    return estimate


def init(start_noise: Array) -> State:
    """Start from noise (B, S, G) with no earlier estimate."""
    return State(start_noise, jnp.zeros_like(start_noise))


def step(estimate: Estimate, row: Steps, state: State, noise: Array | None) -> State:
    """One step by one row of a rule; `noise` (B, S, G) standard Gaussian, or None where the rule needs none."""
    t = jnp.full(len(state.x_t), row.time)
    dtype = state.x_t.dtype
    x0 = estimate(state.x_t, state.previous_x0, t).astype(dtype)
    a, b, s, c = (jnp.asarray(weight, dtype) for weight in row[1:])
    x_next = a * x0 + b * state.x_t + c * state.previous_x0
    return State(x_next if noise is None else x_next + s * noise, x0)


def sample(estimate: Estimate, steps: Steps, start_noise: Array, key: Array | None = None) -> Array:
    """Run all steps of a rule from `start_noise` (B, S, G); `key` is needed when the rule adds noise.

    Raises:
        ValueError: if the rule adds noise and there is no key.
    """
    noisy = bool(np.any(steps.noise))
    if noisy and key is None:
        raise ValueError("this step rule adds noise: give a random key")

    def body(state: State, inputs: tuple[Steps, Array]) -> tuple[State, None]:
        row, i = inputs
        noise = (
            jax.random.normal(jax.random.fold_in(key, i), start_noise.shape, start_noise.dtype)
            if noisy
            else None
        )
        return step(estimate, row, state, noise), None

    rows = Steps(jnp.asarray(steps.time), *(jnp.asarray(column, start_noise.dtype) for column in steps[1:]))
    state, _ = jax.lax.scan(body, init(start_noise), (rows, jnp.arange(len(steps.time))))
    return state.x_t


def ddim_sample(
    denoiser: Denoiser,
    start_noise: Array,
    control: Array,
    covariates: Array | None,
    start_time: int,
    guidance: float,
    eta: float = 0.0,
    num_train_steps: int = 1000,
    *,
    key: Array | None = None,
    source: Array | None = None,
) -> Array:
    """Sample cell sets as published: DDIM over indices start_time - 1, ..., 0 of the linear schedule.

    Published settings: start_time 100, guidance 1, eta 0, that is 200 network evaluations per set.

    Args:
        denoiser: the network.
        start_noise: (B, S, G) standard Gaussian.
        control: (B, S, G) control cells, model units.
        covariates: (B, S, width) or (B, 1, width), or None.
        start_time: number of steps, at most `num_train_steps`.
        guidance: w; 0 needs one network evaluation a step, anything else two.
        eta: noise of the steps, 0 for none.
        num_train_steps: T of the schedule.
        key: random key, needed when `eta` > 0.
        source: see `Denoiser`.

    Returns:
        (B, S, G) cells in model units, each entry 0 or at least 1e-4.
    """
    start_noise = jnp.asarray(start_noise)
    # As an array the strength is traced: a sweep over it compiles once.
    strength = None if guidance == 0 else jnp.asarray(guidance, start_noise.dtype)
    grid = (num_train_steps, start_time, eta)
    return _compiled_ddim(denoiser, start_noise, control, covariates, strength, grid, key, source)


@eqx.filter_jit
def _compiled_ddim(denoiser, start_noise, control, covariates, strength, grid, key, source) -> Array:
    num_train_steps, start_time, eta = grid
    steps = ddim_steps(linear_schedule(num_train_steps), published_times(start_time), eta)
    estimate = guided(denoiser, control, covariates, 0 if strength is None else strength, source=source)
    return sample(estimate, steps, start_noise, key)


def _check_grid(times: NDArray[np.integer], schedule: Schedule) -> None:
    if not len(times) or times[0] >= schedule.num_steps or times[-1] != 0 or (np.diff(times) >= 0).any():
        raise ValueError(
            f"a time grid falls from at most T - 1 = {schedule.num_steps - 1} to 0; given {len(times)} times "
            f"{list(times[:3])} ... {list(times[-1:])}"
        )
