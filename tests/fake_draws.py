"""Draws as `Fit.predict` returns them, without a fit: for tests of everything that reads them."""

import json
from collections.abc import Sequence
from itertools import product

import numpy as np
import xarray as xr

from hilbertcell.inference.draws_tree import COMPONENTS


def fake_draws(
    *,
    num_draws: int = 100,
    num_genes: int = 10,
    contexts: Sequence[str] = ("B", "T"),
    perturbations: Sequence[str] = ("A", "inert"),
    doses: Sequence[float] = (float("nan"),),
    training: Sequence[str] = ("d1", "d2", "d3"),
    predicted: Sequence[str] = ("d4",),
    genes: Sequence[str] | None = None,
    control_n: float = 50.0,
    observed_shift: float = 0.0,
    warnings: Sequence[str] = (),
    seed: int = 0,
) -> xr.DataTree:
    """Draws with shifts of 1 +- 0.1 in the first third of the genes, of 0 +- 0.1 elsewhere and for "inert".

    `observed_shift` moves the training means away from their predictive law, N(0, 1), by that many deviations.
    """
    rng = np.random.default_rng(seed)
    genes = np.array([f"gene{g}" for g in range(num_genes)] if genes is None else list(genes), dtype=str)
    rows = list(product(contexts, predicted, perturbations, doses))
    names = [f"{c} | {p}{'' if np.isnan(d) else f' @ {d:g}'} | {b}" for c, b, p, d in rows]
    population = {
        "population": np.array(names, dtype=str),
        "context": ("population", np.array([row[0] for row in rows], dtype=str)),
        "perturbation": ("population", np.array([row[2] for row in rows], dtype=str)),
        "dose": ("population", np.array([row[3] for row in rows], dtype=float)),
        "batch": ("population", np.array([row[1] for row in rows], dtype=str)),
    }
    P, G, S = len(rows), len(genes), num_draws
    active = np.array([row[2] != "inert" for row in rows])[:, None] * (np.arange(G) < max(G // 3, 1))
    control = 2.0 + 0.1 * rng.standard_normal((1, S, P, G))
    shift = active + 0.1 * rng.standard_normal((1, S, P, G))
    predictions = xr.Dataset(
        {
            "mean": (("chain", "draw", "population", "gene"), (control + shift).astype(np.float32)),
            "shift": (("chain", "draw", "population", "gene"), shift.astype(np.float32)),
            "embedding": (
                ("chain", "draw", "population", "coordinate"),
                rng.standard_normal((1, S, P, 2)).astype(np.float32),
            ),
        },
        coords={**population, "gene": genes, "coordinate": np.arange(2)},
        attrs={"scale": "log1p_cp10k", "units": "log1p(counts per 10,000)"},
    )
    batches = np.array([*training, *predicted], dtype=str)
    centre = np.linspace(-1, 1, len(batches))[:, None] * np.array([1.0, 0.0])
    leading, L = ("leading_condition", "leading_gene"), min(6, G)
    leading_condition = [f"{contexts[0]} | {perturbations[0]}", f"{contexts[-1]} | {perturbations[0]}"]
    posterior = xr.Dataset(
        {
            "microenvironment": (
                ("chain", "draw", "batch", "factor"),
                centre + 0.2 * rng.standard_normal((1, S, len(batches), 2)),
            ),
            "fixed_response": (("chain", "draw", *leading), 1.0 + 0.1 * rng.standard_normal((1, S, 2, L))),
            "batch_response": (
                ("chain", "draw", "batch", *leading),
                (1.0 + 0.3 * centre[:, :1, None]) + 0.1 * rng.standard_normal((1, S, len(batches), 2, L)),
            ),
        },
        coords={
            "batch": batches,
            "in_training": ("batch", np.arange(len(batches)) < len(training)),
            "factor": np.arange(2),
            "leading_condition": leading_condition,
            "gene_name": (leading, np.tile(genes[:L], (2, 1))),
        },
    )
    by_gene = ("population", "gene")
    constant = xr.Dataset(
        {
            "control_n": ("population", np.full(P, control_n)),
            "control_variance": (by_gene, np.full((P, G), 0.5)),
            "noise_variance": (by_gene, np.full((P, G), 0.6)),
            "target_observed": ("population", np.zeros(P, dtype=bool)),
            "training_shift": (by_gene, active + 0.05),
            "training_shift_sd": (by_gene, np.full((P, G), 0.1)),
            "training_num_batches": ("population", np.full(P, len(training))),
            "library_log_ratio": ("population", np.zeros(P)),
            "sd_log_ratio": (by_gene, np.zeros((P, G))),
            "variance_decomposition": ("component", np.array([0.4, 0.1, 0.05, 0.1, 0.2, 0.05, 0.1])),
            "measured_response": (
                ("training_batch", *leading),
                np.broadcast_to(1.0 + 0.3 * centre[: len(training), :1, None], (len(training), 2, L)),
            ),
        },
        coords={
            **population,
            "gene": genes,
            "component": list(COMPONENTS),
            "training_batch": np.array(training, dtype=str),
            "leading_condition": leading_condition,
        },
    )
    trained = [f"{c} | {p} | {b}" for c, b, p in product(contexts, training, ("DMSO", *perturbations))]
    constant.attrs = {
        "warnings": json.dumps(list(warnings)),
        "data_summary": json.dumps(
            {
                "num_cells": 60 * len(trained),
                "num_populations": len(trained),
                "num_batches": len(training),
                "contexts": list(contexts),
                "perturbations": list(perturbations),
                "held_out": names,
            }
        ),
        "training_populations": json.dumps(trained),
    }
    observations = 200
    predictive = rng.standard_normal((1, S, observations))
    observed = rng.standard_normal(observations) + observed_shift
    check = {
        "population_name": ("observation", np.resize(np.array(trained, dtype=str), observations)),
        "gene_name": ("observation", np.resize(genes, observations)),
        "batch_name": (
            "observation",
            np.resize(np.array([name.split(" | ")[-1] for name in trained]), observations),
        ),
    }
    groups = {
        "predictions": predictions,
        "posterior": posterior,
        "log_likelihood": xr.Dataset(
            {"response": (("chain", "draw", "batch"), rng.standard_normal((1, S, len(training))))},
            coords={"batch": np.array(training, dtype=str)},
        ),
        "posterior_predictive": xr.Dataset(
            {"population_mean": (("chain", "draw", "observation"), predictive)},
            coords={"observation": np.arange(observations), **check},
        ),
        "observed_data": xr.Dataset(
            {
                "control_mean": (by_gene, np.full((P, G), 2.0)),
                "population_mean": ("observation", observed),
            },
            coords={**population, "gene": genes},
        ),
        "constant_data": constant,
        "sample_stats": xr.Dataset({"elbo": (("chain", "svi_step"), np.linspace(-100, -1, 50)[None])}),
    }
    tree = xr.DataTree.from_dict(groups)
    keys = {
        "perturbation": "drug",
        "control": "DMSO",
        "context": ["cell_type"],
        "batch": "donor",
        "dose": None if np.isnan(doses).all() else "dose",
        "library_size": None,
        "layer": None,
        "scale": "counts",
    }
    tree.attrs = {"hilbertcell_version": "0.1.0", "keys": json.dumps(keys), "seed": seed, "observe": 0}
    return tree


def fake_scores(draws: xr.DataTree, covered_90: float = 0.88) -> dict:
    """What `evaluate` writes of draws, as far as the report reads it."""
    levels = {"covered_50": 0.48, "covered_80": 0.78, "covered_90": covered_90, "covered_95": 0.94}
    batches = dict.fromkeys(draws["predictions"]["batch"].values.astype(str))
    per_batch = {
        name: [value + 0.02 * (-1) ** b for b in range(len(batches))] for name, value in levels.items()
    }
    prediction = {"mean": levels, "per_batch": per_batch, "pit_counts": [10] * 10}
    return {
        "num_draws": int(draws["predictions"].sizes["draw"]),
        "law": {"models": {"prediction": prediction}},
        "targets": {name: {} for name in draws["predictions"]["population"].values.astype(str)},
    }
