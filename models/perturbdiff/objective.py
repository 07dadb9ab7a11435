"""The training objective as a deterministic function of a batch and of everything that training draws at random.

    X_t = sqrt(alpha_bar_t) X_0 + sqrt(1 - alpha_bar_t) E
    L   = mean_b MSE(X_0, X^_0) + lambda mean_b E(X_0, X^_0),       X^_0 = f(X_t, X~_0, Y, t, cov)

X~_0 is zero, or the network's own first answer to zero, through which no gradient flows. The energy term sees the
set, the squared error sees index-paired cells.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hilbertcell.models.perturbdiff.covariates import CovariateEncoder
from hilbertcell.models.perturbdiff.denoiser import Denoiser
from hilbertcell.models.perturbdiff.losses import energy_loss, squared_error
from hilbertcell.models.perturbdiff.schedule import Schedule, forward_coefficients


class Batch(NamedTuple):
    """B cell sets with their controls; model units (log1p of normalised counts divided by 10)."""

    x0: Array  # (B, S, G) perturbed cells
    control: Array  # (B, S, G) control cells, index-paired
    perturbation: Array  # (B, S) int ids, or (B, 1) where the cells of a set share them, as the next two
    cell_type: Array
    batch: Array
    source: Array | None = None  # (B,) index into `Denoiser.sources`
    u: Array | None = None  # (B, K) microenvironments, where the denoiser takes them


@dataclass(frozen=True)
class Dropout:
    """Probabilities of leaving an input out; defaults are those of the published recipes from scratch."""

    condition: float = 0.5
    """covariates, all together, replaced by the null class"""
    control: float = 0.0
    """controls replaced by zeros (1 in marginal pretraining)"""
    self_condition: float = 0.5
    """no first estimate"""
    level: Literal["batch", "set"] = "batch"
    """one decision for the whole batch, as published, or one for each set"""


class Draws(NamedTuple):
    """All that one evaluation of the loss draws."""

    t: Array  # (B,) int
    noise: Array  # (B, S, G)
    keep_condition: Array  # (B,) bool
    keep_control: Array  # (B,) bool
    self_condition: Array  # (B,) bool


class LossTerms(NamedTuple):
    """What the loss is made of."""

    squared_error: Array  # (B,)
    energy: Array  # (B,)


def draw(key: Array, shape: tuple[int, int, int], num_train_steps: int, dropout: Dropout) -> Draws:
    """Draw steps (uniform), noise and drops for a batch of `shape` (B, S, G)."""
    keys = jax.random.split(key, 5)
    num_sets = shape[0]
    decisions = 1 if dropout.level == "batch" else num_sets

    def keep(key: Array, drop: float) -> Array:
        return jnp.broadcast_to(jax.random.bernoulli(key, 1.0 - drop, (decisions,)), (num_sets,))

    return Draws(
        t=jax.random.randint(keys[0], (num_sets,), 0, num_train_steps),
        noise=jax.random.normal(keys[1], shape, jnp.float32),
        keep_condition=keep(keys[2], dropout.condition),
        keep_control=keep(keys[3], dropout.control),
        self_condition=keep(keys[4], dropout.self_condition),
    )


def denoising_loss(
    denoiser: Denoiser,
    encoder: CovariateEncoder,
    batch: Batch,
    draws: Draws,
    schedule: Schedule,
    energy_weight: float = 1.0,
    compute_dtype: str = "float32",
) -> tuple[Array, LossTerms]:
    """The loss, a scalar, and its terms per set.

    With `compute_dtype` "bfloat16" the network runs on weights rounded to it; the loss, its gradient in the weights and
    the weights themselves stay as they are.

    A set that is not finite makes the loss not finite; the published mean over sets skips it in silence.
    """
    signal, spread = (jnp.asarray(c)[draws.t][:, None, None] for c in forward_coefficients(schedule))
    x_t = signal * batch.x0 + spread * draws.noise
    control = jnp.where(draws.keep_control[:, None, None], batch.control, 0.0)
    if compute_dtype != "float32":
        denoiser, encoder = rounded((denoiser, encoder), compute_dtype)
    covariates = encoder(batch.perturbation, batch.cell_type, batch.batch)

    def estimate(denoiser: Denoiser, covariates: Array, previous_x0: Array) -> Array:
        options = {"keep": draws.keep_condition, "source": batch.source, "u": batch.u}
        return denoiser(x_t, previous_x0, control, draws.t, covariates, **options).astype(x_t.dtype)

    # The first pass costs nothing where it is not used, and its inputs carry no gradient.
    first = jax.lax.cond(
        draws.self_condition.any(),
        lambda networks: estimate(networks[0], networks[1], jnp.zeros_like(x_t)),
        lambda networks: jnp.zeros_like(x_t),
        jax.lax.stop_gradient((denoiser, covariates)),
    )
    x0 = estimate(denoiser, covariates, jnp.where(draws.self_condition[:, None, None], first, 0.0))
    terms = LossTerms(squared_error(batch.x0, x0), energy_loss(batch.x0, x0))
    return terms.squared_error.mean() + energy_weight * terms.energy.mean(), terms


def rounded[Tree](networks: Tree, dtype: str) -> Tree:
    """The same networks with all real parameters in `dtype`; gradients through it arrive in the old one."""
    return jax.tree.map(lambda a: a.astype(dtype) if eqx.is_inexact_array(a) else a, networks)
