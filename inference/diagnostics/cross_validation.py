"""Laws of batches that training did not see, beside what was measured: by leaving each out in turn, or from draws."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import jax
import numpy as np
import pandas as pd
import xarray as xr

from hilbertcell.data.moments import Moments
from hilbertcell.data.validation import DataError, listing
from hilbertcell.inference.diagnostics.held_out import HeldOut
from hilbertcell.inference.diagnostics.tables import Table, rows_by_batch, table_of
from hilbertcell.inference.gene_draws import gene_draws
from hilbertcell.inference.predictive import BatchTargets, draw_batch, draw_globals
from hilbertcell.inference.tables import condition_of, program_table, shrunken_covariance
from hilbertcell.models.microenvironment import Observations

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

NUM_DRAWS = 200  # per batch: p-values are over batches and draws, and 200 say where the 5 % tails begin


def leave_batches_out(fit: "Fit", seed: int, advance: Callable[[str], None] | None = None) -> list[HeldOut]:
    """Fit again without each batch in turn, and predict its perturbed populations from its controls.

    The stored moments are used, no cells: feature map and sampling noise are those of all batches, everything else is
    learned without the batch. Batches without controls or without a perturbed population whose condition the others hold are
    passed over, and so are those without which nothing can be fitted. The response law is the program's, also where the
    fit has a diffusion around it.
    """
    from hilbertcell.inference.fit import infer

    labels = fit.moments.labels
    perturbed, batch = ~labels["is_control"].to_numpy(dtype=bool), labels["batch"].to_numpy()
    conditions = pd.factorize(pd.Series(condition_of(labels)))[0]
    held = []
    for name in rows_by_batch(labels):
        out = batch == name
        known = out & perturbed & np.isin(conditions, conditions[perturbed & ~out])
        contexts = labels["context"].to_numpy()
        with_control = np.isin(contexts, contexts[out & ~perturbed]) & np.isin(contexts, contexts[~out])
        known &= with_control
        if not known.any() or len(set(batch[~out])) < 2:
            continue
        if advance is not None:
            advance(name)
        kept = fit.moments.select(~out)
        inner = infer(replace(fit, moments=kept, params={}, posterior={}, sampling={}, diffusion=None))
        unseen = fit.moments.select(known | (out & ~perturbed & np.isin(contexts, contexts[~out])))
        held.append(_predict(fit, inner, unseen, name, seed))
    return held


def _predict(fit: "Fit", inner: "Fit", moments: Moments, batch: str, seed: int) -> HeldOut:
    """Predict the perturbed populations of one batch from its controls, in the units of `fit`."""
    within = shrunken_covariance(moments, inner.prior, inner.names.contexts)
    laid_out = program_table(moments.labels, moments.mean, within.noise_variance, inner.names, inner.unit)
    num_contexts, num_genes = len(inner.names.contexts), len(fit.genes)
    slots = laid_out.batch(batch)
    blind = slots._replace(observed=slots.observed & (np.arange(len(slots.observed)) < num_contexts))
    number = len(slots.condition)
    nobody = Observations(
        slots.mean[num_contexts:],
        slots.noise[num_contexts:],
        np.zeros(number, bool),
        slots.condition,
        slots.context,
    )
    asked = BatchTargets(blind, slots.condition, slots.context, nobody, np.arange(number, dtype=np.uint32))
    keys = jax.random.split(jax.random.key(seed + 1), NUM_DRAWS)
    with jax.enable_x64(True):
        response = np.concatenate(
            [
                draw_batch(keys[block], globals_, asked).response[..., :num_genes]
                for block, globals_ in draw_globals(inner, inner.names, inner.perturbations, NUM_DRAWS, seed)
            ]
        )
    table = table_of(fit, moments)
    rows = laid_out.rows[0, num_contexts:]
    to_unit = fit.unit.scale[:num_genes], fit.unit.center[:num_genes]
    latent = (inner.unit.undo(_padded(response, inner.unit.center))[..., :num_genes] - to_unit[1]) / to_unit[
        0
    ]
    return _held_out(table, rows, latent, batch, seed)


def _padded(response: np.ndarray, center: np.ndarray) -> np.ndarray:
    """Draws (..., G) with zeros for the features behind the genes: (..., D)."""
    missing = len(center) - response.shape[-1]
    return np.pad(response, [(0, 0)] * (response.ndim - 1) + [(0, missing)])


def _held_out(table: Table, rows: np.ndarray, latent: np.ndarray, batch: str, seed: int) -> HeldOut:
    """Noise added to draws (S, T, G) of latent means of the populations in `rows` of `table`, one batch of it."""
    observed = latent + table.noise(np.random.default_rng(seed), len(latent), rows)
    kinds = table.kinds()
    own = kinds.control[table.kind[rows]]
    batches = list(rows_by_batch(table.labels))
    control = table.mean[kinds.row[batches.index(batch), own]]
    return HeldOut(batch, table.mean[rows], observed, control)


def from_draws(fit: "Fit", draws: xr.DataTree, truth: Moments, seed: int) -> list[HeldOut]:
    """Predicted populations of a file of draws beside their measured means, batch by batch.

    Args:
        fit: the fit that the draws were made with.
        draws: the tree of `Fit.predict`.
        truth: moments of measured populations, under the feature map of the fit.
        seed: of the noise that is added to the draws.

    Raises:
        DataError: other genes than the fit's; none of the predicted populations is in the truth.
    """
    predictions = draws["predictions"].dataset
    if list(predictions["gene"].values.astype(str)) != list(fit.genes.astype(str)):
        raise DataError(
            "draws: their genes are not those of the fit; give draws that were made with this fit"
        )
    names = pd.Index(predictions["population"].values.astype(str))
    observed = draws["constant_data"]["target_observed"].values.astype(bool)
    wanted = names[~observed & names.isin(truth.labels.index)]
    if not len(wanted):
        raise DataError(
            f"truth = {listing(truth.labels.index.tolist())}: holds none of the predicted populations "
            f"{listing(names.tolist())}; give the file with the perturbed cells that were held out"
        )
    truth = truth.select(truth.labels.index.isin(wanted))
    table, num_genes = table_of(fit, truth), len(fit.genes)
    center, scale = fit.unit.center[:num_genes], fit.unit.scale[:num_genes]
    control = draws["observed_data"]["control_mean"]
    rng, held = np.random.default_rng(seed), []
    for batch, rows in rows_by_batch(table.labels).items():
        populations = table.labels.index[rows]
        latent = np.stack([gene_draws(draws, "mean", name)[:NUM_DRAWS] for name in populations], axis=1)
        own = (control.sel(population=list(populations)).values - center) / scale
        with_control = np.isfinite(own).all(1)
        rows, latent, own = rows[with_control], latent[:, with_control], own[with_control]
        if len(rows):
            observable = (latent - center) / scale + table.noise(rng, len(latent), rows)
            held.append(HeldOut(batch, table.mean[rows], observable, own))
    return held
