"""A small screen whose batches shift baselines and responses together, and a quick fit of it."""

import anndata
import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.inference.fit import Fit, fit
from hilbertcell.inference.settings import Settings

KEYS = {"perturbation": "drug", "control": "DMSO", "context": "tissue", "batch": "donor", "scale": "other"}
SETTINGS = Settings(num_steps=150, num_random_features=6, num_components=3, num_factors=1)


def make_screen(seed: int = 0, num_batches: int = 6) -> anndata.AnnData:
    """Normal cells of 2 tissues under DMSO, A and B in donors d0, d1, ...; 5 genes, 25 cells a population."""
    rng = np.random.default_rng(seed)
    rows, cells = [], []
    effect = {"DMSO": np.zeros(5), "A": np.array([2.0, 0, 0, -1.0, 0]), "B": np.array([0, 1.5, 0, 0, 0.5])}
    for b in range(num_batches):
        own = 0.5 * rng.standard_normal(5)
        for tissue, level in (("liver", 0.0), ("spleen", 3.0)):
            for drug, shift in effect.items():
                response = shift - 0.4 * own * (drug != "DMSO") + 0.1 * rng.standard_normal(5)
                cells.append(level + own + response + rng.standard_normal((25, 5)))
                rows += [(drug, tissue, f"d{b}")] * 25
    obs = pd.DataFrame(
        rows, columns=["drug", "tissue", "donor"], index=[f"cell{i}" for i in range(len(rows))]
    )
    var = pd.DataFrame(index=[f"gene{i}" for i in range(5)])
    return anndata.AnnData(X=np.concatenate(cells), obs=obs, var=var)


def populations_of(screen: anndata.AnnData, **changes: object) -> Populations:
    return read_populations(screen, **(KEYS | changes))


@pytest.fixture(scope="session")
def screen() -> Populations:
    """All six donors."""
    return populations_of(make_screen())


@pytest.fixture(scope="session")
def without_d5(screen) -> Fit:
    """A fit that has not seen donor d5."""
    return fit(screen.select((screen.labels["batch"] != "d5").to_numpy()), seed=1, settings=SETTINGS)


@pytest.fixture(scope="session")
def d5(screen) -> Populations:
    """The donor that the fit has not seen, perturbed cells included."""
    return screen.select((screen.labels["batch"] == "d5").to_numpy())
