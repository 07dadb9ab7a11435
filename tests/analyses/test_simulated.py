"""Simulated donors as AnnData."""

import json
from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.sparse

from hilbertcell.analyses.simulated import simulate, simulated_world
from hilbertcell.models.simulator import SimulatorSettings

SMALL = SimulatorSettings(
    num_genes=20, num_batches=3, contexts=("x", "y"), doses=(0.5, 4.0), cells_per_population=60.0
)


@pytest.fixture(scope="module")
def small():
    return simulate(1, SMALL)


def test_cells_genes_and_labels(small):
    assert scipy.sparse.isspmatrix_csr(small.X)
    assert (small.X.data >= 1).all()
    assert (small.X.data == np.rint(small.X.data)).all()
    assert set(small.obs["perturbation"].cat.categories) == {"control", "A", "B", "inert", "A+B"}
    assert list(small.obs["donor"].cat.categories) == ["donor-1", "donor-2", "donor-3"]
    assert small.obs.loc[small.obs["perturbation"] == "control", "dose"].isna().all()
    assert small.obs_names.is_unique
    assert small.obs.groupby("donor", observed=True).size().nunique() == 3  # batches of unequal size


def test_the_truth_lies_beside_and_survives_a_file(small, tmp_path):
    small.write_h5ad(tmp_path / "small.h5ad")
    truth = anndata.read_h5ad(tmp_path / "small.h5ad").uns["truth"]
    assert truth["mean"].shape == (3 * 2 * (1 + 4 * 2), 20)
    assert truth["microenvironment"].shape == (3, 2)
    assert truth["features"].shape == (3, 4)
    assert "y | A+B @ 0.5 | donor-2" in truth["population"]
    settings = json.loads(truth["settings"])
    restored = {name: getattr(SMALL, name) for name in ("num_genes", "mixed_responders", "library_size")}
    assert {name: settings[name] for name in restored} == restored


def test_observed_means_scatter_around_the_true_ones(small):
    """The mean squared standardised difference is 1: cells and truth obey one law, and noise is C/n + C/1000."""
    truth = small.uns["truth"]
    rows = dict(zip(truth["population"], truth["mean"], strict=True))
    counts = small.X.toarray().astype(np.float64)
    logged = np.log1p(counts * (1e4 / np.maximum(counts.sum(1, keepdims=True), 1)))
    dose = small.obs["dose"].map(lambda d: "" if np.isnan(d) else f" @ {d:g}").astype(str)
    name = small.obs["cell_type"].astype(str) + " | " + small.obs["perturbation"].astype(str) + dose
    name = (name + " | " + small.obs["donor"].astype(str)).to_numpy()
    squares = []
    for population in np.unique(name):
        cells = logged[name == population]
        noise = cells.var(0, ddof=1) * (1 / len(cells) + 1 / 1000)
        squares.append((cells.mean(0) - rows[population]) ** 2 / noise)
    assert len(squares) == len(rows)
    standard_error = np.sqrt(2 / np.size(squares))
    assert abs(np.mean(squares) - 1) < 5 * standard_error


def test_same_seed_same_bits_and_no_dose_column_without_doses():
    plain = replace(SMALL, doses=())
    one, again, other = (simulate(seed, plain) for seed in (1, 1, 2))
    assert "dose" not in one.obs
    assert np.isnan(one.uns["truth"]["dose"]).all()
    assert (one.X != again.X).nnz == 0
    assert one.obs.equals(again.obs)
    np.testing.assert_array_equal(one.uns["truth"]["mean"], again.uns["truth"]["mean"])
    assert other.n_obs != one.n_obs or (one.X != other.X).nnz > 0
    assert np.abs(other.uns["truth"]["microenvironment"] - one.uns["truth"]["microenvironment"]).min() > 0


def test_the_world_behind_a_simulation_can_be_had_without_its_cells(small):
    np.testing.assert_array_equal(simulated_world(1, SMALL).features, small.uns["truth"]["features"])
    assert (np.asarray(simulated_world(2, SMALL).features) != small.uns["truth"]["features"]).all()
