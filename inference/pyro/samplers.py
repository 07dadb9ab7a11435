"""Samplers of the flow in torch: rules, grids and terminal law of `hilbertcell.inference.samplers`.

A rule is a function `(state, sigma_next, denoiser, condition) -> state`; from the same start and levels it visits the points
that its namesake visits in JAX (`tests/inference/pyro/test_samplers.py`). Points are (..., D), levels (...); nothing
depends on a value, so that `torch.compile(sample, fullgraph=True)` takes denoiser and steps as one graph. Rules of the reverse
SDE have no twin here.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hilbertcell.models.pyro.denoisers import (
    Condition,
    Denoiser,
    angle,
    colour,
    ratio,
    residual,
    root,
    whiten,
)

TERMINAL_RATIO = 40.0  # sigma_max over the largest sd of the law


class State(NamedTuple):
    """Where a sampler stands."""

    v: Tensor  # (..., D) the noisy point
    sigma: Tensor  # (...) its level
    memory: Tensor  # (..., D) what a two-step rule keeps of the step before
    memory_sigma: Tensor  # (...) level of the step before; infinite before the first step


Rule = Callable[[State, Tensor, Denoiser, Condition], State]
Grid = Callable[
    [Tensor, Tensor, int, Tensor], Tensor
]  # (sigma_max, sigma, num_steps, S) -> levels (num_steps + 1, ...)


def split(state: State, sigma_next: Tensor, denoiser: Denoiser, condition: Condition) -> State:
    """The flow in whitened points, `dz = -F dtheta`: exact for the program, Adams-Bashforth of order 2 for F."""
    v, sigma, before, sigma_before = state
    now, following = angle(condition.values, sigma), angle(condition.values, sigma_next)
    earlier = angle(condition.values, sigma_before)
    f = residual(denoiser(v, sigma, condition), v, sigma, condition)
    # Before the first step sigma is infinite: no history, a plain Euler step. The clock runs down.
    weight = torch.where(
        torch.isinf(sigma_before)[..., None], 0.0, 0.5 * ratio(now - following, earlier - now)
    )
    slope = f + weight * (f - before)
    z = whiten(v, sigma, condition) - (following - now) * slope
    return State(colour(z, sigma_next, condition), sigma_next, f, sigma)


def heun(state: State, sigma_next: Tensor, denoiser: Denoiser, condition: Condition) -> State:
    """Karras et al. 2022, algorithm 1: Heun's method for the flow, `dv / dsigma = (v - D) / sigma`."""
    v, sigma = state.v, state.sigma
    step, low = (sigma_next - sigma)[..., None], sigma_next[..., None]
    slope = (v - denoiser(v, sigma, condition)) / sigma[..., None]  # 4
    euler = v + step * slope  # 5
    again = ratio(euler - denoiser(euler, sigma_next, condition), low)  # 7
    # At level 0 the slope is not defined: the last step is Euler's (line 6).
    v = torch.where(low > 0, v + step * 0.5 * (slope + again), euler)  # 8
    return State(v, sigma_next, state.memory, sigma)


def dpm(state: State, sigma_next: Tensor, denoiser: Denoiser, condition: Condition) -> State:
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): exact in the linear part, two-step in the estimate."""
    v, sigma, before, sigma_before = state
    estimate = denoiser(v, sigma, condition)
    # First order on the first step, and on one to level 0, where h is infinite.
    first = torch.isinf(sigma_before) | (sigma_next == 0)
    h = torch.log(sigma / torch.where(first, sigma, sigma_next))
    h_before = torch.log(torch.where(first, 2.0 * sigma, sigma_before) / sigma)
    ahead = estimate + (0.5 * h / h_before)[..., None] * (estimate - before)
    share = (sigma_next / sigma)[..., None]
    return State(share * v + (1.0 - share) * ahead, sigma_next, estimate, sigma)


def asinh_grid(sigma_max: Tensor, sigma: Tensor, num_steps: int, values: Tensor) -> Tensor:
    """Levels even in `asinh(sigma / w)`, w a fifth of the largest sd: in equal ratios above w, even steps below."""
    bend = 0.2 * root(values.amax(-1)) + 1e-6 * sigma_max  # the last keeps a point mass finite
    high, low = torch.asinh(sigma_max / bend), torch.asinh(sigma / bend)
    share = _leading(torch.arange(num_steps + 1), high) / num_steps
    return _between(sigma_max, bend * torch.sinh(high + share * (low - high)), sigma)


def rho_grid(sigma_max: Tensor, sigma: Tensor, num_steps: int, values: Tensor, rho: float = 7.0) -> Tensor:
    """Levels even in `sigma^(1/rho)` (Karras et al. 2022, equation 5); see `_to_floor` for small `sigma`."""
    return _to_floor(lambda x: x ** (1 / rho), lambda x: x**rho, sigma_max, sigma, num_steps, values)


def log_grid(sigma_max: Tensor, sigma: Tensor, num_steps: int, values: Tensor) -> Tensor:
    """Levels in equal ratios; see `_to_floor` for small `sigma`."""
    return _to_floor(torch.log, torch.exp, sigma_max, sigma, num_steps, values)


def _to_floor(
    warp: Callable[[Tensor], Tensor],
    unwarp: Callable[[Tensor], Tensor],
    sigma_max: Tensor,
    sigma: Tensor,
    num_steps: int,
    values: Tensor,
) -> Tensor:
    """Levels even in `warp(sigma)`; a `sigma` below 1/50 of the smallest sd is reached from there in one last step.

    Variances below 1e-4 of the largest do not count.
    """
    floor = 0.02 * root(torch.maximum(values.amin(-1), 1e-4 * values.amax(-1))) + 1e-6 * sigma_max
    floor = torch.minimum(floor, 0.5 * sigma_max)  # a start that is itself a small level
    low, high = warp(torch.maximum(floor, sigma)), warp(sigma_max)
    steps_to_low = torch.where(sigma < floor, float(max(num_steps - 1, 1)), float(num_steps))
    share = (_leading(torch.arange(num_steps + 1), high) / steps_to_low.to(high.dtype)).clamp(max=1.0)
    return _between(sigma_max, unwarp(high + share * (low - high)), sigma)


def _leading(counts: Tensor, like: Tensor) -> Tensor:
    """Counts (T + 1,) in type and place of `like` (...), with axes of length 1 for its own."""
    return counts.to(like).reshape(-1, *[1] * like.ndim)


def _between(sigma_max: Tensor, levels: Tensor, sigma: Tensor) -> Tensor:
    """The ends exactly: rounding must not step past a level."""
    return torch.cat([sigma_max[None], levels[1:-1], sigma[None]])


def terminal_level(values: Tensor, sigma: Tensor) -> Tensor:
    """Level `sigma_max` (...) above `sigma` (...) where nothing is left of a law with variances (..., D) but its mean."""
    tiny = torch.finfo(values.dtype).tiny ** 0.5  # a point mass has no scale; grids need sigma_max > sigma
    return torch.sqrt(sigma**2 + TERMINAL_RATIO**2 * values.amax(-1) + tiny)


def terminal(
    generator: torch.Generator, condition: Condition, sigma_max: Tensor, sample_shape: tuple[int, ...] = ()
) -> Tensor:
    """Starts `sample_shape + (..., D)` at level `sigma_max` (...): draws of the program's law plus Gaussian noise."""
    mean = condition.mean
    shape = (2, *sample_shape, *mean.shape)
    law, noise = torch.randn(shape, generator=generator, dtype=mean.dtype, device=mean.device)
    return colour(law, torch.zeros_like(sigma_max), condition) + sigma_max[..., None] * noise


def trajectory(denoiser: Denoiser, condition: Condition, start: Tensor, levels: Tensor, rule: Rule) -> Tensor:
    """The points (T, ..., D) after each step of `rule` from `start` (..., D) down the levels (T + 1, ...)."""
    state = State(start, levels[0], torch.zeros_like(start), torch.full_like(levels[0], torch.inf))
    points = []
    for sigma_next in levels[1:]:
        state = rule(state, sigma_next, denoiser, condition)
        points.append(state.v)
    return torch.stack(points)


def sample(denoiser: Denoiser, condition: Condition, start: Tensor, levels: Tensor, rule: Rule) -> Tensor:
    """The points (..., D) at which `rule` arrives from `start` (..., D) by the levels (T + 1, ...)."""
    return trajectory(denoiser, condition, start, levels, rule)[-1]


@dataclass(frozen=True)
class Sampler:
    """A rule, a number of steps and a grid."""

    rule: Rule
    num_steps: int
    grid: Grid = rho_grid

    def __call__(
        self,
        generator: torch.Generator,
        denoiser: Denoiser,
        condition: Condition,
        sigma: Tensor | float = 0.0,
        sample_shape: tuple[int, ...] = (),
    ) -> Tensor:
        """Draws `sample_shape + (..., D)` of the laws at level `sigma` >= 0, begun at their terminal laws.

        Type and device are those of `condition`, on whose device `generator` must be.
        """
        levels = self.levels(condition, sigma)
        start = terminal(generator, condition, levels[0], sample_shape)
        return sample(denoiser, condition, start, levels, self.rule)

    def levels(self, condition: Condition, sigma: Tensor | float = 0.0) -> Tensor:
        """The levels (num_steps + 1, ...) from the terminal one down to `sigma` (...)."""
        values = condition.values
        low = torch.as_tensor(sigma, dtype=values.dtype, device=values.device).expand(values.shape[:-1])
        return self.grid(terminal_level(values, low), low, self.num_steps, values)


split_sampler = Sampler(split, 16, asinh_grid)
heun_sampler = Sampler(heun, 32)
dpm_sampler = Sampler(dpm, 32)
