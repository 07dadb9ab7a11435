"""Prior over the mean responses of conditions: which conditions are expected to respond alike.

A condition is a (context, perturbation, dose). Per feature, the effects of all conditions are jointly Gaussian
with covariance `scale_g^2 sum_m amplitude_m^2 K_m`; each kernel `K_m` is one way to be alike, and an amplitude
near zero switches it off. The main effect of a perturbation is thus integrated out exactly, and a condition
that was never seen follows by Gaussian conditioning (Rasmussen & Williams 2006, eq. 2.23-2.24).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import Array
from jax.scipy.linalg import solve_triangular
from numpyro.distributions import constraints

# Response curves are smooth over about one decade of dose: the usual slope of a Hill curve with coefficient 1.
DOSE_DECADES = 1.0
# Share of a kernel's mean diagonal added for a stable Cholesky factor in float64.
JITTER = 1e-8
_HALF_LOG_2PI = 0.9189385332046727


class Conditions(NamedTuple):
    """Conditions as structure; E conditions, S single perturbations, F features."""

    context: np.ndarray  # (E,) int
    components: np.ndarray  # (E, S) 0/1, the single perturbations of a combination
    dose: np.ndarray  # (E,) positive, or nan where there is none
    features: np.ndarray | None  # (E, F) perturbation features summed over components, standardised, or None


def similarity_kernels(conditions: Conditions) -> dict[str, np.ndarray]:
    """Kernels (E, E) by which conditions resemble one another; only those that the conditions can tell apart.

    `perturbation`: shared components, in any context. `context`: same context, any perturbation. `interaction`:
    shared components in the same context. `combination`: the same set of several components (departure from
    additivity), and `combination in context` what of it belongs to one context.
    `features`: linear in the perturbation features. `dose`: shared components at nearby doses.
    """
    context = conditions.context[:, None] == conditions.context[None, :]
    shared = (conditions.components @ conditions.components.T).astype(float)
    same = (conditions.components[:, None, :] == conditions.components[None, :, :]).all(-1)
    several_contexts = not context.all()
    several_perturbations = not same.all()
    kernels = {"perturbation": shared}
    if several_contexts:
        kernels["interaction"] = shared * context
    if several_contexts and several_perturbations:
        kernels["context"] = context.astype(float)
    if conditions.components.sum(1).max() > 1:
        several = conditions.components.sum(1) > 1
        kernels["combination"] = (same & several).astype(float)
        if several_contexts:
            kernels["combination in context"] = (same & several & context).astype(float)
    if conditions.features is not None:
        kernels["features"] = conditions.features @ conditions.features.T / conditions.features.shape[1]
    log_dose = np.log10(conditions.dose)
    if len(np.unique(log_dose[np.isfinite(log_dose)])) > 1:
        distance = np.nan_to_num(log_dose[:, None] - log_dose[None, :]) / DOSE_DECADES
        near = np.exp(-0.5 * distance**2)
        kernels["dose"] = shared * near
        if several_contexts:
            kernels["interaction"] = shared * context * near
    return kernels


def kernel_cholesky(kernels: Array, amplitudes: Array) -> Array:
    """Lower Cholesky factor (E, E) of `sum_m amplitudes_m^2 kernels_m`; kernels (M, E, E), amplitudes (M,)."""
    kernel = jnp.tensordot(amplitudes**2, kernels, 1)
    jitter = JITTER * jnp.trace(kernel) / kernel.shape[0]
    return jnp.linalg.cholesky(kernel + jitter * jnp.eye(kernel.shape[0], dtype=kernel.dtype))


class ConditionEffects(dist.Distribution):
    """Effects of one feature on all conditions, N(0, scale^2 chol chol^T); batch (D,), event (E,).

    A multivariate normal whose Cholesky factor is common to all features up to `scale`: one triangular system
    serves them all.
    """

    support = constraints.real_vector
    pytree_data_fields = ("scale", "chol")

    def __init__(self, scale: Array, chol: Array) -> None:
        """`scale` (D,) and `chol` (E, E) lower triangular."""
        self.scale, self.chol = scale, chol
        super().__init__(scale.shape, chol.shape[:1])

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw (*sample_shape, D, E)."""
        white = jax.random.normal(key, (*sample_shape, *self.batch_shape, *self.event_shape), self.chol.dtype)
        return self.scale[:, None] * (white @ self.chol.T)

    def log_prob(self, value: Array) -> Array:
        """Log density (..., D)."""
        flat = jnp.moveaxis(value, -1, 0).reshape(self.event_shape[0], -1)
        white = solve_triangular(self.chol, flat, lower=True).reshape(self.event_shape + value.shape[:-1])
        log_volume = jnp.log(jnp.diagonal(self.chol)).sum() + self.event_shape[0] * (
            jnp.log(self.scale) + _HALF_LOG_2PI
        )
        return -0.5 * ((white / self.scale) ** 2).sum(axis=0) - log_volume


def extend_effects(
    kernels: Array, amplitudes: Array, scale: Array, effect: Array, known: np.ndarray, noise: Array
) -> Array:
    """Effects (E, D) of all conditions given those of the known ones; unknown ones are drawn.

    Args:
        kernels: (M, E, E) over all conditions.
        amplitudes: (M,).
        scale: (D,) feature scale of the effects.
        effect: (len(known), D) effects of the known conditions, in the order of `known`.
        known: indices of the known conditions among the E.
        noise: (E - len(known), D) standard normal, what is drawn for the unknown ones in ascending order.
    """
    num_conditions = kernels.shape[1]
    unknown = np.setdiff1d(np.arange(num_conditions), known)
    if len(unknown) == 0:
        return jnp.zeros((num_conditions, effect.shape[1]), effect.dtype).at[known].set(effect)
    order = np.concatenate([known, unknown])
    chol = kernel_cholesky(kernels[:, order][:, :, order], amplitudes)
    num_known = len(known)
    white = solve_triangular(chol[:num_known, :num_known], effect, lower=True)
    drawn = chol[num_known:, :num_known] @ white + scale * (chol[num_known:, num_known:] @ noise)
    return (
        jnp.zeros((num_conditions, effect.shape[1]), effect.dtype)
        .at[order]
        .set(jnp.concatenate([effect, drawn]))
    )
