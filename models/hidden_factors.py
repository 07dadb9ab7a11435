"""The hidden-factor program: one generative function for prior simulation, SVI, NUTS and prediction."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array

from hilbertcell.models.effects import ConditionEffects, kernel_cholesky
from hilbertcell.models.microenvironment import Globals, Observations, PopulationMeans

# Own loadings of so many (perturbation, dose, factor) keep their posterior correlations in the guide's block of 64
# unknowns; in larger screens they would cost six times the rest of the likelihood (measured at 100 conditions).
MAX_MODULATIONS = 64


def hidden_factor_program(
    layout: Observations,
    kernels: Array,
    strength_level: np.ndarray,
    feature_block: np.ndarray,
    num_factors: int,
    means: Array | None = None,
) -> Globals:
    """Generate the observed population means of all batches (mathematics section 3), standardised features.

    Args:
        layout: (B, ...) slots, noise and indices of the batches; its `mean` gives only shapes.
        kernels: (M, E, E) similarity kernels of the E conditions (`similarity_kernels`).
        strength_level: (E,) int, which (perturbation, dose) a condition belongs to; conditions of one level
            transmit the batch with the same strength.
        feature_block: (D,) int, the block of each feature (genes, random features); blocks share the
            microenvironment and nothing else, so that one block cannot spoil the scales of another.
        num_factors: upper bound K on the number of microenvironment factors.
        means: observed means (B, C + J, D), or None to simulate them.

    Returns:
        The globals drawn, deterministic functions of the sites.
    """
    num_features = layout.mean.shape[-1]
    num_contexts = layout.mean.shape[-2] - layout.condition.shape[-1]
    num_conditions = kernels.shape[1]
    num_levels = int(strength_level.max()) + 1
    blocks = int(feature_block.max()) + 1

    # Scales in units of a feature's total sd: baseline, response, effect. A priori a batch moves a mean by a
    # fifth of it, give or take a factor of e.
    log_scale_mean = numpyro.sample(
        "log_scale_mean", dist.Normal(jnp.tile(jnp.array([-1.5, -1.5, -1.0]), (blocks, 1)), 1.0).to_event(2)
    )[feature_block]
    log_scale_sd = numpyro.sample(
        "log_scale_sd", dist.HalfNormal(jnp.tile(jnp.array([0.7, 0.7, 1.0]), (blocks, 1))).to_event(2)
    )[feature_block]
    batch_ratio = numpyro.sample("batch_ratio", dist.HalfNormal(jnp.ones(blocks)).to_event(1))[feature_block]
    slope_mean = numpyro.sample("slope_mean", dist.Normal(jnp.zeros(blocks), 0.3).to_event(1))[feature_block]
    slope_sd = numpyro.sample("slope_sd", dist.HalfNormal(jnp.full(blocks, 0.3)).to_event(1))[feature_block]
    amplitudes = numpyro.sample("effect_amplitude", dist.HalfNormal(jnp.ones(kernels.shape[0])).to_event(1))
    if num_factors:
        factor_ratio = numpyro.sample(
            "factor_ratio", dist.HalfNormal(jnp.ones((blocks, 2, num_factors))).to_event(3)
        )[feature_block]
    # With one level its own loadings are those of all.
    several = num_factors > 0 and num_levels > 1 and num_levels * num_factors <= MAX_MODULATIONS
    if several:
        modulation_ratio = numpyro.sample(
            "modulation_ratio", dist.HalfNormal(jnp.full((blocks, num_factors), 0.5)).to_event(2)
        )[feature_block]
    context_log_ratio = jnp.zeros((num_features, 2, num_contexts))
    if num_contexts > 1:
        context_sd = numpyro.sample("context_sd", dist.HalfNormal(jnp.full((blocks, 2), 0.5)).to_event(2))
        unit = numpyro.sample(
            "context_unit", dist.Normal(jnp.zeros((blocks, 2, num_contexts)), 1.0).to_event(3)
        )
        context_log_ratio = (context_sd[..., None] * unit)[feature_block]
    if num_levels > 1:
        strength = numpyro.sample("strength", dist.HalfNormal(jnp.ones(num_levels)).to_event(1))[
            strength_level
        ]
    else:
        strength = jnp.ones(num_conditions)

    chol = kernel_cholesky(kernels, amplitudes)
    with numpyro.plate("feature", num_features):
        alpha = numpyro.sample("alpha", dist.Normal(jnp.zeros(num_contexts), 3.0).to_event(1))
        unit_scale = numpyro.sample("unit_scale", dist.Normal(jnp.zeros(4), 1.0).to_event(1))
        scales = jnp.exp(log_scale_mean + log_scale_sd * unit_scale[:, :3])
        batch_unit = jnp.exp(0.5 * unit_scale[:, 3])
        effect = numpyro.sample("effect", ConditionEffects(scales[:, 2], chol))
        slope = numpyro.sample("slope", dist.Normal(slope_mean, slope_sd))
        if num_factors:
            unit_loading = numpyro.sample(
                "loading", dist.Normal(jnp.zeros((2, num_factors)), 1.0).to_event(2)
            )
        if several:
            unit_modulation = numpyro.sample(
                "modulation", dist.Normal(jnp.zeros((num_levels, num_factors)), 1.0).to_event(2)
            )
    context_ratio = jnp.exp(context_log_ratio)
    baseline = (scales[:, :1] * context_ratio[:, 0]).T
    response = (scales[:, 1:2] * context_ratio[:, 1]).T
    if num_factors:
        loading = unit_loading * factor_ratio * scales[:, :2, None]
    else:
        loading = jnp.zeros((num_features, 2, 0))
    modulation = modulation_scale = None
    if several:
        modulation_scale = (modulation_ratio * scales[:, 1, None]).T
        modulation = jnp.moveaxis(unit_modulation, -1, 0) * modulation_scale[..., None]  # (K, D, levels)
        modulation = jnp.swapaxes(modulation, 1, 2)[:, strength_level]
    globals_ = Globals(
        alpha=alpha.T,
        effect=effect.T,
        effect_scale=scales[:, 2],
        strength=strength,
        slope=slope,
        baseline_loading=loading[:, 0],
        response_loading=loading[:, 1],
        baseline_scale=baseline,
        response_scale=response,
        batch_scale=batch_ratio * batch_unit * scales[:, 1],
        modulation=modulation,
        modulation_scale=modulation_scale,
    )
    with numpyro.plate("batch", layout.mean.shape[0]):
        numpyro.sample("response", PopulationMeans(globals_, layout), obs=means)
    return globals_
