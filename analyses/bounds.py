"""What the best possible predictor would score: two rows of every table that know the truth and are no competitors."""

from dataclasses import replace

import numpy as np
import pandas as pd

from hilbertcell.analyses.gene_table import GeneTable
from hilbertcell.analyses.predictors import Predictor, Screen, cells_of_populations
from hilbertcell.data.populations import Populations

CEILING = "replicate ceiling"
FLOOR = "sampling floor"
BOUNDS = (CEILING, FLOOR)
MIN_CELLS = 4  # two per half, without which a half has no variance


def sampling_floor(truth: GeneTable, num_draws: int) -> Predictor:
    """A predictor that knows the latent mean of every population of `truth`; only the noise of the cells is left.

    Nobody knows the latent mean. But an observed mean y = m + e with noise e has the same joint law with m as a draw
    m' = y + e' has with y seen from the other side: scored with the noise e' added back, y is to m' what it was to m.
    All draws of a target are therefore one and the same vector y + e'. Law only; a floor for CRPS and energy score.
    """

    def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
        rows = truth.rows(targets.index)
        rng = np.random.default_rng((seed, 2))
        latent = rows.mean + np.sqrt(rows.noise) * rng.standard_normal(rows.mean.shape)
        return np.broadcast_to(latent, (num_draws, *latent.shape))

    return Predictor(law)


def halves(populations: Populations, names: list[str], seed: int) -> tuple[Populations, Populations]:
    """The populations twice, each of the named ones with one half of its cells; those of < 4 cells are left whole.

    The first half has the odd cell, so that it is never too small to predict the second.
    """
    first = populations
    for name in names:
        number = int(populations.labels.loc[name, "num_cells"])
        if number >= MIN_CELLS:
            first = first.keep_cells(name, (number + 1) // 2, seed)
    labels, rows = populations.labels.copy(), populations.cell_population
    parted = labels.index.isin(names) & (labels["num_cells"] >= MIN_CELLS).to_numpy()
    taken = (first.cell_population >= 0) & np.append(parted, False)[rows]
    labels["num_cells"] -= np.where(parted, first.labels["num_cells"], 0)
    return first, replace(populations, labels=labels, cell_population=np.where(taken, -1, rows))


def replicate_ceiling(half: Screen, num_draws: int) -> Predictor:
    """Predicts a population from another half of its own cells: `half` is the first of `halves`, truth is the second.

    Its law is the mean of that half with its sampling noise. Each half has half of the cells, so fewer DE genes are
    called on both sides than for the models of the table.
    """

    def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
        rows = half.table.rows(targets.index)
        known = (rows.n >= MIN_CELLS // 2)[:, None]
        rng = np.random.default_rng((seed, 3))
        spread = np.sqrt(np.where(known, rows.noise, np.nan))
        return rows.mean + spread * rng.standard_normal((num_draws, *rows.mean.shape))

    def cells(given: Screen, targets: pd.DataFrame, num_cells: np.ndarray, seed: int) -> list[np.ndarray]:
        rng = np.random.default_rng((seed, 3))
        available = half.populations.labels.loc[targets.index, "num_cells"]
        return [
            cells_of_populations(half.populations, [name], number, rng)
            for name, number in zip(targets.index, np.minimum(num_cells, available), strict=True)
        ]

    return Predictor(law, cells)
