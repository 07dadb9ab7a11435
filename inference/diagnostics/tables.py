"""From a fit to the arrays that checks take: standardised means of genes, their noise, replicated tables, covariates."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from hilbertcell.data.moments import Moments
from hilbertcell.inference.diagnostics.replicates import Kinds
from hilbertcell.inference.tables import condition_of, shrunken_covariance
from hilbertcell.models.within_covariance import WithinCovariance

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit


class Table(NamedTuple):
    """P populations, standardised means of G genes."""

    labels: pd.DataFrame
    mean: np.ndarray  # (P, G)
    noise_variance: np.ndarray  # (P, G)
    within: WithinCovariance  # of all features, in units of the feature map
    unit: np.ndarray  # (G,) what a standardised gene is multiplied with
    kind: np.ndarray  # (P,) controls of a context or a condition, as int

    def noise(self, rng: np.random.Generator, number: int, rows: np.ndarray | None = None) -> np.ndarray:
        """Draws (number, P, G) of the sampling noise of the means, correlated between genes; float32. `rows`: of these P only."""
        rows = np.arange(len(self.mean)) if rows is None else rows
        genes = slice(0, len(self.unit))
        out = np.empty((number, len(rows), len(self.unit)), np.float32)
        loadings = self.within.loadings[genes]
        for place, j in enumerate(rows):
            values, vectors = np.linalg.eigh(self.within.factor[j])
            to_genes = loadings @ (vectors * np.sqrt(np.maximum(values, 0.0)))
            draw = rng.standard_normal((number, to_genes.shape[1])) @ to_genes.T
            draw += np.sqrt(self.within.rest[j, genes]) * rng.standard_normal((number, len(self.unit)))
            out[:, place] = draw / (np.sqrt(self.within.n[j]) * self.unit)
        return out

    def residual(self) -> np.ndarray:
        """(P, G) means minus the average of their kind, in sds of their noise; 0 where a kind has one population."""
        average = pd.DataFrame(self.mean).groupby(self.kind).transform("mean").to_numpy()
        return (self.mean - average) / np.sqrt(self.noise_variance)

    def kinds(self) -> Kinds:
        """Rows by batch and kind."""
        batch = np.unique(self.labels["batch"], return_inverse=True)[1]
        row = np.full((batch.max() + 1, self.kind.max() + 1), -1)
        row[batch, self.kind] = np.arange(len(self.kind))
        context = self.labels["context"].to_numpy()
        control = np.arange(row.shape[1])
        own = {context[j]: self.kind[j] for j in np.flatnonzero(self.labels["is_control"])}
        for j, kind in enumerate(self.kind):
            control[kind] = own.get(context[j], kind)
        return Kinds(row, control)

    def responses(self) -> tuple[np.ndarray, np.ndarray]:
        """Perturbed minus control means (B, E, G) and whether both are there (B, E)."""
        kinds = self.kinds()
        perturbed = np.flatnonzero(kinds.control != np.arange(len(kinds.control)))
        means = kinds.gather(self.mean)
        found = means[:, perturbed] - means[:, kinds.control[perturbed]]
        return found, np.isfinite(found).all(-1)


def table_of(fit: "Fit", moments: Moments) -> Table:
    """Populations of `moments` in the units of the fit, genes only."""
    within = shrunken_covariance(moments, fit.prior, fit.names.contexts)
    genes = slice(0, len(fit.genes))
    unit = fit.unit.scale[genes]
    names = [
        (context, "" if control else perturbation, dose)
        for (context, perturbation, dose), control in zip(
            condition_of(moments.labels), moments.labels["is_control"], strict=True
        )
    ]
    place = {name: i for i, name in enumerate(sorted(set(names)))}
    return Table(
        moments.labels,
        fit.unit.apply(moments.mean)[:, genes],
        within.noise_variance[:, genes] / unit**2,
        within,
        unit,
        np.array([place[name] for name in names]),
    )


def rows_by_batch(labels: pd.DataFrame) -> dict[str, np.ndarray]:
    """Rows of each batch, batches in order."""
    batch = labels["batch"].to_numpy()
    return {str(name): np.flatnonzero(batch == name) for name in sorted(set(batch))}


def pairs_between(kind: np.ndarray, batch: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """(N, 2) rows of one kind and different batches, one of `first` (bool, P) and one of `second`, each pair once."""
    i, j = np.nonzero((kind[:, None] == kind) & (batch[:, None] != batch) & first[:, None] & second)
    return np.unique(np.sort(np.column_stack([i, j]), axis=1), axis=0)


def covariates(moments: Moments) -> tuple[np.ndarray, tuple[str, ...]]:
    """What is technical about each batch, (B, M) and names: those that differ between batches.

    Library size: mean log over populations (counts only). Cells: log of their number. Composition: the leading principal
    component of the log shares of contexts among the controls, half a cell added.
    """
    labels = moments.labels
    groups = rows_by_batch(labels)
    columns: dict[str, list[float] | np.ndarray] = {
        "number of cells": [np.log(moments.n[rows].sum()) for rows in groups.values()]
    }
    if np.isfinite(moments.log_library).all():
        columns["library size"] = [moments.log_library[rows].mean() for rows in groups.values()]
    control = labels["is_control"].to_numpy(dtype=bool)
    contexts = sorted(set(labels["context"]))
    if len(contexts) > 1:
        counts = np.array(
            [
                [
                    moments.n[rows][(labels["context"].to_numpy()[rows] == c) & control[rows]].sum()
                    for c in contexts
                ]
                for rows in groups.values()
            ]
        )
        shares = np.log(counts + 0.5)
        shares -= shares.mean(1, keepdims=True)
        left, values, _ = np.linalg.svd(shares - shares.mean(0), full_matrices=False)
        columns["composition of contexts"] = left[:, 0] * values[0]
    kept = {name: np.asarray(values) for name, values in columns.items() if np.std(values) > 1e-9}
    return np.array(list(kept.values())).T.reshape(len(groups), -1), tuple(kept)


def scale_of_batches(moments: Moments, kind: np.ndarray, num_genes: int) -> np.ndarray:
    """Log sd of the cells of each batch against the other batches, median over genes, mean over kinds: (B,)."""
    with np.errstate(divide="ignore"):
        log_sd = 0.5 * np.log(moments.variance[:, :num_genes])
    log_sd[~np.isfinite(log_sd)] = np.nan
    residual = log_sd - pd.DataFrame(log_sd).groupby(kind).transform("mean").to_numpy()
    medians = pd.DataFrame(residual.T).median().to_numpy()
    return np.array([pd.Series(medians[rows]).mean() for rows in rows_by_batch(moments.labels).values()])
