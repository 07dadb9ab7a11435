"""What training says about each target beside the draws: the null's shift, noise, library and spread ratios."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import xarray as xr
from jax import Array

from hilbertcell.data.moments import Moments
from hilbertcell.inference.predictive import compiled
from hilbertcell.inference.tables import Condition, condition_of, shrunken_covariance
from hilbertcell.models.microenvironment import Globals, Observations, draw_latents

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit


def target_constants(
    fit: "Fit", wanted: pd.DataFrame, moments: Moments, new: frozenset[str]
) -> tuple[xr.Dataset, xr.Dataset]:
    """Per target and gene: constants and observed controls.

    Args:
        fit: the fit.
        wanted: targets as a table of populations.
        moments: moments of the file's populations.
        new: batches that are conditioned on the file alone.

    Returns:
        constant_data: `control_n`, `control_variance` (of cells), `noise_variance` (of perturbed cells, expected),
        `target_observed`, `training_shift` and `training_shift_sd` (mean over training batches of perturbed minus
        control mean of the same condition, and its sd with the sampling noise of both taken off; nan where unseen or,
        for the sd, seen in one batch), `training_num_batches`, `library_log_ratio`, `sd_log_ratio`.
        observed_data: `control_mean`, nan without controls.
    """
    num_genes = len(fit.genes)
    within = shrunken_covariance(moments, fit.prior, fit.names.contexts)
    control = {
        (row.context, row.batch): j for j, row in enumerate(moments.labels.itertuples()) if row.is_control
    }
    pairs = _paired_training(fit)
    overall = [pair for found in pairs.values() for pair in found]
    seen_in_training = set(fit.moments.labels.index)
    seen_in_file = set(moments.labels.index[~moments.labels["is_control"]])
    shape = (len(wanted), num_genes)
    out = {
        name: np.full(shape, np.nan)
        for name in (
            "control_variance",
            "noise_variance",
            "training_shift",
            "training_shift_sd",
            "sd_log_ratio",
        )
    }
    control_mean, control_n = np.full(shape, np.nan), np.zeros(len(wanted))
    library, num_batches = np.zeros(len(wanted)), np.zeros(len(wanted), int)
    observed = np.zeros(len(wanted), bool)
    for t, (name, condition) in enumerate(zip(wanted.index, condition_of(wanted), strict=True)):
        context, batch = condition[0], wanted["batch"].iloc[t]
        if (context, batch) in control:
            j = control[context, batch]
            control_mean[t], control_n[t] = moments.mean[j, :num_genes], moments.n[j]
            out["control_variance"][t] = within.diagonal[j, :num_genes]
        observed[t] = name in (seen_in_file if batch in new else seen_in_training)
        found = pairs.get(condition, [])
        num_batches[t] = len(found)
        if found:
            shifts = np.stack([pair.shift for pair in found])
            out["training_shift"][t] = shifts.mean(axis=0)
            if len(found) > 1:
                noise = np.mean([pair.noise for pair in found], axis=0)
                out["training_shift_sd"][t] = np.sqrt(np.maximum(shifts.var(axis=0, ddof=1) - noise, 0.0))
        similar = found or [p for key, many in pairs.items() if key[0] == context for p in many] or overall
        if similar:
            out["sd_log_ratio"][t] = np.mean([pair.log_sd for pair in similar], axis=0)
            library[t] = np.mean([pair.log_library for pair in similar])
        else:
            out["sd_log_ratio"][t] = 0.0
        position = 2 * fit.names.contexts.index(context) + 1
        classes = (
            fit.prior.class_variance
        )  # the last contexts may have had no perturbed population in training
        variance = classes[position] if position < len(classes) else fit.prior.pooled_variance
        out["noise_variance"][t] = (
            np.mean([p.variance for p in found], axis=0) if found else variance[:num_genes]
        )
    constants: dict[str, Any] = {name: (("population", "gene"), values) for name, values in out.items()}
    constants |= {
        "control_n": ("population", control_n),
        "target_observed": ("population", observed),
        "training_num_batches": ("population", num_batches),
        "library_log_ratio": ("population", np.nan_to_num(library)),
    }
    return xr.Dataset(constants), xr.Dataset({"control_mean": (("population", "gene"), control_mean)})


class _Pair:
    """A training population beside the control of its (context, batch); genes only."""

    def __init__(self, fit: "Fit", perturbed: int, control: int) -> None:
        genes = slice(0, len(fit.genes))
        moments, within = fit.moments, fit.within
        self.shift = moments.mean[perturbed, genes] - moments.mean[control, genes]
        self.noise = within.noise_variance[perturbed, genes] + within.noise_variance[control, genes]
        self.variance = within.diagonal[perturbed, genes]
        self.log_sd = 0.5 * np.log(self.variance / within.diagonal[control, genes])
        self.log_library = moments.log_library[perturbed] - moments.log_library[control]


def _paired_training(fit: "Fit") -> dict[Condition, list[_Pair]]:
    """Training populations that have a control, by condition."""
    labels = fit.moments.labels
    control = {(r.context, r.batch): j for j, r in enumerate(labels.itertuples()) if r.is_control}
    pairs: dict[Condition, list[_Pair]] = {}
    for j, condition in enumerate(condition_of(labels)):
        own = (condition[0], labels["batch"].iloc[j])
        if not labels["is_control"].iloc[j] and own in control:
            pairs.setdefault(condition, []).append(_Pair(fit, j, control[own]))
    return pairs


def variance_shares(fit: "Fit", keys: Array, globals_: Globals) -> np.ndarray:
    """Shares (7,) of the mean squared observed response of training populations, averaged over genes and draws.

    Components in order: perturbation, context, interaction (two-way means of the effects), own baseline, microenvironment
    (`d` and `Lambda u`), residual, sampling noise (of both the perturbed and the control mean).
    """
    layout = _Layout(
        np.array([fit.names.contexts.index(c) for c, _, _ in fit.names.conditions]), fit.names.level_index()
    )
    squares = _mean_squares(keys, globals_, fit.program_args[0], layout, num_genes=len(fit.genes))
    squares = np.asarray(squares).mean(axis=0)
    total = squares.sum(axis=0)
    return (squares / np.where(total > 0, total, 1.0)).mean(axis=1)


class _Layout(NamedTuple):
    """Context and level of each training condition, (E,)."""

    context: np.ndarray
    level: np.ndarray


def _mean_squares_of(
    keys: Array, globals_: Globals, observations: Observations, layout: _Layout, num_genes: int
) -> Array:
    """Mean squares (S, 7, G) of the parts of the responses of training populations."""
    num_conditions = len(layout.context)

    def group_mean(values: Array, group: Array) -> Array:
        counts = jax.ops.segment_sum(jnp.ones(num_conditions), group, num_conditions)
        sums = jax.ops.segment_sum(values, group, num_conditions)
        return (sums / jnp.maximum(counts, 1)[:, None])[group]

    def one(key: Array, g: Globals) -> Array:
        num_contexts = g.alpha.shape[0]
        effect = g.effect[:num_conditions, :num_genes]
        by_level = group_mean(effect, layout.level)
        by_context = group_mean(effect - by_level, layout.context)
        parts = jnp.stack([by_level, by_context, effect - by_level - by_context])

        def batch(key: Array, b: Observations) -> tuple[Array, Array]:
            latents = draw_latents(key, g, b)
            strength = g.strength[b.condition][:, None]
            x = latents.control_mean[b.context] - g.alpha[b.context]
            own = strength * g.slope * x
            to_u = g.shared_response(b.condition, latents.microenvironment)
            shared = strength * (latents.batch_effect + to_u)
            residual = strength * g.response_scale[b.context]
            terms = jnp.concatenate(
                [parts[:, b.condition], jnp.stack([own, shared, residual])[..., :num_genes]]
            )
            noise = b.noise[num_contexts:] + b.noise[b.context]
            square = jnp.concatenate([terms**2, noise[None, :, :num_genes]])
            used = (b.observed[num_contexts:] & b.observed[b.context])[:, None]
            return (square * used).sum(1), used.sum()

        keys = jax.random.split(key, observations.mean.shape[0])
        squares, counts = jax.lax.map(lambda of_batch: batch(*of_batch), (keys, observations))
        return squares.sum(0) / jnp.maximum(counts.sum(), 1)

    return jax.lax.map(lambda draw: one(*draw), (keys, globals_))


_mean_squares = compiled(_mean_squares_of, "num_genes")
