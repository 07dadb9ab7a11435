"""The hidden-factor program in Pyro: site by site that of `models.hidden_factors`, where its parts are explained."""

import pyro
from pyro.distributions import HalfNormal, Normal
from torch import Tensor

from hilbertcell.models.hidden_factors import MAX_MODULATIONS
from hilbertcell.models.microenvironment import Globals, Observations
from hilbertcell.models.pyro.effects import ConditionEffects, kernel_cholesky
from hilbertcell.models.pyro.microenvironment import PopulationMeans


def hidden_factor_program(
    layout: Observations,
    kernels: Tensor,
    strength_level: Tensor,
    feature_block: Tensor,
    num_factors: int,
    means: Tensor | None = None,
) -> Globals:
    """Generate the observed population means of all batches; arguments and result as in the NumPyro program.

    Tensors in float64 (`models.pyro.arguments.as_tensors`), all on one device.
    """
    num_features = layout.mean.shape[-1]
    num_contexts = layout.mean.shape[-2] - layout.condition.shape[-1]
    num_levels, blocks = int(strength_level.max()) + 1, int(feature_block.max()) + 1
    zeros, ones, full = kernels.new_zeros, kernels.new_ones, kernels.new_full

    log_scale_mean = pyro.sample(
        "log_scale_mean", Normal(kernels.new_tensor([-1.5, -1.5, -1.0]).expand(blocks, 3), 1.0).to_event(2)
    )[feature_block]
    log_scale_sd = pyro.sample(
        "log_scale_sd", HalfNormal(kernels.new_tensor([0.7, 0.7, 1.0]).expand(blocks, 3)).to_event(2)
    )[feature_block]
    batch_ratio = pyro.sample("batch_ratio", HalfNormal(ones(blocks)).to_event(1))[feature_block]
    slope_mean = pyro.sample("slope_mean", Normal(zeros(blocks), 0.3).to_event(1))[feature_block]
    slope_sd = pyro.sample("slope_sd", HalfNormal(full((blocks,), 0.3)).to_event(1))[feature_block]
    amplitudes = pyro.sample("effect_amplitude", HalfNormal(ones(len(kernels))).to_event(1))
    if num_factors:
        factor_ratio = pyro.sample("factor_ratio", HalfNormal(ones(blocks, 2, num_factors)).to_event(3))[
            feature_block
        ]
    several = num_factors > 0 and num_levels > 1 and num_levels * num_factors <= MAX_MODULATIONS
    if several:
        modulation_ratio = pyro.sample(
            "modulation_ratio", HalfNormal(full((blocks, num_factors), 0.5)).to_event(2)
        )[feature_block]
    context_log_ratio = zeros(num_features, 2, num_contexts)
    if num_contexts > 1:
        context_sd = pyro.sample("context_sd", HalfNormal(full((blocks, 2), 0.5)).to_event(2))
        unit = pyro.sample("context_unit", Normal(zeros(blocks, 2, num_contexts), 1.0).to_event(3))
        context_log_ratio = (context_sd[..., None] * unit)[feature_block]
    if num_levels > 1:
        strength = pyro.sample("strength", HalfNormal(ones(num_levels)).to_event(1))[strength_level]
    else:
        strength = ones(kernels.shape[1])

    chol = kernel_cholesky(kernels, amplitudes)
    with pyro.plate("feature", num_features):
        alpha = pyro.sample("alpha", Normal(zeros(num_contexts), 3.0).to_event(1))
        unit_scale = pyro.sample("unit_scale", Normal(zeros(4), 1.0).to_event(1))
        scales = (log_scale_mean + log_scale_sd * unit_scale[:, :3]).exp()
        batch_unit = (0.5 * unit_scale[:, 3]).exp()
        effect = pyro.sample("effect", ConditionEffects(scales[:, 2], chol))
        slope = pyro.sample("slope", Normal(slope_mean, slope_sd))
        if num_factors:
            unit_loading = pyro.sample("loading", Normal(zeros(2, num_factors), 1.0).to_event(2))
        if several:
            unit_modulation = pyro.sample(
                "modulation", Normal(zeros(num_levels, num_factors), 1.0).to_event(2)
            )
    context_ratio = context_log_ratio.exp()
    loading = zeros(num_features, 2, 0)
    if num_factors:
        loading = unit_loading * factor_ratio * scales[:, :2, None]
    modulation = modulation_scale = None
    if several:
        modulation_scale = (modulation_ratio * scales[:, 1, None]).T
        modulation = (unit_modulation.permute(2, 1, 0) * modulation_scale[:, None])[:, strength_level]
    globals_ = Globals(
        alpha=alpha.T,
        effect=effect.T,
        effect_scale=scales[:, 2],
        strength=strength,
        slope=slope,
        baseline_loading=loading[:, 0],
        response_loading=loading[:, 1],
        baseline_scale=(scales[:, :1] * context_ratio[:, 0]).T,
        response_scale=(scales[:, 1:2] * context_ratio[:, 1]).T,
        batch_scale=batch_ratio * batch_unit * scales[:, 1],
        modulation=modulation,
        modulation_scale=modulation_scale,
    )
    with pyro.plate("batch", layout.mean.shape[0]):
        pyro.sample("response", PopulationMeans(globals_, layout), obs=means)
    return globals_
