"""What is asked of a fit: the batches of a file, checked against what training saw, and the targets."""

import zlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from hilbertcell.data.grouping import population_name
from hilbertcell.data.moments import Moments
from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError, listing
from hilbertcell.inference.predictive import BatchTargets
from hilbertcell.inference.tables import (
    ProgramTable,
    Vocabulary,
    condition_of,
    program_table,
    shrunken_covariance,
)
from hilbertcell.models.microenvironment import Observations

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

# Means of the same cells summed in another order agree to far better than this; other cells do not.
_SAME_CONTROLS = 1e-8


class Given(NamedTuple):
    """What the file told about its batches."""

    moments: Moments
    table: ProgramTable
    new: frozenset[str]  # batches conditioned on the file alone
    notices: list[str]


def read_batches(fit: "Fit", populations: Populations, observe: bool, new_batch: bool) -> Given:
    """Moments of the file's batches, checked against what the fit knows."""
    if populations.keys.scale != fit.keys.scale:
        raise DataError(
            f"scale = {populations.keys.scale!r}: the fit was made on {fit.keys.scale!r}; give the same scale of data"
        )
    populations = populations.match_genes(fit.genes)
    labels, notices = populations.labels, []
    if not observe and not labels["is_control"].all():
        ignored = int((~labels["is_control"]).sum())
        notices.append(
            f"{ignored} perturbed populations of the file were ignored (observe conditions on them)"
        )
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
        notices.append(
            f"batches {listing(known_here)} are training batches: their training populations are used"
        )
    table = program_table(moments.labels, moments.mean, within.noise_variance, fit.names, fit.unit)
    return Given(moments, table, new, [*populations.warnings, *notices])


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


def choose_targets(fit: "Fit", labels: pd.DataFrame, targets: pd.DataFrame | None) -> pd.DataFrame:
    """The targets as a table of populations, sorted, named and checked."""
    pairs = labels[["context", "batch"]].drop_duplicates()
    if targets is None:
        levels = pd.DataFrame(fit.names.levels, columns=["perturbation", "dose"])
        wanted = pairs.merge(levels, how="cross")
    else:
        lacking = [column for column in ("context", "perturbation", "batch") if column not in targets.columns]
        if lacking:
            raise DataError(
                f"targets = {listing(list(targets.columns))}: columns {listing(lacking)} are missing; add them"
            )
        wanted = targets.copy()
        wanted["dose"] = _doses(wanted["dose"]) if "dose" in wanted else -1.0
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
            raise DataError(
                f"targets: perturbation {fit.keys.control!r} is the control label; ask for perturbed ones"
            )
    if wanted.empty:
        raise DataError(
            "targets = none: nothing to predict; name at least one context, perturbation and batch"
        )
    wanted = wanted.drop_duplicates().sort_values(
        ["context", "batch", "perturbation", "dose"], ignore_index=True
    )
    wanted["dose"] = wanted["dose"].where(wanted["dose"] >= 0)
    wanted.index = pd.Index(
        [population_name(r.context, r.perturbation, r.dose, r.batch) for r in wanted.itertuples()],
        name="population",
    )
    return wanted


def _doses(column: pd.Series) -> pd.Series:
    """Doses as numbers, -1 where there is none."""
    doses = pd.to_numeric(column, errors="coerce")
    wrong = column[doses.isna() & column.notna() & (column.astype(str).str.strip() != "")]
    if len(wrong) or (doses <= 0).any():
        given = wrong.iloc[0] if len(wrong) else doses[doses <= 0].iloc[0]
        raise DataError(
            f"targets: dose {given!r} is not a positive number; leave it empty where there is no dose"
        )
    return doses.fillna(-1.0)


def batch_targets(
    names: Vocabulary, wanted: pd.DataFrame, rows: np.ndarray, table: ProgramTable
) -> BatchTargets:
    """One batch's observations and what is asked of it: positions `rows` of `wanted`, all of one batch."""
    here = wanted.iloc[rows]
    batch = here["batch"].iloc[0]
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
    identity = np.array([stream_of(name) for name in here.index], dtype=np.uint32)
    return BatchTargets(observations, condition, context, seen, identity)


def stream_of(name: str) -> int:
    """What a name folds into a random key: the same whatever else is asked, 32 bits."""
    return zlib.crc32(name.encode())
