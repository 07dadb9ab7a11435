"""Score stored draws against the populations that were held out: needs the draws and the true cells, no other file."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData

from hilbertcell.analyses.cell_summary import score_cells, summarise_cells
from hilbertcell.analyses.gene_table import gene_table, natural_cells
from hilbertcell.analyses.law_summary import NULL, jsonable, score_targets, summarise_law
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Keys, Populations
from hilbertcell.data.splits import LeakError
from hilbertcell.data.validation import DataError, listing
from hilbertcell.inference.gene_draws import gene_draws
from hilbertcell.models.baselines import shift_law

MODEL = "prediction"
PREDICTED_MEAN = -1  # obs['draw'] of cells of the predictive-mean population


def evaluate(
    draws: xr.DataTree, truth: Populations, cells: AnnData | None = None, *, seed: int = 0
) -> dict[str, Any]:
    """Scores of predicted laws, and of predicted cells if given, against the true populations; JSON-able.

    Args:
        draws: what `Fit.predict` returns.
        truth: populations with the true perturbed cells, and for `cells` the controls; same genes and scale.
        cells: predicted cells from `Fit.sample_cells`, several draws or one.
        seed: of the truth's noise, of the null's draws and of the choice of equally many cells.

    The law is compared with the null, controls + mean shift of the training batches with their spread
    (`models.baselines.shift_law`), rebuilt from what the draws carry; both are scored on the same targets. Only targets
    that `truth` holds are scored. Targets of which the fit was shown cells are left out and listed as `observed`.
    Units: as the data for counts and log1p, each gene's standard deviation over all cells of `truth` otherwise.

    Raises:
        LeakError: the fit was trained on a target that is not marked as observed.
        DataError: no target is in `truth`, or scales or genes differ.

    """
    predictions, constant = draws["predictions"].dataset, draws["constant_data"].dataset
    keys = Keys.from_dict(json.loads(draws.attrs["keys"]))
    if keys.scale != truth.keys.scale:
        raise DataError(
            f"scale = {truth.keys.scale!r}: the draws are on scale {keys.scale!r}; read the truth alike"
        )
    truth = truth.match_genes(predictions["gene"].values.astype(str))
    names = pd.Index(predictions["population"].values.astype(str))
    observed = names[constant["target_observed"].sel(population=names).values.astype(bool)]
    _check_leaks(constant.attrs, names.difference(observed))
    wanted = names.difference(observed, sort=False).intersection(truth.labels.index, sort=False)
    if not len(wanted):
        raise DataError(
            f"targets = {listing(names.tolist())}: none of them (without the observed ones) is in the truth, which has "
            f"{listing(truth.labels.index.tolist())}; read it with the keys of the fit"
        )
    table = gene_table(truth)
    target = table.rows(wanted)
    unit = table.total_sd() if keys.scale == "other" else np.ones(len(truth.genes))
    num_draws = predictions.sizes["chain"] * predictions.sizes["draw"]
    own = (gene_draws(draws, "mean", name)[:, None] for name in wanted)
    null = _null_draws(draws, wanted, num_draws, seed)
    scores = {
        NULL: score_targets(null, target, unit, seed),
        MODEL: score_targets(own, target, unit, seed),
    }
    if (
        not scores[NULL].targets["crps"].notna().any()
    ):  # no target's pair was seen in training: there is no null
        del scores[NULL]
    result: dict[str, Any] = {
        "num_draws": num_draws,
        "unit": "standard deviation of each gene over all cells of the truth"
        if keys.scale == "other"
        else keys.scale,
        "observed": observed.tolist(),
        "not_in_truth": names.difference(truth.labels.index).tolist(),
        "law": summarise_law(scores, target.labels, seed),
        "targets": {
            name: {model: scores[model].targets.loc[name].to_dict() for model in scores} for name in wanted
        },
    }
    if cells is not None:
        result["cells"] = _evaluate_cells(cells, truth, keys, wanted, seed)
    return jsonable(result)


def _check_leaks(attrs: Mapping[str, Any], targets: pd.Index) -> None:
    if "training_populations" not in attrs:
        raise DataError(
            "draws = constant_data has no attribute 'training_populations': it is not known which cells the fit "
            "saw; predict again with this version"
        )
    leaked = targets.intersection(json.loads(attrs["training_populations"])).tolist()
    if leaked:
        raise LeakError(
            f"targets = {listing(leaked)}: the fit was trained on them; a score would be praise for memory. Fit with "
            "a split that holds them out, or predict with --observe, which marks them"
        )


def _null_draws(draws: xr.DataTree, names: pd.Index, num_draws: int, seed: int) -> Iterator[np.ndarray]:
    """Draws (S, 1, G) of the null for each target; nan where its pair was never seen or controls are absent."""
    constant = draws["constant_data"].dataset.sel(population=names)
    control_mean = draws["observed_data"].dataset["control_mean"].sel(population=names).values
    number = constant["training_num_batches"].values.astype(np.float64)
    shift_sd = np.nan_to_num(constant["training_shift_sd"].values)  # one batch cannot say how batches differ
    noise = constant["control_variance"].values / constant["control_n"].values[:, None]
    shift = constant["training_shift"].values.astype(np.float64)
    rng = np.random.default_rng(seed)
    for t in range(len(names)):
        one = slice(t, t + 1)
        yield shift_law(
            control_mean[one].astype(np.float64), noise[one], shift[one], shift_sd[one].astype(np.float64) ** 2,
            np.where(number > 0, number, np.nan)[one], num_draws, rng,
        )  # fmt: skip


def _evaluate_cells(
    cells: AnnData, truth: Populations, keys: Keys, names: pd.Index, seed: int
) -> dict[str, Any]:
    """Cell metrics per target, averaged over the drawn populations; no two draws are ever pooled."""
    number_of_draw = (
        cells.obs["draw"].to_numpy() if "draw" in cells.obs else np.full(cells.n_obs, PREDICTED_MEAN)
    )
    rows: list[dict[str, Any]] = []
    for draw in np.unique(number_of_draw):
        one = cells[number_of_draw == draw].copy()
        predicted = read_populations(
            one, **vars(replace(keys, layer=None)), require=("perturbed",)
        ).match_genes(truth.genes)
        for name in names.intersection(predicted.labels.index):
            rng = np.random.default_rng(seed)
            positions, true_positions = predicted.cells_of(name), truth.cells_of(name)
            number = min(len(positions), len(true_positions))
            if number < 2:
                continue
            reference = _untouched_controls(truth, name, one)
            scores = score_cells(
                natural_cells(predicted, np.sort(rng.choice(positions, number, replace=False))),
                natural_cells(truth, np.sort(rng.choice(true_positions, number, replace=False))),
                natural_cells(truth, reference) if len(reference) > 1 else None,
            )
            rows.append({"population": name, "num_cells": number, "num_reference": len(reference), **scores})
    if not rows:
        raise DataError(
            "cells: no predicted population of two cells or more is among the targets in the truth"
        )
    table = pd.DataFrame(rows).groupby("population").mean()
    batch = truth.labels.loc[table.index, "batch"]
    summary = summarise_cells({MODEL: table}, batch, seed)
    summary["targets"] = table.to_dict(orient="index")
    if (table["num_reference"] < 2).any():
        summary["note"] = (
            "where all controls were transported none is left as a reference: DE genes and Pearson are missing there"
        )
    return summary


def _untouched_controls(truth: Populations, name: str, predicted: AnnData) -> np.ndarray:
    """Positions of the control cells of the population's (context, batch) that no predicted cell was made from."""
    labels = truth.labels
    row = labels.loc[name]
    same = labels["is_control"] & (labels["context"] == row["context"]) & (labels["batch"] == row["batch"])
    positions = [truth.cells_of(control) for control in labels.index[same]]
    if not positions:
        return np.empty(0, dtype=int)
    used = set(predicted.obs["source_cell"].astype(str)) if "source_cell" in predicted.obs else set()
    return np.array([p for p in positions[0] if truth.cell_names[p] not in used], dtype=int)
