"""Noise schedules and the forward process of the set diffusion, on the host in float64.

With `beta_t` the variance added at step t = 0..T-1 and `alpha_bar_t = prod_{s <= t} (1 - beta_s)`,

    X_t = sqrt(alpha_bar_t) X_0 + sqrt(1 - alpha_bar_t) E,      E ~ N(0, 1) per entry

(Ho, Jain & Abbeel 2020, equation 4). Every cell of a set carries the same t and its own noise: nothing random is
shared by the cells of a population.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_MAX_BETA = (
    0.999  # a cosine schedule ends at signal zero, where beta would be 1 and its log-variance infinite
)
_COSINE_OFFSET = 0.008  # keeps the first beta of a cosine schedule away from zero


@dataclass(frozen=True, eq=False)
class Schedule:
    """A discrete diffusion given by its step variances; every array has shape (T,), float64."""

    betas: NDArray[np.float64]

    def __post_init__(self) -> None:
        """Refuse step variances that no diffusion has."""
        betas = self.betas
        if betas.ndim != 1 or betas.dtype != np.float64 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError(
                f"betas must be float64, one-dimensional and in (0, 1]; given {betas.dtype} of shape "
                f"{betas.shape} in [{betas.min():g}, {betas.max():g}]"
            )

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.betas)

    @cached_property
    def alphas_cumprod(self) -> NDArray[np.float64]:
        """alpha_bar_t, the share of signal variance left after step t."""
        return np.cumprod(1.0 - self.betas)

    @cached_property
    def alphas_cumprod_prev(self) -> NDArray[np.float64]:
        """alpha_bar_{t-1}, with 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> NDArray[np.float64]:
        """alpha_bar_{t+1}, with 0 after the last step."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> NDArray[np.float64]:
        """1 / sqrt(alpha_bar_t)."""
        return np.sqrt(1.0 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> NDArray[np.float64]:
        """sqrt(1 / alpha_bar_t - 1), the noise-to-signal ratio."""
        return np.sqrt(1.0 / self.alphas_cumprod - 1.0)

    @cached_property
    def posterior_variance(self) -> NDArray[np.float64]:
        """Variance of X_{t-1} given X_t and X_0; zero at t = 0."""
        return self.betas * (1.0 - self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_log_variance_clipped(self) -> NDArray[np.float64]:
        """Log of `posterior_variance`, its zero at t = 0 replaced by the entry of t = 1."""
        return np.log(np.append(self.posterior_variance[1], self.posterior_variance[1:]))

    @cached_property
    def posterior_mean_coef1(self) -> NDArray[np.float64]:
        """Weight of X_0 in the mean of X_{t-1} given X_t and X_0 (equation 7)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / (1.0 - self.alphas_cumprod)

    @cached_property
    def posterior_mean_coef2(self) -> NDArray[np.float64]:
        """Weight of X_t in that mean."""
        return (1.0 - self.alphas_cumprod_prev) * np.sqrt(1.0 - self.betas) / (1.0 - self.alphas_cumprod)

    @cached_property
    def fixed_large_log_variance(self) -> NDArray[np.float64]:
        """Log of the ancestral sampler's variance: beta_t, its first entry the posterior variance of t = 1."""
        return np.log(np.append(self.posterior_variance[1], self.betas[1:]))


def linear_schedule(num_steps: int = 1000) -> Schedule:
    """Step variances evenly spaced from 0.1/T to 20/T, both included; the published schedule at T = 1000."""
    return Schedule(np.linspace(0.1 / num_steps, 20.0 / num_steps, num_steps))


def cosine_schedule(num_steps: int = 1000) -> Schedule:
    """Signal variance cos^2(pi/2 (s + 0.008) / 1.008) at s = t/T (Nichol & Dhariwal 2021, equation 17)."""
    return _from_signal(_cosine_signal, num_steps)


def power_cosine_schedule(num_steps: int = 1000) -> Schedule:
    """The cosine signal variance raised to the power 0.3: noise arrives later."""
    return _from_signal(lambda s: _cosine_signal(s) ** 0.3, num_steps)


def _cosine_signal(s: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.cos(0.5 * np.pi * (s + _COSINE_OFFSET) / (1.0 + _COSINE_OFFSET)) ** 2


def _from_signal(signal: Callable[[NDArray[np.float64]], NDArray[np.float64]], num_steps: int) -> Schedule:
    """Step variances whose products follow `signal` on [0, 1]."""
    edges = np.arange(num_steps + 1) / num_steps
    return Schedule(np.minimum(1.0 - signal(edges[1:]) / signal(edges[:-1]), _MAX_BETA))


def diffuse(x0: NDArray, noise: NDArray, t: NDArray[np.integer], schedule: Schedule) -> NDArray:
    """The forward process at given noise.

    The two coefficients are rounded to float32, as published; the arithmetic is that of the inputs' types, so
    float32 cells and float64 noise give the published float64 states bit for bit.

    Args:
        x0: (B, S, G) clean cells, model units.
        noise: (B, S, G) standard Gaussian noise.
        t: (B,) step of each set, 0..T-1.
        schedule: the noise schedule.

    Returns:
        (B, S, G) noised cells X_t.
    """
    signal, spread = forward_coefficients(schedule)
    return signal[t][:, None, None] * x0 + spread[t][:, None, None] * noise


def forward_coefficients(schedule: Schedule) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """sqrt(alpha_bar) and sqrt(1 - alpha_bar), each (T,) float32: what training gathers at its random steps."""
    alpha_bar = schedule.alphas_cumprod
    return np.sqrt(alpha_bar).astype(np.float32), np.sqrt(1.0 - alpha_bar).astype(np.float32)
