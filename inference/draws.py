"""Predict: from a fit and the cells of its batches to labelled draws of whole response distributions."""

import json
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import pandas as pd
import xarray as xr
from rich.progress import Progress

from hilbertcell.data.grouping import population_name
from hilbertcell.data.moments import Moments
from hilbertcell.data.perturbations import perturbation_table
from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError, listing
from hilbertcell.inference.predictive import (
    BatchTargets,
    align,
    batch_log_density,
    draw_batch,
    draw_globals,
    draw_microenvironments,
)
from hilbertcell.inference.tables import (
    Condition,
    ProgramTable,
    Vocabulary,
    condition_of,
    program_table,
    shrunken_covariance,
)
from hilbertcell.inference.training_summary import target_constants, variance_shares
from hilbertcell.models.microenvironment import Globals, Observations

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

# Means of the same cells summed in another order agree to far better than this; other cells do not.
_SAME_CONTROLS = 1e-8
# (population, gene) pairs of training populations kept for posterior predictive plots.
_NUM_CHECKS = 400


class _Given(NamedTuple):
    """What the file told about its batches."""

    moments: Moments
    table: ProgramTable
    new: frozenset[str]  # batches conditioned on the file alone
    notices: list[str]


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
    given = _read(fit, populations, observe, new_batch)
    wanted = _targets(fit, given.moments.labels, targets)
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
    asked = {batch: _batch_targets(fit, names, wanted, batch, tables[batch]) for batch in tables}

    num_targets, num_genes = len(wanted), len(fit.genes)
    shape = (num_samples, num_targets)
    mean, shift = np.empty((*shape, num_genes), np.float32), np.empty((*shape, num_genes), np.float32)
    embedding = np.empty((*shape, fit.coordinates.A.shape[1]), np.float32)
    u_new = {batch: [] for batch in tables if batch in given.new}
    u_train, loglik, scalars, shares, checks = [], [], [], [], []
    check = _Checks(fit, seed)
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
            shares.append(variance_shares(fit, keys[:5], jax.tree.map(lambda leaf: leaf[:5], globals_)))
            checks.append(check.draw(jax.random.fold_in(key, len(tables) + 1), globals_))
            bar.advance(task, block.stop - block.start)
    batches = [*fit.table.batches, *(f"{b} (new)" if b in fit.table.batches else b for b in u_new)]
    factors = np.concatenate([np.concatenate(u_train), *(np.concatenate(u)[:, None] for u in u_new.values())], axis=1)
    tree = _assemble(
        fit, given, wanted, mean, shift, embedding, batches, align(factors)[0], np.concatenate(loglik),
        {name: np.concatenate([s[name] for s in scalars]) for name in scalars[0]},
        np.mean(shares, axis=0), check, np.concatenate(checks),
    )  # fmt: skip
    tree.attrs["seed"], tree.attrs["observe"] = seed, int(observe)
    return tree


def _read(fit: "Fit", populations: Populations, observe: bool, new_batch: bool) -> _Given:
    """Moments of the file's batches, checked against what the fit knows."""
    if populations.keys.scale != fit.keys.scale:
        raise DataError(
            f"scale = {populations.keys.scale!r}: the fit was made on {fit.keys.scale!r}; give the same scale of data"
        )
    populations = populations.match_genes(fit.genes)
    labels, notices = populations.labels, []
    if not observe and not labels["is_control"].all():
        ignored = int((~labels["is_control"]).sum())
        notices.append(f"{ignored} perturbed populations of the file were ignored (observe conditions on them)")
        populations = populations.select(labels["is_control"])
    labels = populations.labels
    unknown = sorted(set(labels["context"]) - set(fit.names.contexts))
    if unknown:
        raise DataError(
            f"context = {listing(unknown)}: unknown to the fit, which has {listing(fit.names.contexts)}; leave these "
            "cells out or fit with them"
        )
    if observe:
        strangers = sorted(set(condition_of(labels[~labels["is_control"]])) - set(fit.names.conditions))
        if strangers:
            raise DataError(
                f"observed = {listing([' | '.join(map(str, c[:2])) for c in strangers])}: conditions that the fit was "
                "not trained on cannot be conditioned on; leave their cells out or fit with them"
            )
    moments = fit.summarise(populations)
    known = set(fit.table.batches)
    new = frozenset(b for b in labels["batch"].unique() if new_batch or b not in known)
    for batch in sorted(set(labels["batch"]) - new):
        _check_same_controls(fit, moments, batch)
    within = shrunken_covariance(moments, fit.prior, fit.names.contexts)
    if observe and not set(labels["batch"]) <= new:
        known_here = sorted(set(labels["batch"]) - new)
        notices.append(f"batches {listing(known_here)} are training batches: their training populations are used")
    table = program_table(moments.labels, moments.mean, within.noise_variance, fit.names, fit.unit)
    return _Given(moments, table, new, [*populations.warnings, *notices])


def _check_same_controls(fit: "Fit", moments: Moments, batch: str) -> None:
    """A batch of a known name must bring the controls that training saw."""
    theirs = moments.labels.index[(moments.labels["batch"] == batch) & moments.labels["is_control"]]
    for name in theirs:
        j = moments.labels.index.get_loc(name)
        same = name in fit.moments.labels.index
        if same:
            i = fit.moments.labels.index.get_loc(name)
            gap = np.abs(fit.moments.mean[i] - moments.mean[j]) / fit.unit.scale
            same = fit.moments.n[i] == moments.n[j] and gap.max() < _SAME_CONTROLS
        if not same:
            raise DataError(
                f"batch = {batch!r}: the fit knows a batch of this name, but its control population {name!r} is not "
                "the one that training saw; if this is another batch, rename it or ask for --new-batch"
            )


def _targets(fit: "Fit", labels: pd.DataFrame, targets: pd.DataFrame | None) -> pd.DataFrame:
    """The targets as a table of populations, sorted, named and checked."""
    pairs = labels[["context", "batch"]].drop_duplicates()
    if targets is None:
        levels = pd.DataFrame(fit.names.levels, columns=["perturbation", "dose"])
        wanted = pairs.merge(levels, how="cross")
    else:
        lacking = [column for column in ("context", "perturbation", "batch") if column not in targets.columns]
        if lacking:
            raise DataError(f"targets = {listing(list(targets.columns))}: columns {listing(lacking)} are missing; add them")
        wanted = targets.copy()
        wanted["dose"] = pd.to_numeric(wanted["dose"], errors="coerce").fillna(-1.0) if "dose" in wanted else -1.0
        for column in ("context", "perturbation", "batch"):
            wanted[column] = wanted[column].astype(str)
        lost = wanted.merge(pairs, how="left", indicator=True)
        lost = lost[lost["_merge"] == "left_only"]
        if len(lost):
            row = lost.iloc[0]
            raise DataError(
                f"targets: context {row['context']!r} in batch {row['batch']!r} is not in the file; it has "
                f"{listing([f'{c} | {b}' for c, b in pairs.itertuples(index=False)])}"
            )
        if (wanted["perturbation"] == fit.keys.control).any():
            raise DataError(f"targets: perturbation {fit.keys.control!r} is the control label; ask for perturbed ones")
    if wanted.empty:
        raise DataError("targets = none: nothing to predict; name at least one context, perturbation and batch")
    wanted = wanted.drop_duplicates().sort_values(["context", "batch", "perturbation", "dose"], ignore_index=True)
    wanted["dose"] = wanted["dose"].where(wanted["dose"] >= 0)
    wanted.index = pd.Index(
        [population_name(r.context, r.perturbation, r.dose, r.batch) for r in wanted.itertuples()], name="population"
    )
    return wanted


def _batch_targets(
    fit: "Fit", names: Vocabulary, wanted: pd.DataFrame, batch: str, table: ProgramTable
) -> BatchTargets:
    """One batch's observations and what is asked of it."""
    here = wanted[wanted["batch"] == batch]
    position = {condition: i for i, condition in enumerate(names.conditions)}
    condition = np.array([position[c] for c in condition_of(here)], dtype=int)
    context = np.array([names.contexts.index(c) for c in here["context"]], dtype=int)
    observations = table.batch(batch)
    num_contexts = len(names.contexts)
    slots = {
        int(observations.condition[slot]): num_contexts + slot
        for slot in range(observations.condition.shape[0])
        if observations.observed[num_contexts + slot]
    }
    observed = np.array([c in slots for c in condition])
    slot = np.array([slots.get(c, 0) for c in condition])
    seen = Observations(observations.mean[slot], observations.noise[slot], observed, condition, context)
    return BatchTargets(observations, condition, context, seen)


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


class _Checks:
    """Training populations predicted from their own controls, for posterior predictive plots."""

    def __init__(self, fit: "Fit", seed: int) -> None:
        table, num_contexts = fit.table, len(fit.names.contexts)
        self.fit = fit
        blind = table.observations.observed.copy()
        blind[:, num_contexts:] = False
        self.observations = table.observations._replace(observed=blind)
        rng = np.random.default_rng(seed)
        slots = np.argwhere(table.observations.observed[:, num_contexts:])
        count = min(_NUM_CHECKS, len(slots) * len(fit.genes))
        flat = rng.choice(len(slots) * len(fit.genes), count, replace=False)
        self.batch, self.slot = slots[flat // len(fit.genes)].T
        self.gene = flat % len(fit.genes)
        self.row = table.rows[self.batch, num_contexts + self.slot]
        self.noise = table.observations.noise[self.batch, num_contexts + self.slot, self.gene]
        self.observed = table.observations.mean[self.batch, num_contexts + self.slot, self.gene]
        self.rng = rng

    def draw(self, key: jax.Array, globals_: Globals) -> np.ndarray:
        """Predictive draws (S, observation) of the chosen summaries, cell noise included, standardised."""
        draws = np.empty((globals_.slope.shape[0], len(self.gene)))
        for b in np.unique(self.batch):
            observations = Observations(*(field[b] for field in self.observations))
            nobody = Observations(
                observations.mean[:1].repeat(len(observations.condition), 0),
                observations.noise[:1].repeat(len(observations.condition), 0),
                np.zeros(len(observations.condition), bool), observations.condition, observations.context,
            )  # fmt: skip
            targets = BatchTargets(observations, observations.condition, observations.context, nobody)
            chosen = self.batch == b
            response = draw_batch(jax.random.fold_in(key, int(b)), globals_, targets).response
            draws[:, chosen] = response[:, self.slot[chosen], self.gene[chosen]]
        return draws + np.sqrt(self.noise) * self.rng.standard_normal(draws.shape)


def _assemble(
    fit: "Fit", given: _Given, wanted: pd.DataFrame, mean: np.ndarray, shift: np.ndarray, embedding: np.ndarray,
    batches: Sequence[str], factors: np.ndarray, loglik: np.ndarray, scalars: dict[str, np.ndarray],
    shares: np.ndarray, check: _Checks, checks: np.ndarray,
) -> xr.DataTree:  # fmt: skip
    """Label everything; see `predict`."""
    from hilbertcell import __version__

    scale = {"counts": "log1p_cp10k"}.get(fit.keys.scale, fit.keys.scale)
    units = {"log1p_cp10k": "log1p(counts per 10,000)", "log1p": "log1p", "other": "units of the data"}[scale]
    population = {
        "population": wanted.index.to_numpy(dtype=str),
        **{name: ("population", wanted[name].to_numpy(dtype=str)) for name in ("context", "perturbation", "batch")},
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
            "condition": [f"{c} | {level}" for (c, _, _), level in zip(fit.names.conditions, levels, strict=True)],
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
    components = ["perturbation", "context", "interaction", "own baseline", "microenvironment", "residual", "sampling noise"]
    constants = constants.assign_coords(**population, **genes, component=components)
    constants["variance_decomposition"] = ("component", shares)
    constants.attrs = {"warnings": json.dumps(given.notices), "data_summary": json.dumps(summary)}
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
