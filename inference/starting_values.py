"""Where inference starts: observed means and effects, and moment estimates of the scales.

Adam moves every unknown by about its learning rate a step, so what can be read off the table is not left to it.
"""

from typing import Any

import numpy as np

# Moment estimates of a variance over few batches can be zero; scales start within these, in units of a feature.
_SCALE_RANGE = (0.02, 1.0)


def starting_values(args: tuple[Any, ...], seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Starting values of sites, and starting sds of the feature sites: about what their posterior will be.

    `args` are those of `hidden_factor_program`, observed means included.
    """
    layout, kernels, strength_level, block, num_factors, means = args
    observations = layout._replace(**{name: np.asarray(value) for name, value in layout._asdict().items()})
    mean, noise = np.asarray(means), observations.noise
    num_contexts, num_conditions = mean.shape[1] - observations.condition.shape[1], kernels.shape[1]
    num_features, num_levels = mean.shape[-1], int(strength_level.max()) + 1
    seen = observations.observed[..., None]
    controls, has_control = mean[:, :num_contexts], seen[:, :num_contexts]
    count = has_control.sum(0)
    overall = (controls * has_control).sum((0, 1)) / count.sum()
    alpha = np.where(count > 0, (controls * has_control).sum(0) / np.maximum(count, 1), overall)
    deviation = controls - alpha
    baseline = _scale(deviation, noise[:, :num_contexts], has_control, num_contexts)

    # Responses against the batch's own control, or the context's where it has none.
    own = np.where(has_control, controls, alpha)
    own = np.take_along_axis(own, observations.context[..., None], 1)
    own_noise = np.take_along_axis(
        np.where(has_control, noise[:, :num_contexts], 0.0), observations.context[..., None], 1
    )
    response, has_response = mean[:, num_contexts:] - own, seen[:, num_contexts:]
    one_hot = (observations.condition[..., None] == np.arange(num_conditions)) & has_response
    times = one_hot.sum((0, 1))[:, None]
    effect = np.einsum("bje,bjd->ed", one_hot, response) / times
    residual = response - effect[observations.condition]
    spread = _scale(residual, noise[:, num_contexts:] + own_noise, has_response, num_conditions)
    magnitude = np.clip(np.sqrt((effect**2).mean(0)), *_SCALE_RANGE)

    log_scales = np.log(np.stack([baseline, spread, magnitude], axis=1))
    blocks = range(int(block.max()) + 1)
    log_mean = np.stack([log_scales[block == k].mean(0) for k in blocks])
    log_sd = np.maximum(np.stack([log_scales[block == k].std(0) for k in blocks]), 0.3)
    unit_scale = np.zeros((num_features, 4))
    unit_scale[:, :3] = (log_scales - log_mean[block]) / log_sd[block]
    values = {
        "alpha": alpha.T,
        "effect": effect.T,
        "slope": np.zeros(num_features),
        "log_scale_mean": log_mean,
        "log_scale_sd": log_sd,
        "unit_scale": unit_scale,
        "effect_amplitude": np.full(kernels.shape[0], 0.7),
        "batch_ratio": np.full(len(blocks), 0.5),
        "slope_mean": np.zeros(len(blocks)),
        "slope_sd": np.full(len(blocks), 0.2),
        "context_sd": np.full((len(blocks), 2), 0.3),
        "context_unit": np.zeros((len(blocks), 2, num_contexts)),
        "strength": np.ones(num_levels),
        "factor_ratio": np.full((len(blocks), 2, num_factors), 0.5),
        "modulation_ratio": np.full((len(blocks), num_factors), 0.2),
        "modulation": np.zeros((num_features, num_levels, num_factors)),
        # Zero loadings are a saddle point.
        "loading": 0.3 * np.random.default_rng(seed).standard_normal((num_features, 2, num_factors)),
    }
    alpha_sd = baseline[:, None] / np.sqrt(np.maximum(count, 1)).T
    effect_sd = spread[:, None] / np.sqrt(times).T
    return values, {
        "alpha": alpha_sd,
        "effect": effect_sd,
        "unit_scale": np.full((num_features, 4), 0.5),
        "slope": np.full(num_features, 0.2),
        "loading": np.full((num_features, 2, num_factors), 0.5),
        "modulation": np.full((num_features, num_levels, num_factors), 0.5),
    }


def _scale(deviation: np.ndarray, noise: np.ndarray, seen: np.ndarray, num_means: int) -> np.ndarray:
    """(D,) noise-corrected sd of deviations (B, J, D) around `num_means` estimated means."""
    degrees = np.maximum(seen.sum() - num_means, 1)
    variance = (deviation**2 * seen).sum((0, 1)) / degrees - (noise * seen).sum((0, 1)) / max(seen.sum(), 1)
    return np.clip(np.sqrt(np.maximum(variance, 0.0)), *_SCALE_RANGE)
