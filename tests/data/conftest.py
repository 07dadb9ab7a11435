"""A small made-up screen, whole or broken on purpose, and a reader that knows its keys."""

from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData

KEYS = {"perturbation": "treatment", "control": "vehicle", "context": "cell_type", "batch": "donor"}


def screen(
    *,
    donors: int = 3,
    contexts: tuple[str, ...] = ("B", "T"),
    perturbations: tuple[str, ...] = ("IFNb", "TNF", "IFNb+TNF"),
    cells: int = 12,
    genes: int = 7,
    sparse: bool = True,
    seed: int = 0,
) -> AnnData:
    """Counts (float32) of `cells` cells per population, in shuffled order; obs also holds dose and total."""
    rng = np.random.default_rng(seed)
    rows = [
        (context, perturbation, f"d{donor}")
        for donor in range(donors)
        for context in contexts
        for perturbation in ("vehicle", *perturbations)
        for _ in range(cells)
    ]
    obs = pd.DataFrame(rows, columns=["cell_type", "treatment", "donor"]).sample(frac=1, random_state=seed)
    obs.index = [f"cell{i}" for i in rng.permutation(len(obs))]
    obs["dose"] = np.where(obs["treatment"] == "vehicle", -7.0, rng.choice([0.5, 2.0], len(obs)))
    rate = rng.gamma(2.0, size=genes) * (1 + obs["treatment"].str.len().to_numpy()[:, None] / 4)
    x = rng.poisson(rate).astype(np.float32)
    obs["total"] = x.sum(axis=1) + 100.0
    obs = obs.astype({"cell_type": "category", "treatment": "category", "donor": "category"})
    var = pd.DataFrame(index=[f"g{i}" for i in range(genes)])
    return AnnData(sp.csr_matrix(x) if sparse else x, obs=obs, var=var)


@pytest.fixture
def make_screen() -> Callable[..., AnnData]:
    """The function `screen`."""
    return screen


@pytest.fixture
def read() -> Callable:
    """`read_populations` with the keys of `screen`; keywords replace them."""
    from hilbertcell.data.anndata_io import read_populations

    return lambda source, **changes: read_populations(source, **(KEYS | changes))
