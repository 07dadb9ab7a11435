"""Labels for draws: which group, dimension and coordinate everything that `predict` makes belongs to."""

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr

from hilbertcell.inference.batch_responses import measured_responses
from hilbertcell.inference.predictive import align
from hilbertcell.inference.requests import Given
from hilbertcell.inference.training_draws import TrainingDraws
from hilbertcell.inference.training_summary import target_constants

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

COMPONENTS = (
    "perturbation",
    "context",
    "interaction",
    "own baseline",
    "microenvironment",
    "residual",
    "sampling noise",
)


def draws_attrs(fit: "Fit") -> dict[str, Any]:
    """Attributes of the tree: what wrote it and what the columns of the data mean."""
    from hilbertcell import __version__

    return {
        "hilbertcell_version": __version__,
        "keys": json.dumps(fit.keys.to_dict()),
        "law": fit.choice.name,
        "law_reason": fit.choice.reason,
    }


def per_draw(values: np.ndarray, *dims: str) -> tuple[tuple[str, ...], np.ndarray]:
    """Values (S, ...) as float32 with dims (chain, draw, ...)."""
    return ("chain", "draw", *dims), np.asarray(values, np.float32)[None]


def _population_coords(fit: "Fit", wanted: pd.DataFrame) -> dict[str, Any]:
    """Coordinates of predicted populations and genes."""
    return {
        "population": wanted.index.to_numpy(dtype=str),
        **{
            name: ("population", wanted[name].to_numpy(dtype=str))
            for name in ("context", "perturbation", "batch")
        },
        "dose": ("population", wanted["dose"].to_numpy(dtype=float)),
        "gene": fit.genes.astype(str),
        "coordinate": np.arange(fit.coordinates.A.shape[1]),
    }


def population_groups(
    fit: "Fit", wanted: pd.DataFrame, given: Given, predictions: dict[str, Any]
) -> dict[str, xr.Dataset]:
    """Groups with a dimension `population`: `predictions` (dims and values by name) and what stands beside them."""
    scale = {"counts": "log1p_cp10k"}.get(fit.keys.scale, fit.keys.scale)
    units = {"log1p_cp10k": "log1p(counts per 10,000)", "log1p": "log1p", "other": "units of the data"}[scale]
    constants, observed = target_constants(fit, wanted, given.moments, given.new)
    coords = _population_coords(fit, wanted)
    return {
        "predictions": xr.Dataset(predictions, coords, {"scale": scale, "units": units}),
        "constant_data": constants.assign_coords(coords).drop_vars("coordinate"),
        "observed_data": observed.assign_coords(coords).drop_vars("coordinate"),
    }


def training_groups(
    fit: "Fit", given: Given, training: TrainingDraws, new: dict[str, np.ndarray]
) -> dict[str, xr.Dataset]:
    """All that does not depend on the targets; `new` holds draws (S, K) of the microenvironments of new batches."""
    known, leading = fit.table.batches, training.leading
    of_batch = [*range(len(known)), *(len(known) + training.new.index(batch) for batch in new)]
    batches = [*known, *(f"{batch} (new)" if batch in known else batch for batch in new)]
    factors = np.concatenate([training["microenvironment"], *(u[:, None] for u in new.values())], axis=1)
    levels = [f"{p}" if d < 0 else f"{p} @ {d:g}" for _, p, d in fit.names.conditions]
    conditions = [f"{c} | {level}" for (c, _, _), level in zip(fit.names.conditions, levels, strict=True)]
    genes = {"gene": fit.genes.astype(str)}
    posterior = xr.Dataset(
        {
            "microenvironment": per_draw(align(factors)[0], "batch", "factor"),
            **{
                name: per_draw(training[name], "gene")
                for name in ("slope", "baseline_scale", "response_scale", "batch_scale")
            },
            "factor_scale": per_draw(training["factor_scale"], "factor"),
            "strength": per_draw(training["strength"], "condition"),
            "fixed_response": per_draw(training["fixed_response"], "leading_condition", "leading_gene"),
            "batch_response": per_draw(
                training["batch_response"][:, of_batch], "batch", "leading_condition", "leading_gene"
            ),
        },
        coords={
            **genes,
            "batch": np.array(batches, dtype=str),
            "in_training": ("batch", np.arange(len(batches)) < len(known)),
            "factor": np.arange(factors.shape[-1]),
            "condition": conditions,
            "leading_condition": [conditions[e] for e in leading.condition],
            "gene_name": (("leading_condition", "leading_gene"), fit.genes.astype(str)[leading.gene]),
        },
    )
    labels, checks = fit.moments.labels, training.checks
    summary = {
        "num_cells": int(labels["num_cells"].sum()),
        "num_populations": len(labels),
        "num_batches": len(known),
        "contexts": list(fit.names.contexts),
        "perturbations": list(dict.fromkeys(level[0] for level in fit.names.levels)),
        "held_out": list(fit.held_out),
    }
    measured = measured_responses(fit, leading)
    constants = xr.Dataset(
        {
            "variance_decomposition": ("component", training.shares),
            "measured_response": (("training_batch", "leading_condition", "leading_gene"), measured),
        },
        {
            "component": list(COMPONENTS),
            "training_batch": np.array(known, dtype=str),
            "leading_condition": posterior["leading_condition"].values,
        },
    )
    constants.attrs = {
        "warnings": json.dumps([*fit.inference_notices, *given.notices]),
        "data_summary": json.dumps(summary),
        "training_populations": json.dumps(labels.index.tolist()),  # `evaluate` refuses to score these
    }
    return {
        "posterior": posterior,
        "log_likelihood": xr.Dataset(
            {"response": per_draw(training["log_density"], "batch")},
            {"batch": np.array(known, dtype=str)},
        ),
        "posterior_predictive": xr.Dataset(
            {"population_mean": per_draw(training["check"], "observation")},
            {
                "observation": np.arange(len(checks.gene)),
                "population_name": ("observation", labels.index.to_numpy(dtype=str)[checks.row]),
                "gene_name": ("observation", fit.genes.astype(str)[checks.gene]),
                "batch_name": ("observation", np.array(known, dtype=str)[checks.batch]),
            },
        ),
        "observed_data": xr.Dataset({"population_mean": ("observation", checks.observed)}),
        "constant_data": constants,
        "sample_stats": fit.sample_stats,
    }
