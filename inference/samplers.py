"""Samplers of a diffusion: from noise at a high level down to a population at a low one.

Denoiser, time grid, step rule, start and guidance are five separate parts. A rule is `init(v, sigma) -> State` and
`step(key, state, sigma_next, denoiser, condition) -> (State, Info)`; `sample` drives it by `lax.scan`. Everything is for one point (D,): batch by `jax.vmap`.

| rule | solves | order | evaluations a step | source |
|---|---|---|---|---|
| `Split` | the flow, the program's part exactly | 2 | 1 | equation (2) of `models.denoisers`, two-step Adams-Bashforth |
| `Heun` | the flow; with `churn` partly the SDE | 2 | 2 | Karras et al. 2022, algorithms 1 and 2 |
| `DPM` | the flow | 2 | 1 | DPM-Solver++(2M), Lu et al. 2022, algorithm 2 |
| `EulerMaruyama` | the reverse SDE | weak 1 | 1 | Song et al. 2021 |
| `Ancestral` | the reverse SDE, the program's part exactly | weak 1 | 1 | Ho et al. 2020, with the posterior covariance of the program |

The flow maps noise to points one to one; only the reverse SDE, started at a noisy point, draws from the law of the
population *given* that point.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hilbertcell.models.denoisers import (
    Condition,
    Denoiser,
    angle,
    colour,
    residual,
    root,
    whiten,
)
from hilbertcell.models.forward_processes import process_of, terminal_level


class State(NamedTuple):
    """Where a sampler stands."""

    v: Array  # (D,) the noisy point
    sigma: Array  # () its level
    memory: Array  # (D,) what a two-step rule keeps of the step before; unused by one-step rules
    memory_sigma: Array  # () level of the step before; infinite before the first step


class Info(NamedTuple):
    """What one step tells."""

    estimate: Array  # (D,) the denoised point before the step
    evaluations: Array  # () int, denoiser evaluations of the step


class Rule(ABC):
    """A step rule: a frozen dataclass, hashable by value, so that compiled functions recognise it."""

    @property
    @abstractmethod
    def stochastic(self) -> bool:
        """Whether noise is added on the way."""

    def init(self, v: Array, sigma: Array) -> State:
        """Start at a noisy point (D,)."""
        return State(v, jnp.asarray(sigma, v.dtype), jnp.zeros_like(v), jnp.asarray(jnp.inf, v.dtype))

    @abstractmethod
    def step(
        self, key: Array, state: State, sigma_next: Array, denoiser: Denoiser, condition: Condition
    ) -> tuple[State, Info]:
        """Go from the level of `state` down to `sigma_next`."""


def _ratio(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, 0 where the denominator is."""
    return jnp.where(denominator == 0, 0.0, numerator / jnp.where(denominator == 0, 1.0, denominator))


@dataclass(frozen=True)
class Split(Rule):
    """The flow in whitened points, `dz = -F dtheta`: exact for the program, Adams-Bashforth of order 2 for F."""

    stochastic = False

    def step(
        self, key: Array, state: State, sigma_next: Array, denoiser: Denoiser, condition: Condition
    ) -> tuple[State, Info]:
        """One step; the key is not used. Each eigenvector has its own clock theta."""
        v, sigma, before, sigma_before = state
        now, following = angle(condition.values, sigma), angle(condition.values, sigma_next)
        earlier = angle(condition.values, sigma_before)
        estimate = denoiser(v, sigma, condition)
        f = residual(estimate, v, sigma, condition)
        # Before the first step sigma is infinite: no history, a plain Euler step.
        weight = jnp.where(jnp.isinf(sigma_before), 0.0, 0.5 * _ratio(following - now, now - earlier))
        slope = f + weight * (f - before)
        z = whiten(v, sigma, condition) - (following - now) * slope
        return State(colour(z, sigma_next, condition), sigma_next, f, sigma), Info(estimate, jnp.asarray(1))


@dataclass(frozen=True)
class Heun(Rule):
    """Karras et al. 2022: Heun's method for the flow, `dv / dsigma = (v - D) / sigma`; noise is added first if `churn`."""

    churn: float = 0.0  # how much of its way down, in log sigma, a step first goes up by adding noise

    @property
    def stochastic(self) -> bool:
        """Whether noise is added on the way."""
        return self.churn > 0

    def step(
        self, key: Array, state: State, sigma_next: Array, denoiser: Denoiser, condition: Condition
    ) -> tuple[State, Info]:
        """One step of algorithm 2 (of algorithm 1 without churn); line numbers are those of algorithm 2."""
        v, sigma = state.v, state.sigma
        sigma_hat = sigma
        if self.churn:
            # Relative to the step, so that shorter steps converge; the cap on gamma is that of the paper.
            ratio = jnp.where(sigma_next > 0, sigma / jnp.where(sigma_next > 0, sigma_next, 1.0), jnp.inf)
            sigma_hat = jnp.minimum(ratio**self.churn, 2.0**0.5) * sigma  # 5
            noise = jax.random.normal(key, v.shape, v.dtype)
            v = v + jnp.sqrt(sigma_hat**2 - sigma**2) * noise  # 6
        estimate = denoiser(v, sigma_hat, condition)
        slope = (v - estimate) / sigma_hat  # 7
        euler = v + (sigma_next - sigma_hat) * slope  # 8
        again = _ratio(euler - denoiser(euler, sigma_next, condition), sigma_next)  # 10
        heun = v + (sigma_next - sigma_hat) * 0.5 * (slope + again)  # 11
        # At level 0 the slope is not defined: the last step is Euler's (line 9).
        return State(jnp.where(sigma_next > 0, heun, euler), sigma_next, state.memory, sigma), Info(
            estimate, jnp.asarray(2)
        )


@dataclass(frozen=True)
class DPM(Rule):
    """DPM-Solver++(2M): the flow in `lambda = -log sigma`, exact in its linear part, two-step in the estimate."""

    stochastic = False

    def step(
        self, key: Array, state: State, sigma_next: Array, denoiser: Denoiser, condition: Condition
    ) -> tuple[State, Info]:
        """One step; the key is not used."""
        v, sigma, before, sigma_before = state
        estimate = denoiser(v, sigma, condition)
        h, h_before = jnp.log(sigma / sigma_next), jnp.log(sigma_before / sigma)
        # First order on the first step, and on one to level 0, where h is infinite.
        first = jnp.isinf(sigma_before) | (sigma_next == 0)
        weight = jnp.where(first, 0.0, 0.5 * h / jnp.where(first, 1.0, h_before))
        ahead = estimate + jnp.where(first, 0.0, weight) * (estimate - before)
        v = (sigma_next / sigma) * v + (1.0 - sigma_next / sigma) * ahead
        return State(v, sigma_next, estimate, sigma), Info(estimate, jnp.asarray(1))


@dataclass(frozen=True)
class EulerMaruyama(Rule):
    """The reverse SDE `dv = (D - v) / sigma^2 dt + dB` in time `t = sigma^2`, run downwards."""

    stochastic = True

    def step(
        self, key: Array, state: State, sigma_next: Array, denoiser: Denoiser, condition: Condition
    ) -> tuple[State, Info]:
        """One step."""
        v, sigma = state.v, state.sigma
        estimate = denoiser(v, sigma, condition)
        dt = jnp.square(sigma) - jnp.square(sigma_next)
        noise = jax.random.normal(key, v.shape, v.dtype)
        v = v + dt / jnp.square(sigma) * (estimate - v) + jnp.sqrt(dt) * noise
        return State(v, sigma_next, state.memory, sigma), Info(estimate, jnp.asarray(1))


class Transition(NamedTuple):
    """The law `N(mean, vectors diag(variance) vectors^T)` of one ancestral step."""

    mean: Array  # (D,)
    variance: Array  # (D,) by eigenvector of S


def ancestral_transition(
    v: Array, sigma: Array, sigma_next: Array, estimate: Array, condition: Condition
) -> Transition:
    """Law of `v_s` given `v_t`, `t = sigma^2`, `s = sigma_next^2`, from the estimate `D(v_t)` (D,).

    The mean `v_t + (1 - s/t) (D - v_t)` is exact for any law. The variance is `s (t - s) / t` plus
    `(1 - s/t)^2 Var(v_0 | v_t)`, with the program's `S t / (S + t)` for the last: together `(S + s)(t - s) / (S + t)`.
    """
    t, s = jnp.square(sigma), jnp.square(sigma_next)
    variance = (condition.values + s) * (t - s) / (condition.values + t)
    return Transition(v + (1.0 - s / t) * (estimate - v), variance)


@dataclass(frozen=True)
class Ancestral(Rule):
    """Draws of `v_s` given `v_t`; see `ancestral_transition`."""

    stochastic = True

    def step(
        self, key: Array, state: State, sigma_next: Array, denoiser: Denoiser, condition: Condition
    ) -> tuple[State, Info]:
        """One step."""
        estimate = denoiser(state.v, state.sigma, condition)
        mean, variance = ancestral_transition(state.v, state.sigma, sigma_next, estimate, condition)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        v = mean + condition.vectors @ (root(variance) * noise)
        return State(v, sigma_next, state.memory, state.sigma), Info(estimate, jnp.asarray(1))


Grid = Callable[
    [Array, Array, int, Array], Array
]  # (sigma_max, sigma, num_steps, S (D,)) -> levels (num_steps + 1,)


def asinh_grid(sigma_max: Array, sigma: Array, num_steps: int, values: Array) -> Array:
    """Levels even in `asinh(sigma / w)`, w a fifth of the largest sd: in equal ratios above w, even steps below.

    May end at 0 without a smallest level before it. For rules that solve the program's part exactly.
    """
    bend = 0.2 * root(values.max()) + 1e-6 * sigma_max  # the last keeps a point mass finite
    high, low = jnp.arcsinh(sigma_max / bend), jnp.arcsinh(sigma / bend)
    grid = bend * jnp.sinh(high + jnp.linspace(0.0, 1.0, num_steps + 1, dtype=values.dtype) * (low - high))
    return grid.at[0].set(sigma_max).at[-1].set(sigma)


def rho_grid(sigma_max: Array, sigma: Array, num_steps: int, values: Array, rho: float = 7.0) -> Array:
    """Levels even in `sigma^(1/rho)` (Karras et al. 2022, equation 5); see `_to_floor` for small `sigma`."""
    return _to_floor(lambda x: x ** (1 / rho), lambda x: x**rho, sigma_max, sigma, num_steps, values)


def log_grid(sigma_max: Array, sigma: Array, num_steps: int, values: Array) -> Array:
    """Levels in equal ratios; see `_to_floor` for small `sigma`."""
    return _to_floor(jnp.log, jnp.exp, sigma_max, sigma, num_steps, values)


def _to_floor(
    warp: Callable[[Array], Array],
    unwarp: Callable[[Array], Array],
    sigma_max: Array,
    sigma: Array,
    num_steps: int,
    values: Array,
) -> Array:
    """Levels even in `warp(sigma)`; a `sigma` below 1/50 of the smallest sd is reached from there in one last step.

    Smaller levels change a draw by less than 2e-4 of its sd. Variances below 1e-4 of the largest do not count.
    """
    floor = 0.02 * root(jnp.maximum(values.min(), 1e-4 * values.max())) + 1e-6 * sigma_max
    floor = jnp.minimum(floor, 0.5 * sigma_max)  # a start that is itself a small level
    low, high = warp(jnp.maximum(floor, sigma)), warp(sigma_max)
    steps_to_low = jnp.where(sigma < floor, max(num_steps - 1, 1), num_steps)
    share = jnp.minimum(jnp.arange(num_steps + 1) / steps_to_low, 1.0).astype(values.dtype)
    # The ends exactly: rounding must not step past a level.
    return unwarp(high + share * (low - high)).at[0].set(sigma_max).at[-1].set(sigma)


def terminal(key: Array, denoiser: Denoiser, condition: Condition, sigma_max: Array) -> Array:
    """A start (D,) at level `sigma_max`: a draw of the program's law plus the noise of the denoiser's process."""
    key_law, key_noise = jax.random.split(key)
    shape, dtype = condition.mean.shape, condition.mean.dtype
    v = colour(jax.random.normal(key_law, shape, dtype), jnp.zeros((), dtype), condition)
    return v + sigma_max * process_of(denoiser).noise(key_noise, shape, dtype)


def trajectory(
    key: Array, denoiser: Denoiser, condition: Condition, start: Array, grid: Array, rule: Rule
) -> tuple[State, tuple[Array, Info]]:
    """Run `rule` from `start` (D,) at `grid[0]` down the levels `grid` (T + 1,).

    Returns:
        the last state, and stacked over the T steps the points after each (T, D) and what it told.

    Raises:
        ValueError: if the rule adds Gaussian noise and the denoiser removes another.
    """
    if rule.stochastic:
        process_of(denoiser).require_likelihood(f"the stochastic rule {rule}")
    grid = jnp.asarray(grid, start.dtype)

    def body(state: State, inputs: tuple[Array, Array]) -> tuple[State, tuple[Array, Info]]:
        key, sigma_next = inputs
        state, info = rule.step(key, state, sigma_next, denoiser, condition)
        return state, (state.v, info)

    keys = jax.random.split(key, len(grid) - 1)
    return jax.lax.scan(body, rule.init(start, grid[0]), (keys, grid[1:]))


def sample(
    key: Array, denoiser: Denoiser, condition: Condition, start: Array, grid: Array, rule: Rule
) -> Array:
    """The point (D,) at which `rule` arrives from `start` (D,) by the levels `grid` (T + 1,)."""
    return trajectory(key, denoiser, condition, start, grid, rule)[0].v


@dataclass(frozen=True)
class Sampler:
    """A rule, a number of steps and a grid: `sampler(key, denoiser, condition, sigma) -> v` (D,).

    Hashable by value: equal samplers share compiled code.
    """

    rule: Rule
    num_steps: int
    grid: Grid = rho_grid

    def __call__(self, key: Array, denoiser: Denoiser, condition: Condition, sigma: ArrayLike) -> Array:
        """A draw (D,) of the law at level `sigma` >= 0, begun at its terminal law."""
        key_start, key_steps = jax.random.split(key)
        levels = self.levels(condition, sigma)
        start = terminal(key_start, denoiser, condition, levels[0])
        return sample(key_steps, denoiser, condition, start, levels, self.rule)

    def levels(self, condition: Condition, sigma: ArrayLike, sigma_max: ArrayLike | None = None) -> Array:
        """The levels (num_steps + 1,) down to `sigma`, from `sigma_max` or else the terminal level."""
        sigma = jnp.asarray(sigma, condition.mean.dtype)
        top = (
            terminal_level(condition.values, sigma)
            if sigma_max is None
            else jnp.asarray(sigma_max, sigma.dtype)
        )
        return self.grid(top, sigma, self.num_steps, condition.values)


split_sampler = Sampler(Split(), 16, asinh_grid)
heun_sampler = Sampler(Heun(), 32)
churn_sampler = Sampler(Heun(churn=0.5), 64)
dpm_sampler = Sampler(DPM(), 32)
euler_maruyama_sampler = Sampler(EulerMaruyama(), 200)
ancestral_sampler = Sampler(Ancestral(), 64, asinh_grid)
