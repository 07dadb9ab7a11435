"""Predicted cells: of one population, in the file's own scale and words, from named control cells."""

import json

import anndata
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scipy import sparse

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.validation import DataError
from hilbertcell.inference.cells import sample_cells

KEYS = {"perturbation": "drug", "control": "DMSO", "context": "tissue", "batch": "donor"}
COUNT_KEYS = KEYS | {"dose": "dose", "library_size": "total"}


def counts_screen(seed=0, beyond=50):
    """Counts of 12 genes with a column of totals: donors d0 (30 controls) and d1 (45) of one tissue, drug A at dose 2."""
    rng = np.random.default_rng(seed)
    donor = np.repeat(["d0", "d0", "d1", "d1"], [30, 10, 45, 10])
    drug = np.repeat(["DMSO", "A", "DMSO", "A"], [30, 10, 45, 10])
    matrix = rng.poisson(rng.gamma(3.0, 2.0, (len(drug), 1)) * np.linspace(0.2, 2, 12), (len(drug), 12))
    obs = pd.DataFrame(
        {
            "drug": drug,
            "tissue": "liver",
            "donor": donor,
            "dose": np.where(drug == "A", 2.0, 0.0),
            "guide": "g1",
        },
        index=[f"cell{i:03d}" for i in rng.permutation(len(drug))],
    )
    obs["total"] = matrix.sum(1) + beyond
    return anndata.AnnData(
        sparse.csr_matrix(matrix.astype(np.float32)), obs, pd.DataFrame(index=[f"gene{i}" for i in range(12)])
    )


def natural_mean(populations, name):
    return np.concatenate([x for _, x in populations.select(populations.labels.index == name).chunks()]).mean(
        0
    )


def fake_predictions(populations, num_draws=4, shift=(0.2, 0.6), library_log_ratio=0.0):
    """A tree with what cells need: means of `gene0` above those of the controls, by more from draw to draw."""
    labels = populations.labels[populations.labels["is_control"]]
    dose = np.full(len(labels), 2.0 if populations.keys.dose else np.nan)
    at = " @ 2" if populations.keys.dose else ""
    base = np.stack([natural_mean(populations, name) for name in labels.index])
    mean = np.repeat(base[None], num_draws, axis=0)
    mean[:, :, 0] += np.linspace(*shift, num_draws)[:, None]
    coords = {
        "population": [f"{row.context} | A{at} | {row.batch}" for row in labels.itertuples()],
        "gene": populations.genes.astype(str),
        "context": ("population", labels["context"].to_numpy(str)),
        "perturbation": ("population", ["A"] * len(labels)),
        "batch": ("population", labels["batch"].to_numpy(str)),
        "dose": ("population", dose),
    }
    predictions = xr.Dataset(
        {"mean": (("chain", "draw", "population", "gene"), mean[None].astype(np.float32))}, coords
    )
    constant = xr.Dataset(
        {
            "library_log_ratio": ("population", np.full(len(labels), library_log_ratio)),
            "sd_log_ratio": (("population", "gene"), np.full(base.shape, np.log(1.5))),
        },
        coords,
    )
    tree = xr.DataTree.from_dict({"predictions": predictions, "constant_data": constant})
    tree.attrs = {"keys": json.dumps(populations.keys.to_dict()), "seed": 7}
    return tree


def target_of(draws, name, draw=None):
    means = draws["predictions"]["mean"].sel(population=name).values[0].astype(np.float64)
    return means.mean(0) if draw is None else means[draw]


@pytest.fixture(scope="module")
def counts():
    return read_populations(counts_screen(), **COUNT_KEYS)


@pytest.fixture(scope="module")
def draws(counts):
    return fake_predictions(counts)


@pytest.fixture(scope="module")
def cells(counts, draws):
    return sample_cells(draws, counts)


def test_counts_in_counts_out_with_the_files_own_keys(cells, counts):
    assert cells.obs.columns.tolist() == [
        "drug", "tissue", "donor", "dose", "total", "population", "draw", "source_cell",
    ]  # fmt: skip
    assert set(cells.obs["drug"]) == {"A"}
    assert set(cells.obs["dose"]) == {2.0}
    assert set(cells.obs["draw"]) == {-1}
    assert sparse.issparse(cells.X)
    assert cells.X.dtype == np.float32
    np.testing.assert_array_equal(cells.X.data, np.rint(cells.X.data))
    assert cells.X.data.min() >= 1
    assert cells.obs["total"].dtype.kind == "i"
    np.testing.assert_array_equal(cells.obs["total"], np.asarray(cells.X.sum(1)).ravel() + 50)
    assert cells.obs_names.is_unique
    assert cells.var_names.tolist() == counts.genes.tolist()


def test_each_control_makes_one_cell(cells, counts):
    assert cells.obs.groupby("donor", observed=True).size().to_dict() == {"d0": 30, "d1": 45}
    assert cells.obs["source_cell"].is_unique
    donor = counts.cell_obs.loc[cells.obs["source_cell"], ["drug", "donor"]]
    assert (donor["drug"] == "DMSO").all()
    assert (donor["donor"].to_numpy() == cells.obs["donor"].to_numpy()).all()


def test_means_are_those_of_the_predictive_mean_and_the_error_is_on_record(cells, draws):
    again = read_populations(cells, require=("perturbed",), **COUNT_KEYS)
    record = cells.uns["provenance"]
    assert list(record["population"]) == draws["predictions"]["population"].values.tolist()
    for name, recorded in zip(record["population"], record["mean_error"], strict=True):
        error = np.abs(natural_mean(again, name) - target_of(draws, name))
        # a tenth of a Monte Carlo error or one molecule in one small cell
        assert error.max() < np.log1p(1e4 / 50) / 30
        np.testing.assert_allclose(recorded, error.max(), rtol=1e-6)
    assert json.loads(record["keys"])["perturbation"] == "drug"
    assert (record["seed"], record["seed_of_draws"]) == (0, 7)


def test_library_sizes_follow_the_predicted_ratio():
    screen = counts_screen(beyond=50_000)
    counts = read_populations(screen, **COUNT_KEYS)
    cells = sample_cells(fake_predictions(counts, shift=(0, 0), library_log_ratio=np.log(2)), counts)
    old = screen.obs.loc[cells.obs["source_cell"], "total"].to_numpy()
    np.testing.assert_allclose(cells.obs["total"] / old, 2, rtol=0.01)
    assert cells.X.sum() / counts.read_cells(np.flatnonzero(screen.obs["drug"] == "DMSO")).sum() > 1.7


def test_a_mean_that_no_counts_have_is_met_as_far_as_it_goes(counts):
    """Tails of a Gaussian law: below zero, and above the mean of cells that hold one gene alone."""
    draws = fake_predictions(counts, shift=(12.0, 12.0))
    draws["predictions"]["mean"][..., 1] = -1.0
    cells = sample_cells(draws, counts)
    assert np.isfinite(cells.X.data).all()
    (first, second), (error, _) = (cells[:, :2].X.mean(0).A1, cells.uns["provenance"]["mean_error"])
    assert first > 10 * counts.read_cells(np.arange(75))[:, 0].mean()
    assert second == 0
    assert error > 2  # what could not be met is on record


def test_one_drawn_population(counts, draws):
    cells = sample_cells(draws, counts, draw_index=3)
    assert set(cells.obs["draw"]) == {3}
    again = read_populations(cells, require=("perturbed",), **COUNT_KEYS)
    name = again.labels.index[0]
    shift = natural_mean(again, name)[0] - target_of(draws, name)[0]
    assert shift == pytest.approx(
        0.2, abs=np.log1p(1e4 / 50) / 30
    )  # draw 3 is 0.2 above the mean of 0.2 ... 0.6


def test_several_drawn_populations_are_complete_and_apart(counts, draws):
    cells = sample_cells(draws, counts, num_draws=3)
    assert cells.obs["draw"].unique().tolist() == [0, 2, 3]
    sizes = cells.obs.groupby(["donor", "draw"], observed=True).size().unstack()
    assert sizes.to_numpy().tolist() == [[30] * 3, [45] * 3]
    assert cells.obs_names.is_unique
    only = sample_cells(draws, counts, draw_index=2)
    np.testing.assert_array_equal(cells[cells.obs["draw"] == 2].X.toarray(), only.X.toarray())


def test_numbers_of_cells(counts, draws):
    few = sample_cells(draws, counts, cells_per_population=20)
    assert few.obs["source_cell"].is_unique
    many = sample_cells(
        draws, counts, cells_per_population={"liver | A @ 2 | d0": 70, "liver | A @ 2 | d1": 45}
    )
    used = many.obs.groupby(["donor", "source_cell"], observed=True).size()
    assert used["d0"].sum() == 70
    assert set(used["d0"]) == {2, 3}  # 30 controls: each twice before any is used three times
    assert set(used["d1"]) == {1}
    rows = np.unique(many[many.obs["donor"] == "d0"].X.toarray(), axis=0)
    assert len(rows) > 30  # a control that is used again is moved afresh


def test_order_of_the_file_and_company_do_not_matter(cells, counts, draws):
    screen = counts_screen()
    order = np.random.default_rng(1).permutation(screen.n_obs)
    shuffled = sample_cells(draws, read_populations(screen[order].copy(), **COUNT_KEYS))
    np.testing.assert_array_equal(shuffled.X.toarray(), cells.X.toarray())
    assert shuffled.obs.equals(cells.obs)
    alone = draws.map_over_datasets(lambda d: d.isel(population=[1]) if "population" in d.dims else d)
    alone.attrs = draws.attrs
    part = sample_cells(alone, counts)
    np.testing.assert_array_equal(part.X.toarray(), cells[cells.obs["donor"] == "d1"].X.toarray())
    assert (sample_cells(draws, counts, seed=6).X != cells.X).nnz > 0


def test_genes_in_another_order(cells, draws):
    reordered = counts_screen()[:, ::-1].copy()
    again = sample_cells(draws, read_populations(reordered, **COUNT_KEYS))
    assert again.var_names.tolist() == cells.var_names.tolist()
    np.testing.assert_array_equal(again.X.toarray(), cells.X.toarray())


def test_cells_can_be_written(cells, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    again = read_populations(tmp_path / "cells.h5ad", require=("perturbed",), **COUNT_KEYS)
    assert again.labels["num_cells"].tolist() == [30, 45]


def test_dense_counts_stay_dense(draws, cells):
    screen = counts_screen()
    screen.X = screen.X.toarray()
    dense = sample_cells(draws, read_populations(screen, **COUNT_KEYS))
    assert isinstance(dense.X, np.ndarray)
    np.testing.assert_array_equal(dense.X, cells.X.toarray())


def test_without_a_library_size_key_the_row_sums_are_it():
    counts = read_populations(counts_screen(), **KEYS)
    draws = fake_predictions(counts)
    cells = sample_cells(draws, counts)
    assert "total" not in cells.obs
    again = read_populations(cells, require=("perturbed",), **KEYS)
    for name in again.labels.index:
        assert np.abs(natural_mean(again, name) - target_of(draws, name)).max() < 0.3


def test_log1p_expression_stays_non_negative_and_keeps_its_zeros():
    screen = counts_screen()
    screen.X = sparse.csr_matrix(np.log1p(screen.X.toarray()))
    populations = read_populations(screen, scale="log1p", **KEYS)
    draws = fake_predictions(populations)
    cells = sample_cells(draws, populations)
    control = populations.read_cells(populations.cells_of("liver | DMSO | d0")).toarray()
    made = np.asarray(cells[cells.obs["donor"] == "d0"].X)
    assert made.min() >= 0
    np.testing.assert_array_equal((made == 0).mean(0), (control == 0).mean(0))
    np.testing.assert_allclose(made.mean(0), target_of(draws, "liver | A | d0"), rtol=1e-5)


def test_continuous_cells_meet_the_target_and_the_spread_exactly():
    screen = counts_screen()
    screen.X = np.random.default_rng(2).normal(size=screen.shape)
    populations = read_populations(screen, scale="other", **KEYS)
    draws = fake_predictions(populations)
    cells = sample_cells(draws, populations)
    control = populations.read_cells(populations.cells_of("liver | DMSO | d1"))
    made = cells[cells.obs["donor"] == "d1"].X
    np.testing.assert_allclose(made.mean(0), target_of(draws, "liver | A | d1"), atol=1e-12)
    np.testing.assert_allclose(made.std(0), 1.5 * control.std(0))


def test_a_fit_samples_its_own_predictions(without_d5, d5):
    draws = without_d5.predict(d5, num_samples=20)
    cells = without_d5.sample_cells(draws, d5)
    for name in draws["predictions"]["population"].values:
        made = cells[cells.obs["population"] == name].X
        np.testing.assert_allclose(made.mean(0), target_of(draws, name), atol=1e-6)


def test_targets_without_controls_are_all_named(counts, draws):
    without = counts.select(~(counts.labels["is_control"] & (counts.labels["batch"] == "d1")).to_numpy())
    with pytest.raises(
        DataError, match=r"targets = 'liver \| A @ 2 \| d1'.*none of 'liver \| d1'; give them"
    ):
        sample_cells(draws, without)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draw_index": 4}, "draw_index = 4: there are 4 draws; ask for 0 to 3"),
        ({"draw_index": -1}, "draw_index = -1"),
        ({"num_draws": 0}, "num_draws = 0"),
        ({"num_draws": 5}, "num_draws = 5: there are 4 draws"),
        ({"draw_index": 1, "num_draws": 2}, "draw_index = 1, num_draws = 2.*not both"),
        ({"cells_per_population": 0}, "cells_per_population = 0: ask for at least one"),
        ({"cells_per_population": {"liver | A @ 2 | d0": 3}}, r"no number for 'liver \| A @ 2 \| d1'"),
    ],
)
def test_impossible_requests_are_named(counts, draws, options, message):
    with pytest.raises(DataError, match=message):
        sample_cells(draws, counts, **options)


def test_another_scale_or_other_genes_are_refused(draws):
    screen = counts_screen()
    with pytest.raises(DataError, match="scale = 'other': the draws are on scale 'counts'"):
        sample_cells(draws, read_populations(screen, scale="other", **KEYS))
    with pytest.raises(DataError, match="missing 'gene0'"):
        sample_cells(draws, read_populations(screen[:, 1:].copy(), **COUNT_KEYS))


def test_columns_that_predicted_cells_need_are_refused(draws):
    screen = counts_screen()
    screen.obs = screen.obs.rename(columns={"donor": "draw"})
    with pytest.raises(DataError, match="obs columns 'draw' of the file"):
        sample_cells(draws, read_populations(screen, **(COUNT_KEYS | {"batch": "draw"})))
