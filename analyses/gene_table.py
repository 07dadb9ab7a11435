"""Populations as a table of gene means with their noise: what scores and baselines need of a file."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hilbertcell.data.moments import stream_moments
from hilbertcell.data.populations import Populations, natural_scale
from hilbertcell.data.stores import Rows
from hilbertcell.models.baselines import CONTROL, Targets, TrainingTable
from hilbertcell.models.within_covariance import fit_within_prior


@dataclass(frozen=True, eq=False)
class GeneTable:
    """P populations: labels as in `Populations`, cells n (P,), means and within-population variances (P, G).

    Natural scale (log1p-CP10k for counts). `variance` leans on that of the populations of its context and kind
    (control or perturbed), the more the fewer its cells: a gene that few cells express is often silent in all cells
    of a small population, whose own variance of zero would call a mean of zero exact.
    """

    labels: pd.DataFrame
    n: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    own_variance: np.ndarray
    """(P, G) unbiased, of the population's cells alone; nan where there is one cell."""

    @property
    def noise(self) -> np.ndarray:
        """Sampling variance C / n (P, G) of the means."""
        return self.variance / self.n[:, None]

    def select(self, mask: np.ndarray) -> "GeneTable":
        """Only the populations where `mask` (P,) is true; their variances lean on one another alone."""
        return table_of(self.labels[mask], self.n[mask], self.mean[mask], self.own_variance[mask])

    def rows(self, names: pd.Index) -> "GeneTable":
        """The populations of these names, in their order, with their noise as it is here. Raises: KeyError if one is absent."""
        order = self.labels.index.get_indexer(names)
        if (order < 0).any():
            raise KeyError(
                f"populations {list(names[order < 0])[:3]} are not among the {len(self.labels)} here"
            )
        return GeneTable(
            self.labels.iloc[order],
            self.n[order],
            self.mean[order],
            self.variance[order],
            self.own_variance[order],
        )

    def total_sd(self) -> np.ndarray:
        """Standard deviation (G,) of each gene over all cells; 1 where it does not vary. Used as unit of mixed scales."""
        weight = self.n / self.n.sum()
        center = weight @ self.mean
        total = weight @ (self.variance + (self.mean - center) ** 2)
        return np.where(total > 0, np.sqrt(total), 1.0)


class _Genes:
    """The feature map of genes alone; sparse rows are summed up as they are."""

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def random_features(self, rows: Rows) -> np.ndarray:
        return np.zeros((rows.shape[0], 0))


def gene_table(populations: Populations, progress: bool = False) -> GeneTable:
    """One streaming pass over the cells."""
    num_genes = len(populations.genes)
    no_scores = np.zeros((num_genes, 0))
    moments = stream_moments(populations, _Genes(), no_scores, np.zeros(num_genes), progress=progress)
    return table_of(populations.labels, moments.n, moments.mean, moments.variance)


def table_of(labels: pd.DataFrame, n: np.ndarray, mean: np.ndarray, own_variance: np.ndarray) -> GeneTable:
    """The table of populations with these means and unbiased variances (P, G); without any variance noise is unknown."""
    if not (n > 1).any():
        return GeneTable(labels, n, mean, np.full_like(mean, np.nan), own_variance)
    codes = pd.factorize(pd.MultiIndex.from_frame(labels[["context", "is_control"]]))[0]
    no_factors = np.zeros((len(n), 0, 0))
    prior = fit_within_prior(n, own_variance, no_factors, codes, np.zeros((mean.shape[1], 0)))
    return GeneTable(labels, n, mean, prior.shrink_variance(n, own_variance, codes), own_variance)


def natural_cells(populations: Populations, positions: np.ndarray) -> np.ndarray:
    """Cells at `positions` (m,) on the natural scale, dense (m, G)."""
    library = None if populations.library_size is None else populations.library_size[positions]
    return natural_scale(populations.read_cells(positions), populations.keys.scale, library)


def condition_names(labels: pd.DataFrame) -> pd.Series:
    """Perturbation with its dose, one string per row: what the replicates of a population share with it."""
    dose = labels["dose"].map(lambda value: "" if np.isnan(value) else f" @ {value:g}")
    return labels["perturbation"].astype(str) + dose.astype(str)


def condition_rows(training: pd.DataFrame, targets: pd.DataFrame) -> pd.DataFrame:
    """One row (perturbation, dose) per condition of the perturbed training populations, then of the targets.

    The index holds their names; the codes of `baseline_inputs` are its positions.
    """
    both = pd.concat([training[~training["is_control"]], targets])[["perturbation", "dose"]]
    both.index = pd.Index(condition_names(both))
    return both[~both.index.duplicated()]


def baseline_inputs(
    training: GeneTable, given: GeneTable, targets: pd.DataFrame
) -> tuple[TrainingTable, Targets]:
    """What `models.baselines` takes: the training table, and targets (T rows of labels) with their given controls.

    Controls are looked for among `given`, then among the training populations; nan where there are none.
    """
    contexts = pd.Index(pd.concat([training.labels["context"], targets["context"]]).unique())
    known, wanted = condition_names(training.labels), condition_names(targets)
    conditions = condition_rows(training.labels, targets).index
    batches = pd.Index(training.labels["batch"].unique())
    table = TrainingTable(
        mean=training.mean,
        noise=training.noise,
        context=contexts.get_indexer(training.labels["context"]),
        condition=np.where(training.labels["is_control"], CONTROL, conditions.get_indexer(known)),
        batch=batches.get_indexer(training.labels["batch"]),
    )
    control_mean, control_noise, _ = controls_of([given, training], targets)
    return table, Targets(
        context=contexts.get_indexer(targets["context"]),
        condition=conditions.get_indexer(wanted),
        control_mean=control_mean,
        control_noise=control_noise,
    )


def controls_of(tables: list[GeneTable], targets: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, noise (T, G) and cell number (T,) of the controls of each target's (context, batch); nan without.

    The first table that has them counts.
    """
    mean = np.full((len(targets), tables[0].mean.shape[1]), np.nan)
    noise, number = mean.copy(), np.full(len(targets), np.nan)
    for table in reversed(tables):
        control = table.labels["is_control"].to_numpy(dtype=bool)
        keys = zip(table.labels["context"], table.labels["batch"], strict=True)
        place = {key: j for j, key in enumerate(keys) if control[j]}
        for t, key in enumerate(zip(targets["context"], targets["batch"], strict=True)):
            if key in place:
                j = place[key]
                mean[t], noise[t], number[t] = table.mean[j], table.variance[j] / table.n[j], table.n[j]
    return mean, noise, number
