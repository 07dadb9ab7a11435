"""One population in every batch: what a condition does everywhere, and what it would do under each microenvironment.

A response is a part common to all batches, `effect_j` (fixed), plus what the batch adds to it (random):
`s_j (slope x_c + d + Lambda_j . u)`; symbols as in `models.microenvironment`. The latents of every batch are put into
the program for the same few conditions, whether these were measured in the batch or not.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from hilbertcell.inference.tables import condition_of
from hilbertcell.models.microenvironment import Globals, Observations

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit
    from hilbertcell.inference.requests import Given

# Kept in the draws: 500 draws of 50 batches x 12 conditions x 6 genes take 7 MB.
_CONDITIONS, _GENES = 12, 6
_TAILS = (0.05, 0.95)


class LeadingResponses(NamedTuple):
    """The conditions with the strongest common effects, M of them, and L genes of each."""

    condition: np.ndarray  # (M,) index into the conditions of training
    context: np.ndarray  # (M,)
    gene: np.ndarray  # (M, L)


def leading_responses(fit: "Fit", globals_: Globals) -> LeadingResponses:
    """Chosen by how far the 90 % interval of the common effect lies from zero, under draws of the globals (S, ...)."""
    num_genes = len(fit.genes)
    unit = fit.unit.scale[:num_genes]
    effect = np.asarray(globals_.effect[:, : len(fit.names.conditions), :num_genes]) * unit
    low, high = np.quantile(effect, _TAILS, axis=0)
    certain = np.maximum(np.maximum(low, -high), 0.0)  # (E, G), 0 where the interval holds zero
    condition = np.argsort(-certain.sum(axis=1), kind="stable")[:_CONDITIONS]
    size = np.abs(effect.mean(axis=0))[condition]
    order = np.lexsort((-size, -certain[condition]), axis=1)
    contexts = [fit.names.contexts.index(fit.names.conditions[e][0]) for e in condition]
    return LeadingResponses(condition, np.array(contexts, int), order[:, :_GENES])


def new_batches(given: "Given") -> tuple[list[str], Observations]:
    """The batches that are conditioned on the file alone, and what it says of them."""
    rows = [i for i, batch in enumerate(given.table.batches) if batch in given.new]
    return [given.table.batches[i] for i in rows], Observations(*(f[rows] for f in given.table.observations))


def measured_responses(fit: "Fit", leading: LeadingResponses) -> np.ndarray:
    """Perturbed minus control mean (B, M, L) of the training batches, units of the data; nan where not measured."""
    labels, mean = fit.moments.labels, fit.moments.mean
    keys = zip(condition_of(labels), labels["batch"], labels["is_control"], strict=True)
    perturbed, control = {}, {}
    for row, (condition, batch, is_control) in enumerate(keys):
        if is_control:
            control[condition[0], batch] = row
        else:
            perturbed[condition, batch] = row
    out = np.full((len(fit.table.batches), *leading.gene.shape), np.nan)
    for b, batch in enumerate(fit.table.batches):
        for m, condition in enumerate(fit.names.conditions[e] for e in leading.condition):
            pair = perturbed.get((condition, batch)), control.get((condition[0], batch))
            if pair[0] is not None and pair[1] is not None:
                out[b, m] = (mean[pair[0]] - mean[pair[1]])[leading.gene[m]]
    return out
