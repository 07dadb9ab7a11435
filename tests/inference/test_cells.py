"""Predicted cells: of one population, in the file's own scale and words, from named control cells."""

import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.validation import DataError
from hilbertcell.inference.cells import sample_cells

from .conftest import make_screen


def counts_screen(seed: int = 0):
    """Counts of 12 genes with a library-size column; two donors, one tissue, control and drug A."""
    rng = np.random.default_rng(seed)
    screen = make_screen(num_batches=2)
    screen = screen[(screen.obs["tissue"] == "liver") & (screen.obs["drug"] != "B")].copy()
    matrix = rng.poisson(rng.gamma(3.0, 2.0, (screen.n_obs, 1)), (screen.n_obs, 12)).astype(np.float32)
    obs = screen.obs.assign(total=matrix.sum(1) + 50.0, dose=np.where(screen.obs["drug"] == "A", 2.0, 0.0))
    import anndata

    return anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=[f"gene{i}" for i in range(12)]))


KEYS = {"perturbation": "drug", "control": "DMSO", "context": "tissue", "batch": "donor"}


def fake_predictions(populations, num_draws=4, library_log_ratio=0.0):
    """A tree with what cells need: means one log unit above the controls for gene0, spread over draws."""
    labels = populations.labels[populations.labels["is_control"]]
    names = [f"liver | A @ 2 | {batch}" for batch in labels["batch"]]
    base = np.stack([_mean(populations, name) for name in labels.index])
    mean = np.repeat(base[None], num_draws, axis=0)
    mean[:, :, 0] += np.linspace(0.2, 0.6, num_draws)[:, None]
    coords = {
        "population": names, "gene": populations.genes.astype(str), "context": ("population", ["liver"] * len(names)),
        "perturbation": ("population", ["A"] * len(names)), "batch": ("population", list(labels["batch"])),
        "dose": ("population", [2.0] * len(names)),
    }  # fmt: skip
    predictions = xr.Dataset({"mean": (("chain", "draw", "population", "gene"), mean[None])}, coords)
    constant = xr.Dataset(
        {
            "library_log_ratio": ("population", np.full(len(names), library_log_ratio)),
            "sd_log_ratio": (("population", "gene"), np.zeros((len(names), len(populations.genes)))),
        },
        coords,
    )
    tree = xr.DataTree.from_dict({"predictions": predictions, "constant_data": constant})
    tree.attrs["hilbertcell_version"] = "0"
    return tree


def _mean(populations, name):
    one = populations.select(populations.labels.index == name)
    return np.concatenate([x for _, x in one.chunks()]).mean(0)


@pytest.fixture(scope="module")
def counts():
    return read_populations(counts_screen(), dose="dose", library_size="total", **KEYS)


def test_counts_in_counts_out_with_the_files_own_columns(counts):
    draws = fake_predictions(counts)
    cells = sample_cells(draws, counts)
    assert set(cells.obs["drug"]) == {"A"}
    assert set(cells.obs["dose"]) == {2.0}
    assert set(cells.obs["draw"]) == {-1}
    values = cells.X.toarray()
    assert (values == np.round(values)).all()
    assert values.min() >= 0
    assert cells.obs_names.is_unique
    assert set(cells.obs["source_cell"]) <= set(counts.cell_names)
    assert json.loads(cells.uns["provenance"])["keys"]["perturbation"] == "drug"
    again = read_populations(cells, dose="dose", library_size="total", require=("perturbed",), **KEYS)
    for name in again.labels.index:
        target = draws["predictions"]["mean"].sel(population=name).values[0].mean(0)
        one = again.select(again.labels.index == name)
        made = np.concatenate([x for _, x in one.chunks()])
        error = np.abs(made.mean(0) - target)
        # The transport solves to a tenth of a Monte Carlo error or one molecule in one of 25 cells.
        one_molecule = np.log1p(1e4 * (1 + made.max()) / 50) / len(made)
        assert (error < np.maximum(0.2 * made.std(0) / np.sqrt(len(made)), one_molecule)).all()


def test_one_draw_several_draws_and_numbers_of_cells(counts):
    draws = fake_predictions(counts)
    one = sample_cells(draws, counts, draw_index=3, cells_per_population=40)
    assert set(one.obs["draw"]) == {3}
    assert one.obs.groupby("donor", observed=True).size().tolist() == [40, 40]
    several = sample_cells(draws, counts, num_draws=3, cells_per_population=5)
    assert several.obs["draw"].unique().tolist() == [0, 2, 3]
    for options, culprit in [
        ({"draw_index": 4}, "draw_index = 4"),
        ({"num_draws": 0}, "num_draws = 0"),
        ({"cells_per_population": 0}, "cells_per_population = 0"),
    ]:
        with pytest.raises(DataError, match=culprit):
            sample_cells(draws, counts, **options)


def test_cells_of_a_population_do_not_depend_on_what_is_made_beside_it(counts):
    draws = fake_predictions(counts)
    both = sample_cells(draws, counts, seed=5)
    alone = draws.map_over_datasets(lambda d: d.isel(population=[1]) if "population" in d.dims else d)
    alone.attrs = draws.attrs
    other = sample_cells(alone, counts, seed=5)
    second = both[both.obs["donor"] == other.obs["donor"].iloc[0]]
    np.testing.assert_array_equal(second.X.toarray(), other.X.toarray())
    assert not np.array_equal(sample_cells(draws, counts, seed=6).X.toarray(), both.X.toarray())


def test_no_controls_no_cells(counts):
    draws = fake_predictions(counts)
    without = counts.select(~(counts.labels["is_control"] & (counts.labels["batch"] == "d1")).to_numpy())
    with pytest.raises(DataError, match=r"liver.*d1.*no control cells"):
        sample_cells(draws, without)


def test_continuous_cells_meet_the_target_exactly(without_d5, d5):
    draws = without_d5.predict(d5, num_samples=20)
    cells = without_d5.sample_cells(draws, d5)
    for name in draws["predictions"]["population"].values:
        context, drug, batch = name.split(" | ")
        chosen = (cells.obs[["tissue", "drug", "donor"]] == [context, drug, batch]).all(axis=1).to_numpy()
        target = draws["predictions"]["mean"].sel(population=name).values[0].mean(0)
        np.testing.assert_allclose(cells.X[chosen].mean(0), target, rtol=1e-4, atol=1e-4)
