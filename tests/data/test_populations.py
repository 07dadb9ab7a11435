"""Reading, selecting and sampling cells: against the dense matrix, whatever the storage and the order of rows."""

import warnings

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hilbertcell.data.grouping import labels_from_json, labels_to_json
from hilbertcell.data.populations import Keys
from hilbertcell.data.validation import DataError


def dense(adata):
    return adata.X.toarray().astype(float) if sp.issparse(adata.X) else adata.X.astype(float)


def log1p_cp10k(x):
    return np.log1p(1e4 * x / x.sum(axis=1, keepdims=True))


def gather(populations, size):
    """All chunks put back in the order of the file; cells that did not come are nan."""
    result = np.full((len(populations.cell_names), len(populations.genes)), np.nan)
    for rows, x in populations.chunks(size):
        assert x.dtype == np.float64
        assert len(rows) <= size
        assert np.isnan(result[rows]).all(), "a cell came twice"
        result[rows] = x
    return result


def zarr_of_version_2(adata, path):
    with warnings.catch_warnings():  # AnnData is about to stop writing it; files stay
        warnings.simplefilter("ignore")
        with anndata.settings.override(zarr_write_format=2, auto_shard_zarr_v3=False):
            adata.write_zarr(path)
    assert (path / ".zgroup").exists()


@pytest.fixture(
    params=[
        "h5ad csr",
        "h5ad dense",
        "memory csr",
        "memory csc",
        "memory dense",
        "backed csr",
        "layer",
        "two files",
        "zarr csr",
        "zarr dense",
        "zarr layer",
        "zarr 2 csr",
        "h5ad and zarr",
    ]
)
def stored(request, make_screen, tmp_path):
    """One screen in every storage: (what to read, keywords, AnnData in memory)."""
    kind = request.param
    adata = make_screen(sparse="dense" not in kind)
    if kind == "h5ad and zarr":
        adata[:100].copy().write_h5ad(tmp_path / "a.h5ad")
        adata[100:200, ::-1].copy().write_zarr(tmp_path / "b.zarr")
        yield [tmp_path / "a.h5ad", str(tmp_path / "b.zarr"), adata[200:].copy()], {}, adata
    elif kind.startswith("zarr"):
        options = {}
        if kind == "zarr layer":
            adata.layers["raw"], adata.X, options = adata.X, sp.csr_matrix(adata.X * 0.5), {"layer": "raw"}
        if "2" in kind:
            zarr_of_version_2(adata, tmp_path / "a.zarr")
        else:
            adata.write_zarr(tmp_path / "a.zarr")
        if kind == "zarr layer":
            adata.X = adata.layers["raw"]
        yield tmp_path / "a.zarr", options, adata
    elif kind == "layer":
        adata.layers["raw"], adata.X = adata.X, sp.csr_matrix(adata.X * 0.5)
        adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
        adata.X = adata.layers["raw"]
        yield tmp_path / "a.h5ad", {"layer": "raw"}, adata
    elif kind == "two files":
        adata[:100].copy().write_h5ad(tmp_path / "a.h5ad")
        adata[100:, ::-1].copy().write_h5ad(tmp_path / "b.h5ad")  # genes in reverse
        yield [tmp_path / "a.h5ad", str(tmp_path / "b.h5ad")], {}, adata
    elif kind.startswith("memory"):
        if "csc" in kind:
            adata.X = adata.X.tocsc()
        yield adata, {}, adata
    else:
        adata.write_h5ad(tmp_path / "a.h5ad", compression="gzip")
        if kind.startswith("h5ad"):
            yield tmp_path / "a.h5ad", {}, adata
        else:
            backed = anndata.read_h5ad(tmp_path / "a.h5ad", backed="r")
            yield backed, {}, adata
            backed.file.close()


def test_every_storage_gives_the_same_cells(stored, read):
    source, keywords, adata = stored
    populations = read(source, **keywords)
    expected = log1p_cp10k(dense(adata))
    assert populations.keys.scale == "counts"
    assert populations.genes.tolist() == adata.var_names.tolist()
    assert populations.cell_names.tolist() == adata.obs_names.tolist()
    np.testing.assert_allclose(populations.library_size, dense(adata).sum(axis=1))
    for size in (1, 13, 100, 10_000):
        np.testing.assert_allclose(gather(populations, size), expected, rtol=1e-12)
    raw = [rows.toarray() if sp.issparse(rows) else rows for _, rows in populations.raw_chunks(50)]
    np.testing.assert_array_equal(np.concatenate(raw), dense(adata))


def test_read_cells_keeps_order_and_repeats(stored, read):
    source, keywords, adata = stored
    populations = read(source, **keywords)
    rows = np.array([287, 3, 3, 150, 0, 99, 100, 4])
    cells = populations.read_cells(rows)
    assert sp.issparse(cells) == sp.issparse(adata.X)
    np.testing.assert_array_equal(cells.toarray() if sp.issparse(cells) else cells, dense(adata)[rows])
    assert populations.obs(rows).index.tolist() == adata.obs_names[rows].tolist()
    assert populations.obs(rows)["total"].tolist() == adata.obs["total"].iloc[rows].tolist()
    assert populations.read_cells(np.array([], dtype=int)).shape == (0, 7)
    with pytest.raises(IndexError, match=r"\[0, 288\)"):
        populations.read_cells(np.array([288]))


def test_labels_count_every_cell_once(make_screen, read):
    adata = make_screen()
    populations = read(adata, dose="dose")
    labels = populations.labels
    kinds = adata.obs.astype(str).assign(
        dose=adata.obs["dose"].where(adata.obs["treatment"] != "vehicle", -1.0)
    )
    counts = kinds.groupby(["cell_type", "treatment", "dose", "donor"]).size()
    assert len(labels) == len(counts)
    for name, row in labels.iterrows():
        dose = -1.0 if row["is_control"] else row["dose"]
        assert row["num_cells"] == counts[row["context"], row["perturbation"], dose, row["batch"]]
        assert row["is_control"] == (row["perturbation"] == "vehicle") == np.isnan(row["dose"])
        dose = "" if row["is_control"] else f" @ {row['dose']:g}"
        assert name == f"{row['context']} | {row['perturbation']}{dose} | {row['batch']}"
        cells = populations.cells_of(name)
        assert len(cells) == row["num_cells"]
        assert set(kinds["cell_type"].iloc[cells]) == {row["context"]}
        assert set(kinds["treatment"].iloc[cells]) == {row["perturbation"]}
        assert set(kinds["donor"].iloc[cells]) == {row["batch"]}
    assert labels.index.is_unique
    key = list(
        zip(
            labels["context"],
            labels["batch"],
            ~labels["is_control"],
            labels["perturbation"],
            labels["dose"].fillna(0),
            strict=True,
        )
    )
    assert key == sorted(key)
    assert labels["num_cells"].sum() == populations.num_cells == len(adata)
    pd.testing.assert_frame_equal(labels_from_json(labels_to_json(labels)), labels)


def test_contexts_of_several_keys_are_joined(make_screen, read):
    adata = make_screen()
    adata.obs["tissue"] = np.where(np.arange(len(adata)) % 2, "blood", "spleen")
    labels = read(adata, context=("tissue", "cell_type")).labels
    assert sorted(set(labels["context"])) == ["blood | B", "blood | T", "spleen | B", "spleen | T"]
    adata.obs["tissue"] = np.where(np.arange(len(adata)) % 2, "blood | B", "blood")
    adata.obs["cell_type"] = np.where(np.arange(len(adata)) % 2, "x", "B | x")
    with pytest.raises(DataError, match=r"context = 'blood \| B \| x': two contexts"):
        read(adata, context=("tissue", "cell_type"))


def test_numbers_are_labels_too(make_screen, read):
    adata = make_screen()
    adata.obs["donor"] = adata.obs["donor"].astype(str).map({"d0": 101, "d1": 107, "d2": 1015})
    assert sorted(set(read(adata).labels["batch"])) == ["101", "1015", "107"]


def test_library_size_key_sets_the_scale(make_screen, read):
    adata = make_screen()
    total = adata.obs["total"].to_numpy()[:, None]
    populations = read(adata, library_size="total")
    np.testing.assert_allclose(gather(populations, 50), np.log1p(1e4 * dense(adata) / total), rtol=1e-12)
    adata.obs["total"] = 1.5
    assert any(
        "below the sum of the counts" in warning for warning in read(adata, library_size="total").warnings
    )


@pytest.mark.parametrize("scale", ["log1p", "other"])
@pytest.mark.parametrize("sparse", [True, False])
def test_continuous_values_stay_as_they_are(scale, sparse, make_screen, read):
    adata = make_screen(sparse=sparse)
    adata.X = adata.X * np.float32(0.37)
    populations = read(adata, scale=scale)
    assert populations.library_size is None
    np.testing.assert_array_equal(gather(populations, 31), dense(adata))


def test_half_precision_files_can_be_read(make_screen, read, tmp_path):
    path = tmp_path / "half.h5ad"
    adata = make_screen()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        values = file["X/data"][:].astype(np.float16)
        del file["X/data"]
        file["X/data"] = values
    np.testing.assert_allclose(gather(read(path), 50), log1p_cp10k(dense(adata)), rtol=1e-12)


def test_stored_zeros_and_repeated_indices_change_nothing(make_screen, read):
    """A CSR entry stored in two halves is their sum, also under log1p; its row equals the plain one."""
    adata = make_screen()
    plain = adata.X
    halves = sp.csr_array(
        (
            np.concatenate([np.ones(1), np.zeros(1), plain.data - (np.arange(plain.nnz) == 0)]),
            np.concatenate([plain.indices[:1], plain.indices[:1], plain.indices]),
            np.append(0, plain.indptr[1:] + 2),
        ),
        shape=plain.shape,
    )
    assert halves.nnz == plain.nnz + 2
    expected = gather(read(adata), 50)
    adata.X = halves
    populations = read(adata)
    np.testing.assert_allclose(gather(populations, 50), expected, rtol=1e-12)
    assert halves.nnz == plain.nnz + 2, "reading changed the user's matrix"


def test_select_hides_the_other_cells(make_screen, read):
    populations = read(make_screen())
    whole = gather(populations, 50)
    mask = (populations.labels["batch"] == "d1").to_numpy()
    some = populations.select(mask)
    pd.testing.assert_frame_equal(some.labels, populations.labels[mask])
    inside = mask[populations.cell_population]
    np.testing.assert_array_equal(some.cell_population >= 0, inside)
    names = some.labels.index[some.cell_population[inside]]
    assert names.tolist() == populations.labels.index[populations.cell_population[inside]].tolist()
    result = gather(some, 50)
    np.testing.assert_array_equal(result[inside], whole[inside])
    assert np.isnan(result[~inside]).all()
    again = some.select((some.labels["context"] == "B").to_numpy())
    assert again.num_cells == again.labels["num_cells"].sum() == 4 * 12
    assert sum(len(rows) for rows, _ in again.chunks(50)) == again.num_cells
    with pytest.raises(ValueError, match=r"\(8,\), got \(3,\)"):
        some.select([True, False, True])


def test_keep_cells_takes_the_same_cells_whatever_their_order(make_screen, read):
    adata = make_screen()
    name = "T | TNF | d0"
    shuffled = adata[np.random.default_rng(3).permutation(len(adata))].copy()
    kept = [
        p.cell_names[p.cells_of(name)]
        for p in (read(a).keep_cells(name, 5, seed=1) for a in (adata, shuffled))
    ]
    assert sorted(kept[0]) == sorted(kept[1])
    other = read(adata).keep_cells(name, 5, seed=2)
    assert sorted(other.cell_names[other.cells_of(name)]) != sorted(kept[0])
    assert other.labels.loc[name, "num_cells"] == 5
    assert other.num_cells == len(adata) - 7
    with pytest.raises(DataError, match=r"num_cells = 13: .* has 12; ask for 1 to 12"):
        other.keep_cells("T | TNF | d1", 13)
    with pytest.raises(DataError, match=r"'T \| TNF \| d9'"):
        other.keep_cells("T | TNF | d9", 3)


def test_match_genes_reorders_and_names_what_differs(make_screen, read, tmp_path):
    adata = make_screen()
    adata.write_h5ad(tmp_path / "a.h5ad")
    populations = read(tmp_path / "a.h5ad")
    order = np.array([3, 0, 6, 1, 2, 5, 4])
    matched = populations.match_genes(populations.genes[order])
    assert matched.genes.tolist() == populations.genes[order].tolist()
    np.testing.assert_array_equal(gather(matched, 50), gather(populations, 50)[:, order])
    cells = np.array([5, 2])
    np.testing.assert_array_equal(matched.read_cells(cells).toarray(), dense(adata)[cells][:, order])
    back = matched.match_genes(populations.genes)
    np.testing.assert_array_equal(gather(back, 50), gather(populations, 50))
    with pytest.raises(DataError, match="missing 'ISG15', extra 'g6'; subset the file"):
        populations.match_genes([*populations.genes[:6], "ISG15"])


def test_pilot_does_not_depend_on_the_order_of_rows(make_screen, read):
    adata = make_screen()
    shuffled = adata[np.random.default_rng(3).permutation(len(adata))].copy()
    first, second = read(adata), read(shuffled)
    x, codes = first.pilot(60, seed=4)
    y, shuffled_codes = second.pilot(60, seed=4)
    np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(codes, shuffled_codes)
    assert x.shape == (60, 7)
    assert not np.array_equal(x, first.pilot(60, seed=5)[0])
    everything, _ = first.pilot()
    np.testing.assert_array_equal(np.sort(everything, axis=0), np.sort(gather(first, 50), axis=0))
    mask = (first.labels["batch"] == "d1").to_numpy()
    _, only = first.select(mask).pilot(60)
    assert len(only) == 60
    assert only.max() < mask.sum()


def test_pilot_is_a_fair_sample(make_screen, read):
    """Cells of every population are drawn alike: chi-square of the counts below its 99.9 % point."""
    populations = read(make_screen(cells=60))
    _, codes = populations.pilot(480)
    expected = 480 / len(populations.labels)
    statistic = np.sum((np.bincount(codes, minlength=24) - expected) ** 2 / expected)
    assert statistic < 49.7  # chi-square with 23 degrees of freedom; drawing without replacement lowers it


def test_legal_oddities_are_listed(make_screen, read):
    adata = make_screen()
    x = adata.X.toarray()
    obs = adata.obs
    others = np.flatnonzero((obs["cell_type"] == "T") & (obs["treatment"] == "TNF"))
    x[others[1]], x[others[2]], x[others[3]] = x[others[0]], 0, 0
    adata.X = sp.csr_matrix(x)
    lonely = np.flatnonzero(
        (obs["cell_type"] == "T") & (obs["treatment"] == "vehicle") & (obs["donor"] == "d1")
    )
    obs["treatment"] = obs["treatment"].cat.add_categories(["unused"])
    obs.iloc[lonely[0], obs.columns.get_loc("treatment")] = "TNF"
    kept = adata[np.setdiff1d(np.arange(len(adata)), lonely[1:])].copy()
    kept.obs["treatment"] = kept.obs["treatment"].cat.set_categories(
        ["IFNb", "IFNb+TNF", "TNF", "unused", "vehicle"]
    )
    drop = np.flatnonzero(
        (kept.obs["cell_type"] == "B") & (kept.obs["treatment"] == "IFNb") & (kept.obs["donor"] == "d0")
    )
    kept = kept[np.setdiff1d(np.arange(len(kept)), drop[1:])].copy()
    kept.obs["treatment"] = kept.obs["treatment"].cat.set_categories(
        ["IFNb", "IFNb+TNF", "TNF", "unused", "vehicle"]
    )
    populations = read(kept)
    assert populations.num_cells == len(kept)
    warnings = "\n".join(populations.warnings)
    dense_rows = kept.X.toarray()
    filled = dense_rows[dense_rows.any(axis=1)]
    assert f"{len(filled) - len(np.unique(filled, axis=0))} cell" in warnings
    assert "2 cells with only zeros" in warnings
    assert "1 of 23 populations with fewer than 10 cells: 'B | IFNb | d0 (1)'" in warnings
    assert "1 of 6 (context, batch) without control cells" in warnings
    assert "'T | d1'" in warnings
    assert "categories of 'treatment' without cells: 'unused'" in warnings
    assert (gather(populations, 50)[~dense_rows.any(axis=1)] == 0).all()


def test_a_clean_file_has_no_warnings(make_screen, read):
    adata = make_screen(genes=60)
    assert read(adata).warnings == ()


def test_single_precision_doses_are_the_decimals_they_were_written_as(make_screen, read):
    adata = make_screen()
    adata.obs["dose"] = np.where(adata.obs["treatment"] == "TNF", 0.005, 0.1).astype(np.float32)
    assert set(read(adata, dose="dose").labels["dose"].dropna()) == {0.005, 0.1}


def test_a_progress_bar_changes_nothing(make_screen, read, capsys):
    adata = make_screen()
    populations = read(adata, progress=True)
    assert sum(len(rows) for rows, _ in populations.chunks(50, progress=True)) == len(adata)
    assert capsys.readouterr() == ("", ""), "no terminal, no bar"


def test_controls_alone_are_enough_to_predict(make_screen, read):
    adata = make_screen()
    controls = adata[adata.obs["treatment"] == "vehicle"].copy()
    populations = read(controls, require=("control",))
    assert populations.labels["is_control"].all()
    perturbed = read(adata[adata.obs["treatment"] != "vehicle"].copy(), require=("perturbed",))
    assert not perturbed.labels["is_control"].any()


def test_features_are_read_from_csv_with_awkward_names(make_screen, read, tmp_path):
    adata = make_screen()
    adata.obs["treatment"] = adata.obs["treatment"].astype(str).replace({"IFNb": "NA", "IFNb+TNF": "NA+TNF"})
    (tmp_path / "features.csv").write_text("name,a,b\nNA,1,2.5\nTNF,-1,0\nSTAT1,3,4\n")
    features = read(adata, perturbation_features=tmp_path / "features.csv").perturbation_features
    assert features.index.tolist() == ["NA", "TNF", "STAT1"]
    np.testing.assert_array_equal(features.to_numpy(), [[1, 2.5], [-1, 0], [3, 4]])


def test_keys_survive_json():
    keys = Keys("p", "c", ("a", "b"), "d", dose="uM", layer="raw", scale="other")
    assert Keys.from_dict(keys.to_dict()) == keys
    assert isinstance(keys.to_dict()["context"], list)
