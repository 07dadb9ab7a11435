"""Predict: from a fit and the cells of its batches to labelled draws of whole response distributions."""

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
import pandas as pd
import xarray as xr
from rich.progress import Progress

from hilbertcell.data.perturbations import perturbation_table
from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError
from hilbertcell.inference.checks import TrainingChecks
from hilbertcell.inference.predictive import (
    align,
    batch_log_density,
    draw_batch,
    draw_globals,
    draw_microenvironments,
)
from hilbertcell.inference.requests import Given, batch_targets, choose_targets, read_batches
from hilbertcell.inference.tables import Condition, condition_of
from hilbertcell.inference.training_summary import target_constants, variance_shares
from hilbertcell.models.microenvironment import Globals

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

# Draws of the globals behind the variance decomposition: shares are means over hundreds of (population, gene).
_SHARE_DRAWS = 20
# Draws of genes are held in memory and in one file: what a laptop has room for beside the data.
MAX_BYTES = 2_000_000_000


def predict(
    fit: "Fit",
    populations: Populations,
    *,
    targets: pd.DataFrame | None = None,
    num_samples: int = 500,
    seed: int = 0,
    observe: bool = False,
    new_batch: bool = False,
    progress: bool = False,
) -> xr.DataTree:
    """Draw latent population means of targets given the controls of their batches.

    Args:
        fit: the fit.
        populations: cells of the batches to predict for; perturbed ones are ignored unless `observe`.
        targets: columns context, perturbation, batch and, for doses, dose; None: every (perturbation, dose) of the
            fit for every (context, batch) of the file.
        num_samples: draws S.
        seed: same seed, same draws.
        observe: condition on the file's perturbed populations too (few-shot update).
        new_batch: treat every batch of the file as new, even under a name that the fit knows.
        progress: show a progress bar.

    Returns:
        DataTree with groups predictions, posterior, log_likelihood, posterior_predictive, observed_data,
        constant_data and sample_stats (docs: "The draws").

    Raises:
        DataError: genes, scale, contexts or perturbations that the fit does not know; a known batch name with
            other controls; a target whose batch the file lacks.
    """
    if num_samples < 2:
        raise DataError(f"num_samples = {num_samples}: a law needs at least 2 draws; ask for 500")
    given = read_batches(fit, populations, observe, new_batch)
    wanted = choose_targets(fit, given.moments.labels, targets)
    conditions: list[Condition] = condition_of(wanted)
    names = fit.names.extend(conditions)
    features = populations.perturbation_features if fit.features is None else fit.features
    perturbations = perturbation_table(
        list(dict.fromkeys(perturbation for _, perturbation, _ in names.conditions)),
        fit.keys.control,
        features=fit.features,
        singles=None if fit.features is not None else fit.perturbations.singles,
    )
    if fit.features is None and features is not None:
        given.notices.append("perturbation features were given, but the fit was made without any: not used")
    tables = {
        batch: given.table if batch in given.new else fit.table for batch in sorted(wanted["batch"].unique())
    }
    asked = {batch: batch_targets(fit, names, wanted, batch, tables[batch]) for batch in tables}

    num_targets, num_genes = len(wanted), len(fit.genes)
    needed = 2 * 4 * num_samples * num_targets * num_genes
    if needed > MAX_BYTES:
        raise DataError(
            f"num_samples x targets x genes = {num_samples} x {num_targets} x {num_genes}: the draws would take "
            f"{needed / 1e9:.1f} GB of at most {MAX_BYTES / 1e9:.0f}; ask for fewer draws or name fewer targets"
        )
    shape = (num_samples, num_targets)
    mean, shift = np.empty((*shape, num_genes), np.float32), np.empty((*shape, num_genes), np.float32)
    embedding = np.empty((*shape, fit.coordinates.A.shape[1]), np.float32)
    u_new: dict[str, list[np.ndarray]] = {batch: [] for batch in tables if batch in given.new}
    u_train, loglik, scalars, checks, shares = [], [], [], [], np.zeros(0)
    check = TrainingChecks(fit, seed)
    rows = {batch: np.flatnonzero(wanted["batch"] == batch) for batch in tables}
    observations = fit.program_args[0]
    with jax.enable_x64(True), Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("drawing", total=num_samples)
        for block, globals_ in draw_globals(fit, names, perturbations, num_samples, seed):
            key = jax.random.fold_in(jax.random.key(seed), block.start)
            for i, batch in enumerate(tables):
                drawn = draw_batch(jax.random.fold_in(key, i), globals_, asked[batch])
                response, control = fit.unit.undo(drawn.response), fit.unit.undo(drawn.control)
                mean[block, rows[batch]] = response[..., :num_genes]
                shift[block, rows[batch]] = (response - control)[..., :num_genes]
                embedding[block, rows[batch]] = fit.coordinates.project(response)
                if batch in given.new:
                    u_new[batch].append(drawn.microenvironment)
            keys = jax.random.split(jax.random.fold_in(key, len(tables)), block.stop - block.start)
            u_train.append(np.asarray(draw_microenvironments(keys, globals_, observations)))
            loglik.append(np.asarray(batch_log_density(globals_, observations)))
            scalars.append(_scalars(fit, globals_))
            if not shares.size:
                shares = variance_shares(
                    fit, keys[:_SHARE_DRAWS], jax.tree.map(lambda leaf: leaf[:_SHARE_DRAWS], globals_)
                )
            checks.append(check.draw(jax.random.fold_in(key, len(tables) + 1), globals_))
            bar.advance(task, block.stop - block.start)
    batches = [*fit.table.batches, *(f"{b} (new)" if b in fit.table.batches else b for b in u_new)]
    factors = np.concatenate(
        [np.concatenate(u_train), *(np.concatenate(u)[:, None] for u in u_new.values())], axis=1
    )
    tree = _assemble(
        fit, given, wanted, mean, shift, embedding, batches, align(factors)[0], np.concatenate(loglik),
        {name: np.concatenate([s[name] for s in scalars]) for name in scalars[0]},
        shares, check, np.concatenate(checks),
    )  # fmt: skip
    tree.attrs["seed"], tree.attrs["observe"] = seed, int(observe)
    return tree


def _scalars(fit: "Fit", globals_: Globals) -> dict[str, np.ndarray]:
    """Posterior draws worth reporting, genes only, scales in units of the data."""
    genes = slice(0, len(fit.genes))
    unit = fit.unit.scale[genes]
    return {
        "slope": np.asarray(globals_.slope[:, genes]),
        "baseline_scale": np.asarray(globals_.baseline_scale[:, :, genes].mean(axis=1)) * unit,
        "response_scale": np.asarray(globals_.response_scale[:, :, genes].mean(axis=1)) * unit,
        "batch_scale": np.asarray(globals_.batch_scale[:, genes]) * unit,
        "factor_scale": np.sqrt(
            np.asarray((globals_.baseline_loading[:, genes] ** 2).mean(axis=1)),
        ),
        "strength": np.asarray(globals_.strength),
    }


def _assemble(
    fit: "Fit", given: Given, wanted: pd.DataFrame, mean: np.ndarray, shift: np.ndarray, embedding: np.ndarray,
    batches: Sequence[str], factors: np.ndarray, loglik: np.ndarray, scalars: dict[str, np.ndarray],
    shares: np.ndarray, check: TrainingChecks, checks: np.ndarray,
) -> xr.DataTree:  # fmt: skip
    """Label everything; see `predict`."""
    from hilbertcell import __version__

    scale = {"counts": "log1p_cp10k"}.get(fit.keys.scale, fit.keys.scale)
    units = {"log1p_cp10k": "log1p(counts per 10,000)", "log1p": "log1p", "other": "units of the data"}[scale]
    population = {
        "population": wanted.index.to_numpy(dtype=str),
        **{
            name: ("population", wanted[name].to_numpy(dtype=str))
            for name in ("context", "perturbation", "batch")
        },
        "dose": ("population", wanted["dose"].to_numpy(dtype=float)),
    }
    genes = {"gene": fit.genes.astype(str)}
    draws = ("chain", "draw")

    def stacked(values: np.ndarray, *dims: str) -> tuple[tuple[str, ...], np.ndarray]:
        return (*draws, *dims), np.asarray(values, np.float32)[None]

    predictions = xr.Dataset(
        {
            "mean": stacked(mean, "population", "gene"),
            "shift": stacked(shift, "population", "gene"),
            "embedding": stacked(embedding, "population", "coordinate"),
        },
        coords={**population, **genes, "coordinate": np.arange(embedding.shape[-1])},
        attrs={"scale": scale, "units": units},
    )
    levels = [f"{p}" if d < 0 else f"{p} @ {d:g}" for _, p, d in fit.names.conditions]
    posterior = xr.Dataset(
        {
            "microenvironment": stacked(factors, "batch", "factor"),
            **{
                name: stacked(scalars[name], "gene")
                for name in ("slope", "baseline_scale", "response_scale", "batch_scale")
            },
            "factor_scale": stacked(scalars["factor_scale"], "factor"),
            "strength": stacked(scalars["strength"][:, : len(levels)], "condition"),
        },
        coords={
            **genes,
            "batch": np.array(batches, dtype=str),
            "in_training": ("batch", np.arange(len(batches)) < len(fit.table.batches)),
            "factor": np.arange(factors.shape[-1]),
            "condition": [
                f"{c} | {level}" for (c, _, _), level in zip(fit.names.conditions, levels, strict=True)
            ],
        },
    )
    loglik_set = xr.Dataset(
        {"response": stacked(loglik, "batch")}, coords={"batch": np.array(fit.table.batches, dtype=str)}
    )
    constants, observed = target_constants(fit, wanted, given.moments, given.new)
    labels = fit.moments.labels
    summary = {
        "num_cells": int(labels["num_cells"].sum()),
        "num_populations": len(labels),
        "num_batches": len(fit.table.batches),
        "contexts": list(fit.names.contexts),
        "perturbations": list(dict.fromkeys(level[0] for level in fit.names.levels)),
        "held_out": list(fit.held_out),
    }
    components = [
        "perturbation",
        "context",
        "interaction",
        "own baseline",
        "microenvironment",
        "residual",
        "sampling noise",
    ]
    constants = constants.assign_coords(**population, **genes, component=components)
    constants["variance_decomposition"] = ("component", shares)
    constants.attrs = {
        "warnings": json.dumps(given.notices),
        "data_summary": json.dumps(summary),
        "training_populations": json.dumps(labels.index.tolist()),  # `evaluate` refuses to score these
    }
    observed = observed.assign_coords(**population, **genes)
    observed["population_mean"] = ("observation", check.observed)
    predictive = xr.Dataset(
        {"population_mean": stacked(checks, "observation")},
        coords={
            "observation": np.arange(len(check.gene)),
            "population_name": ("observation", labels.index.to_numpy(dtype=str)[check.row]),
            "gene_name": ("observation", fit.genes.astype(str)[check.gene]),
        },
    )
    groups: dict[str, Any] = {
        "predictions": predictions, "posterior": posterior, "log_likelihood": loglik_set,
        "posterior_predictive": predictive, "observed_data": observed, "constant_data": constants,
        "sample_stats": xr.Dataset({"elbo": (("chain", "svi_step"), -fit.losses[None])}),
    }  # fmt: skip
    tree = xr.DataTree.from_dict(groups)
    tree.attrs = {"hilbertcell_version": __version__, "keys": json.dumps(fit.keys.to_dict())}
    if any(not np.isfinite(v).all() for v in (mean, shift)):
        warnings.warn("some draws are not finite; the fit cannot be trusted", RuntimeWarning, stacklevel=3)
    return tree
