"""PerturbDiff as a row of the benchmark: it learns and predicts as every other model does, and is stored by hash."""

import hashlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from hilbertcell.analyses.gene_table import controls_of
from hilbertcell.analyses.predictors import Fitter, Predictor, Screen

if TYPE_CHECKING:
    from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings

PERTURBDIFF = "perturbdiff"
# Small enough for two cores. The batch does not condition, because held-out batches have no row in its table. The average
# has a memory of 100 steps, not of the published 1,000, or it would still hold the first weights. No guidance. The head starts at the
# training mean: with few genes the published start leaves some of them at zero for good.
SMALL = {
    "hidden": 64, "depth": 2, "num_heads": 2, "covariate_hidden": 32, "gene_features": 0,
    "batch_covariate": False, "start_at_mean": True, "set_size": 32, "cells_per_batch": 256, "max_steps": 1000,
    "learning_rate": 1e-3, "average_every": 1, "start_time": 1000, "sample_steps": 20, "guidance": 0.0,
}  # fmt: skip


def small_settings() -> "PerturbDiffSettings":
    """The configuration that `make bench-neural` runs."""
    from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings

    return PerturbDiffSettings(**SMALL)


@cache
def perturbdiff_key() -> dict[str, Any]:
    """What a stored cell of this row depends on beside the data: settings, and the source, which lies in sub-packages."""
    root = Path(__file__).parent.parent
    files = [
        *(root / "models/perturbdiff").glob("*.py"),
        *(root / "inference/perturbdiff").glob("*.py"),
        Path(__file__),
    ]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return SMALL | {"source": digest.hexdigest()}


def perturbdiff_fitter(
    num_draws: int = 500, seed: int = 0, settings: "PerturbDiffSettings | None" = None
) -> Fitter:
    """PerturbDiff on the training populations.

    Its law is one generated population, of as many cells as the batch has controls, with the sampling noise of these
    cells: all the spread it has. Cells are generated beside the given controls.
    """

    def fitter(training: Screen) -> Predictor:
        from hilbertcell.inference.perturbdiff.fit import fit_perturbdiff

        fitted = fit_perturbdiff(training.populations, seed=seed, settings=settings or small_settings())

        def cells(given: Screen, targets: pd.DataFrame, num_cells: np.ndarray, seed: int) -> list[np.ndarray]:
            return fitted.generate(given.populations, targets, num_cells, seed=seed)

        def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
            _, _, number = controls_of([given.table, training.table], targets)
            made = cells(given, targets, np.maximum(number, 2).astype(int), seed)
            mean = np.stack([x.mean(axis=0) for x in made])
            noise = np.stack([x.var(axis=0, ddof=1) / len(x) for x in made])
            rng = np.random.default_rng(seed)
            return mean + np.sqrt(noise) * rng.standard_normal((num_draws, *mean.shape))

        return Predictor(law, cells)

    return fitter
