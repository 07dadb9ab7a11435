"""Populations as a table of gene means with their noise: what scores and baselines need of a file."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from hilbertcell.data.moments import stream_moments
from hilbertcell.data.populations import Populations, natural_scale
from hilbertcell.models.baselines import CONTROL, Targets, TrainingTable


@dataclass(frozen=True, eq=False)
class GeneTable:
    """P populations: labels as in `Populations`, cells n (P,), means and within-population variances (P, G).

    Natural scale (log1p-CP10k for counts). `variance` is unbiased; a population of one cell, which has none, has
    the mean variance of the populations of its context and kind (control or perturbed).
    """

    labels: pd.DataFrame
    n: np.ndarray
    mean: np.ndarray
    variance: np.ndarray

    @property
    def noise(self) -> np.ndarray:
        """Sampling variance C / n (P, G) of the means."""
        return self.variance / self.n[:, None]

    def select(self, mask: np.ndarray) -> "GeneTable":
        """Only the populations where `mask` (P,) is true."""
        return GeneTable(self.labels[mask], self.n[mask], self.mean[mask], self.variance[mask])

    def rows(self, names: pd.Index) -> "GeneTable":
        """The populations of these names, in their order. Raises: KeyError if one is absent."""
        order = self.labels.index.get_indexer(names)
        if (order < 0).any():
            raise KeyError(
                f"populations {list(names[order < 0])[:3]} are not among the {len(self.labels)} here"
            )
        return GeneTable(self.labels.iloc[order], self.n[order], self.mean[order], self.variance[order])

    def total_sd(self) -> np.ndarray:
        """Standard deviation (G,) of each gene over all cells; 1 where it does not vary. Used as unit of mixed scales."""
        weight = self.n / self.n.sum()
        center = weight @ self.mean
        total = weight @ (self.variance + (self.mean - center) ** 2)
        return np.where(total > 0, np.sqrt(total), 1.0)


def gene_table(populations: Populations, progress: bool = False) -> GeneTable:
    """One streaming pass over the cells."""
    num_genes = len(populations.genes)
    moments = stream_moments(
        populations, lambda x: x, np.zeros((num_genes, 1)), np.zeros(num_genes), progress=progress
    )
    variance = moments.variance.copy()
    labels = populations.labels
    for j in np.flatnonzero(moments.n < 2):
        alike = (labels["is_control"] == labels["is_control"].iloc[j]).to_numpy() & (moments.n > 1)
        same = alike & (labels["context"] == labels["context"].iloc[j]).to_numpy()
        if alike.any():
            variance[j] = moments.variance[same if same.any() else alike].mean(0)
    return GeneTable(labels, moments.n, moments.mean, variance)


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
