"""The files that the pages speak of, small enough to be fitted in seconds."""

from pathlib import Path

import anndata
import pandas as pd
import pytest

import hilbertcell.inference.fit as fit_module
from hilbertcell.analyses.simulated import simulate
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.models.simulator import SimulatorSettings

KEYS = {"perturbation": "drug", "control": "DMSO", "context": "cell_type", "batch": "donor"}


def simulated(num_batches: int, doses: tuple[float, ...] = ()) -> anndata.AnnData:
    """Cells under the column names of the pages."""
    settings = SimulatorSettings(
        contexts=("lymphoid", "myeloid"), perturbations=("A", "B"), inert=(), combinations=(), doses=doses,
        num_batches=num_batches, num_genes=12, cells_per_population=15,
    )  # fmt: skip
    cells = simulate(seed=0, settings=settings)
    del cells.uns["truth"]
    cells.obs = cells.obs.rename(columns={"perturbation": "drug"})
    cells.obs["drug"] = cells.obs["drug"].cat.rename_categories({"control": "DMSO"})
    return cells


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every file that a page takes for granted, a fit among them."""
    folder = tmp_path_factory.mktemp("pages")
    cells = simulated(5)
    donors, controls = cells.obs["donor"].astype(str), cells.obs["drug"] == "DMSO"
    old = donors.isin(["donor-1", "donor-2", "donor-3"])
    cells[old].write_h5ad(folder / "screen.h5ad")
    cells[~old & controls].write_h5ad(folder / "new_donors.h5ad")
    cells[~old].write_h5ad(folder / "held_out.h5ad")
    few = controls | ((cells.obs["drug"] == "A") & (cells.obs["cell_type"] == "lymphoid"))
    cells[(donors == "donor-4") & few].write_h5ad(folder / "new_donor_few.h5ad")
    simulated(3, doses=(1.0, 10.0)).write_h5ad(folder / "doses.h5ad")
    features = pd.DataFrame({"x": [1.0, 0.0, 1.0], "y": [0.0, 1.0, 1.0]}, index=["A", "B", "C"])
    features.to_csv(folder / "features.csv")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_module, "usual_steps", lambda observations: 30)
        fit_module.fit(read_populations(folder / "screen.h5ad", **KEYS)).save(folder / "fit")
    return folder
