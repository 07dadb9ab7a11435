"""Gaussian mixtures: laws of populations that are not Gaussian, with everything about them in closed form."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.scipy.special import logsumexp
from jax.scipy.stats import norm
from jax.typing import ArrayLike

from hilbertcell.models.denoisers import Condition


class MixtureDenoiser(eqx.Module):
    """The exact denoiser of `sum_k weights_k N(means_k, V_k diag(values_k) V_k^T)`; K components in D dimensions."""

    weights: Array  # (K,)
    means: Array  # (K, D)
    vectors: Array  # (K, D, D)
    values: Array  # (K, D)

    def __call__(self, v: Array, sigma: Array, condition: Condition) -> Array:
        """Posterior mean (D,); the law does not depend on the condition."""
        rotated = self._rotate(v)
        shrunk = self.means + jnp.einsum(
            "kij,kj->ki", self.vectors, self.values / (self.values + sigma**2) * rotated
        )
        return jax.nn.softmax(self._logits(rotated, sigma)) @ shrunk

    def _rotate(self, v: Array) -> Array:
        return jnp.einsum("kij,ki->kj", self.vectors, v - self.means)

    def _logits(self, rotated: Array, sigma: Array | float) -> Array:
        return jnp.log(self.weights) + norm.logpdf(rotated, scale=jnp.sqrt(self.values + sigma**2)).sum(-1)

    def log_density(self, v: Array, sigma: Array | float = 0.0) -> Array:
        """Log density () at `v` (D,) of the law at level `sigma`."""
        return logsumexp(self._logits(self._rotate(v), sigma))

    @property
    def covariances(self) -> Array:
        """(K, D, D)."""
        return jnp.einsum("kij,kj,klj->kil", self.vectors, self.values, self.vectors)

    def draws(self, seed: int, num_draws: int, sigma: float = 0.0) -> np.ndarray:
        """Draws (num_draws, D) of the law at level `sigma`."""
        rng = np.random.default_rng(seed)
        label = rng.choice(len(self.weights), num_draws, p=np.asarray(self.weights))
        total = np.asarray(self.covariances) + sigma**2 * np.eye(self.means.shape[1])
        white = rng.standard_normal((num_draws, self.means.shape[1]))
        return np.asarray(self.means)[label] + np.einsum(
            "nij,nj->ni", np.linalg.cholesky(total)[label], white
        )

    def condition(self, inflate: float = 1.0) -> Condition:
        """The program with the law's own mean and covariance, the latter times `inflate`."""
        mean = self.weights @ self.means
        centred = self.means - mean
        spread = jnp.einsum("k,kij->ij", self.weights, self.covariances)
        spread = spread + jnp.einsum("k,ki,kj->ij", self.weights, centred, centred)
        values, vectors = jnp.linalg.eigh(spread)
        return Condition(mean, vectors, inflate * values, jnp.zeros(0))

    def cdf(self, value: Array, coordinate: int = 0, sigma: float = 0.0) -> Array:
        """Distribution function of one coordinate at the points `value` (...)."""
        sd = jnp.sqrt(self.covariances[:, coordinate, coordinate] + sigma**2)
        return norm.cdf((jnp.asarray(value)[..., None] - self.means[:, coordinate]) / sd) @ self.weights


def mixture(weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> MixtureDenoiser:
    """A mixture from weights (K,), means (K, D) and covariances (K, D, D)."""
    values, vectors = jnp.linalg.eigh(jnp.asarray(covariances))
    return MixtureDenoiser(jnp.asarray(weights), jnp.asarray(means), vectors, values)


def skewed(offset: float = 0.0) -> MixtureDenoiser:
    """One dimension, a long right tail."""
    return mixture([0.7, 0.3], [[offset], [offset + 1.2]], [[[0.09]], [[0.64]]])


def bimodal() -> MixtureDenoiser:
    """Two dimensions, two modes, unequal and tilted: a third of the donors do not respond."""
    covariances = [[[0.20, 0.08], [0.08, 0.10]], [[0.10, -0.02], [-0.02, 0.05]]]
    return mixture([0.65, 0.35], [[1.0, 0.5], [-1.2, -0.3]], covariances)
