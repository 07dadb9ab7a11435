"""Score matching on noisy points: populations are seen through the sampling noise of their cells, and it is not learned.

Population j is observed as `v_hat_j ~ N(v_j, W_j / n_j)`; noise `N(0, sigma_j^2 I - W_j / n_j)` added afresh each time
makes it a point of the forward process at its own level `sigma_j^2 = lambda_max(W_j) / n_j`. Only levels above that
are used, `v_sigma = v_hat_j + sqrt(sigma^2 - sigma_j^2) eps`, and the loss (mathematics, section 4)

    || [(sigma^2 - sigma_j^2) D(v_sigma) + sigma_j^2 v_sigma] / sigma^2 - v_hat_j ||^2                              (1)

asks for the posterior mean of the *noisy* point, which a denoiser D of the *latent* law gives: a score matching that took
v_hat_j for clean would return a law whose covariance is too large by the noise. Levels are even in log sigma, the loss is
divided by sigma^2: the likelihood's weighting times `(1 - sigma_j^2 / sigma^2)^2`, which is bounded.

The same residual gives the term of population j in the ELBO that a guide and a network share,

    log p_G(v_hat_j) - 1/2 Int_{sigma_j^2}^{sigma_max^2} E[ ||s_D - k||^2 - ||s_G - k||^2 ] dt,                     (2)

`k = (v_hat_j - v_t) / (t - sigma_j^2)`, `s = (D(v_t) - v_t) / t`, `s - k` = residual of (1) / (t - sigma_j^2); exact
where D = G.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.models.denoisers import Condition, Denoiser, gaussian_denoiser
from hilbertcell.models.forward_processes import terminal_level

# The added noise must have a covariance that is positive in spite of rounding.
_LEVEL_MARGIN = 1.0 + 1e-6


class NoisyPoints(NamedTuple):
    """P populations as points of the forward process."""

    observed: Array  # (P, Q) v_hat
    level: Array  # (P,) sigma_j
    root: Array  # (P, Q, Q) root root^T = sigma_j^2 I - W_j / n_j

    def draw(self, key: Array) -> Array:
        """One point (Q,) at its level; for a single population (no leading axis)."""
        return self.observed + self.root @ jax.random.normal(key, self.observed.shape, self.observed.dtype)


class Conditions(NamedTuple):
    """What R draws of the program hold of P populations; the bases are shared by populations of one context."""

    mean: Array  # (R, P, Q)
    vectors: Array  # (R, C, Q, Q)
    values: Array  # (R, C, Q) for unit strength
    strength: Array  # (R, P)
    context: Array  # (P,)
    features: Array  # (R, P, F)

    def at(self, draw: Array, population: Array) -> Condition:
        """The condition of one population under one draw."""
        context = self.context[population]
        return Condition(
            self.mean[draw, population],
            self.vectors[draw, context],
            self.strength[draw, population] ** 2 * self.values[draw, context],
            self.features[draw, population],
        )


def noisy_points(observed: np.ndarray, within: np.ndarray, n: np.ndarray) -> NoisyPoints:
    """Points from observed coordinates (P, Q), within covariances W_j (P, Q, Q) and numbers of cells (P,)."""
    values, vectors = np.linalg.eigh(within / n[:, None, None])
    level = np.sqrt(_LEVEL_MARGIN * values[:, -1])
    missing = np.maximum(level[:, None] ** 2 - values, 0.0)
    return NoisyPoints(
        jnp.asarray(observed), jnp.asarray(level), jnp.asarray(vectors * np.sqrt(missing)[:, None])
    )


def restoration_error(
    denoiser: Denoiser, point: Array, level: Array, sigma: Array, eps: Array, condition: Condition
) -> Array:
    """The vector (Q,) in (1): posterior mean of the point (Q,) given it at level `sigma` > `level`, less the point."""
    gap = sigma**2 - level**2
    v = point + jnp.sqrt(gap) * eps
    return (gap * denoiser(v, sigma, condition) + level**2 * v) / sigma**2 - point


def deconvolution_loss(
    key: Array, denoiser: Denoiser, points: NoisyPoints, condition: Condition
) -> tuple[Array, Array]:
    """Loss of one population at one level, of the denoiser and of the program's own, with the same noise.

    `points` holds a single population. Their difference has a far smaller variance than either.
    """
    key_point, key_level, key_eps = jax.random.split(key, 3)
    point = points.draw(key_point)
    top = _top(points, condition)
    share = jax.random.uniform(key_level, (), point.dtype)
    sigma = jnp.exp(jnp.log(points.level) + share * jnp.log(top / points.level))
    eps = jax.random.normal(key_eps, point.shape, point.dtype)
    both = [
        jnp.sum(restoration_error(d, point, points.level, sigma, eps, condition) ** 2) / sigma**2
        for d in (denoiser, gaussian_denoiser)
    ]
    return both[0], both[1]


def elbo_correction(
    key: Array, denoiser: Denoiser, points: NoisyPoints, condition: Condition, num_levels: int = 32
) -> Array:
    """The integral in (2) with its sign, for one population: what a denoiser adds to the program's log density.

    Unbiased, and a lower bound in expectation (Song et al. 2021, theorem 1). Levels are stratified in log(t), noise comes
    in pairs of opposite sign: near sigma_j the integrand is of the order of 1 / sqrt(t - sigma_j^2) and odd in it.
    """
    key_point, key_level, key_eps = jax.random.split(key, 3)
    point = points.draw(key_point)
    low, span = 2 * jnp.log(points.level), 2 * jnp.log(_top(points, condition) / points.level)
    shares = jnp.arange(num_levels) + jax.random.uniform(key_level, (num_levels,), point.dtype)
    t = jnp.exp(low + span * shares / num_levels)
    noise = jax.random.normal(key_eps, (num_levels, *point.shape), point.dtype)

    def gain(t: Array, eps: Array) -> Array:
        errors = [
            restoration_error(d, point, points.level, jnp.sqrt(t), eps, condition)
            for d in (denoiser, gaussian_denoiser)
        ]
        # ||a||^2 - ||b||^2 without cancellation
        return jnp.sum((errors[0] - errors[1]) * (errors[0] + errors[1])) / (t - points.level**2) ** 2

    pairs = 0.5 * (jax.vmap(gain)(t, noise) + jax.vmap(gain)(t, -noise))
    return -0.5 * span * jnp.mean(t * pairs)


def elbo_term(
    key: Array, denoiser: Denoiser, points: NoisyPoints, condition: Condition, num_levels: int = 32
) -> Array:
    """(2) for one population: a lower bound on the log density of its noisy point, exact where D = G."""
    key_point, _, _ = jax.random.split(key, 3)  # the point that the correction sees
    deviation = condition.vectors.T @ (points.draw(key_point) - condition.mean)
    variance = condition.values + points.level**2
    gaussian = -0.5 * jnp.sum(deviation**2 / variance + jnp.log(2 * jnp.pi * variance))
    return gaussian + elbo_correction(key, denoiser, points, condition, num_levels)


def _top(points: NoisyPoints, condition: Condition) -> Array:
    """The terminal level of a population: sampling starts there, and no level above it is needed."""
    return terminal_level(condition.values, points.level)


def pick(points: NoisyPoints, population: Array) -> NoisyPoints:
    """The point of one population."""
    return NoisyPoints(*(leaf[population] for leaf in points))


@partial(jax.jit, static_argnames=("num_levels",))
def corrections(
    key: Array, denoiser: Denoiser, points: NoisyPoints, conditions: Conditions, num_levels: int = 32
) -> Array:
    """`elbo_correction` (R, P) of every population under every draw of the program."""
    num_draws, num_points = conditions.mean.shape[:2]

    def one(draw: Array, population: Array) -> Array:
        own = jax.random.fold_in(jax.random.fold_in(key, draw), population)
        return elbo_correction(
            own, denoiser, pick(points, population), conditions.at(draw, population), num_levels
        )

    over_points = jax.vmap(one, (None, 0))
    return jax.lax.map(lambda draw: over_points(draw, jnp.arange(num_points)), jnp.arange(num_draws))
