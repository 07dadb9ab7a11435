"""Forward processes of the diffusion over populations: how a population is noised, and which noise cells make.

A point is `v` (D,), a population's mean embedding in signal-ordered coordinates, where the embedding of one cell
has covariance about `I`. Every process is indexed by `sigma`, the standard deviation of the noise of an embedding in
the units of `v`, and is written as in Karras et al. 2022 (table 1), `x = scale(sigma) (v + sigma noise)`:

- variance exploding, `dv = dB` at time `sigma^2`: what one would see with `n = 1 / sigma^2` cells;
- variance preserving (Song et al. 2021): the same process seen in other units and on another clock;
- heavy tailed, the kernel of PFGM++ (Xu et al. 2023) with finite augmented dimension: a multivariate Student t. It
  is not sampling noise, so that it has neither cell counts nor a likelihood here.

A denoiser takes unscaled points, `x / scale(sigma)`, whatever the process.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

TERMINAL_RATIO = (
    40.0  # sigma_max over the largest sd of the law: a mean that is off by one sd moves draws by 1/40 sd
)


@dataclass(frozen=True)
class VarianceExploding:
    """`x = v + sigma eps`: Brownian motion, the noise of a mean over 1 / sigma^2 cells."""

    has_likelihood: ClassVar[bool] = True

    def scale(self, sigma: ArrayLike) -> Array:
        """1: points keep their units."""
        return jnp.ones_like(jnp.asarray(sigma))

    def noise(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """Noise of unit level; `shape` ends in D."""
        return jax.random.normal(key, shape, dtype)

    def perturb(self, key: Array, v: Array, sigma: Array) -> Array:
        """Noise points `v` (..., D) to the levels `sigma` (...)."""
        sigma = jnp.asarray(sigma, v.dtype)
        return self.scale(sigma)[..., None] * (v + sigma[..., None] * self.noise(key, v.shape, v.dtype))

    def require_likelihood(self, what: str) -> None:
        """Pass: this noise is that of a mean of cells."""


@dataclass(frozen=True)
class VariancePreserving(VarianceExploding):
    """`x = (v + sigma eps) / sqrt(1 + sigma^2)`, the Ornstein-Uhlenbeck process `dx = -beta x dt / 2 + sqrt(beta) dB`.

    `beta` grows linearly from `beta_start` to `beta_end` over the times 0 to 1 (Song et al. 2021, equation 32).
    """

    beta_start: float = 0.1
    beta_end: float = 20.0

    def scale(self, sigma: ArrayLike) -> Array:
        """1 / sqrt(1 + sigma^2)."""
        return jax.lax.rsqrt(1.0 + jnp.square(jnp.asarray(sigma)))

    def sigma(self, time: ArrayLike) -> Array:
        """Level at times in [0, 1]: `sigma^2 = exp(integral of beta) - 1`."""
        time = jnp.asarray(time)
        return jnp.sqrt(jnp.expm1(time * (self.beta_start + 0.5 * time * (self.beta_end - self.beta_start))))


@dataclass(frozen=True)
class HeavyTailed(VarianceExploding):
    """The kernel of PFGM++ with finite D: `x = v + sigma eps sqrt(D / chi^2_D)`, one `chi^2` per point.

    Its density is proportional to `(|x - v|^2 + D sigma^2)^(-(N + D) / 2)` in N dimensions, that of Xu et al. 2023
    (equation 4) with `r = sigma sqrt(D)`; as D grows it becomes the Gaussian one. For unconditional sampling only.
    """

    augmented_dimension: int  # D of the paper
    has_likelihood: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse an augmented dimension that no kernel has."""
        if self.augmented_dimension < 1:
            raise ValueError(f"augmented_dimension must be at least 1; given {self.augmented_dimension}")

    def noise(self, key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
        """Student-t noise of unit scale; the coordinates of one point share their chi^2."""
        key_direction, key_radius = jax.random.split(key)
        half = 0.5 * self.augmented_dimension
        chi2_over_d = jax.random.gamma(key_radius, half, shape[:-1], dtype) / half
        return jax.random.normal(key_direction, shape, dtype) * jax.lax.rsqrt(chi2_over_d)[..., None]

    def require_likelihood(self, what: str) -> None:
        """Raise.

        Raises:
            ValueError: always, naming `what` was asked for.
        """
        raise ValueError(
            f"{what} needs noise like that of a mean over cells; HeavyTailed(augmented_dimension="
            f"{self.augmented_dimension}) is offered for unconditional sampling only: use a denoiser trained with "
            "VarianceExploding()"
        )


ForwardProcess = VarianceExploding  # the interface; the other processes extend it


def process_of(denoiser: object) -> ForwardProcess:
    """The process whose noise `denoiser` removes: its `process`, or the variance-exploding one."""
    return getattr(denoiser, "process", VarianceExploding())


def terminal_level(values: Array, sigma: ArrayLike = 0.0) -> Array:
    """Level `sigma_max` above `sigma` where nothing is left of a law but its mean.

    `sigma_max^2 = sigma^2 + (TERMINAL_RATIO)^2 max(values)`, a scalar; `values` (D,) are the law's variances.
    """
    tiny = jnp.finfo(values.dtype).tiny ** 0.5  # a point mass has no scale; grids need sigma_max > sigma
    sigma = jnp.asarray(sigma, values.dtype)
    return jnp.sqrt(jnp.square(sigma) + TERMINAL_RATIO**2 * jnp.max(values) + tiny)


def cells(sigma: ArrayLike, process: ForwardProcess = VarianceExploding()) -> Array:
    """Number of cells of within-population covariance I whose mean has noise `sigma`: 1 / sigma^2.

    Raises:
        ValueError: if the noise of `process` is not that of a mean.
    """
    process.require_likelihood("a cell count")
    return 1.0 / jnp.square(jnp.asarray(sigma))


def level(n_cells: ArrayLike, within: Array, process: ForwardProcess = VarianceExploding()) -> Array:
    """Smallest level at which a population can enter: `sqrt(lambda_max(W) / n)`.

    Args:
        n_cells: (...) cells of each population.
        within: (..., D, D) covariance W of one cell in coordinates.
        process: the forward process.

    Raises:
        ValueError: if the noise of `process` is not that of a mean.
    """
    process.require_likelihood("a start at a cell count")
    return jnp.sqrt(jnp.linalg.eigvalsh(within)[..., -1] / jnp.asarray(n_cells))


def top_up(key: Array, v_hat: Array, noise: Array, sigma: ArrayLike) -> Array:
    """Bring one observed point to a common level by adding `N(0, sigma^2 I - noise)`.

    Args:
        key: random key.
        v_hat: (D,) observed mean embedding.
        noise: (D, D) its noise covariance, W / n.
        sigma: level, at least `level(n, W)`; below it the missing variances count as zero.
    """
    values, vectors = jnp.linalg.eigh(noise)
    missing = jnp.clip(jnp.square(jnp.asarray(sigma, v_hat.dtype)) - values, 0.0)
    return v_hat + vectors @ (jnp.sqrt(missing) * jax.random.normal(key, v_hat.shape, v_hat.dtype))
