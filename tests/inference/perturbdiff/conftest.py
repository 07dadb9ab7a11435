"""A small published network by official names, and a small screen of counts."""

from collections.abc import Callable

import anndata
import jax
import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.inference.perturbdiff.fit import PerturbDiffFit, fit_perturbdiff
from hilbertcell.inference.perturbdiff.settings import PerturbDiffSettings
from hilbertcell.models import perturbdiff

KEYS = {"perturbation": "cytokine", "control": "PBS", "context": "cell_type", "batch": "donor"}

SETTINGS = PerturbDiffSettings(
    hidden=32, depth=1, num_heads=2, covariate_hidden=4, gene_features=0, set_size=8, cells_per_batch=32,
    max_steps=240, learning_rate=3e-3, checkpoint_every=100, start_time=1000, sample_steps=5,
)  # fmt: skip


@pytest.fixture(scope="session")
def state() -> dict[str, np.ndarray]:
    """Random parameters of 8 genes, hidden 8, depth 1: 4 perturbations, 2 cell types, 3 batches."""

    def new(key):
        return (
            perturbdiff.init_denoiser(key, 8, hidden=8, depth=1, num_heads=2, gene_features=3),
            perturbdiff.init_covariate_encoder(
                key, 8, perturbations=4, cell_types=np.eye(2, 5, dtype=np.float32), batches=3, hidden=4
            ),
        )

    rng = np.random.default_rng(0)
    empty = perturbdiff.to_state_dict(*new(jax.random.key(0)))
    return {name: rng.normal(0.0, 0.3, a.shape).astype(np.float32) for name, a in empty.items()}


def make_screen(
    cells: int = 14, donors: int = 3, genes: int = 8, seed: int = 0, factor: float = 2.0
) -> anndata.AnnData:
    """Counts of donors x 2 cell types x (PBS, A, B); `factor` times the first gene under A, the second under B."""
    rng = np.random.default_rng(seed)
    rows = [
        (drug, cell_type, f"Donor{donor}")
        for donor in range(1, donors + 1)
        for cell_type in ("B", "T")
        for drug in ("PBS", "A", "B")
        for _ in range(cells)
    ]
    obs = pd.DataFrame(rows, columns=["cytokine", "cell_type", "donor"])
    obs.index = pd.Index([f"cell{i}" for i in range(len(obs))], dtype=str)
    rate = np.full((len(obs), genes), 6.0)
    rate[:, 0] *= np.where(obs["cytokine"] == "A", factor, 1.0)
    rate[:, 1] *= np.where(obs["cytokine"] == "B", factor, 1.0)
    var = pd.DataFrame(index=pd.Index([f"gene{i}" for i in range(genes)], dtype=str))
    return anndata.AnnData(X=rng.poisson(rate).astype(np.float32), obs=obs, var=var)


def populations_of(screen: anndata.AnnData, **changes: object) -> Populations:
    return read_populations(screen, **(KEYS | {"scale": "counts"} | changes))


@pytest.fixture(scope="session")
def make() -> Callable[..., Populations]:
    """Populations of `make_screen`, cells of 8 genes with its arguments; `read` changes the keys."""
    return lambda read=None, **sizes: populations_of(make_screen(**sizes), **(read or {}))


@pytest.fixture(scope="session")
def screen(make) -> Populations:
    """Three donors."""
    return make()


@pytest.fixture(scope="session")
def settings() -> PerturbDiffSettings:
    """Of a small network and a short training."""
    return SETTINGS


@pytest.fixture(scope="session")
def fitted(screen) -> PerturbDiffFit:
    """A short training on all of them."""
    return fit_perturbdiff(screen, seed=1, settings=SETTINGS)
