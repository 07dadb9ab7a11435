"""The shared real data sets: what the reader must see in them, counted another way."""

import anndata
import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.moments import stream_moments
from hilbertcell.data.splits import SplitError, leave_one_batch_out
from hilbertcell.data.validation import DataError

KEYS = {"perturbation": "perturbation", "control": "control"}


def check_moments(populations, path, natural):
    """Streamed moments of every population against NumPy on the file read whole."""
    adata = anndata.read_h5ad(path)
    x = natural(
        np.asarray(adata.X.todense() if hasattr(adata.X, "todense") else adata.X, dtype=float), adata.obs
    )
    num_genes = x.shape[1]
    loadings = np.random.default_rng(0).normal(size=(num_genes, 4)) / np.sqrt(num_genes)
    moments = stream_moments(populations, lambda x: x, loadings, np.ones(num_genes), chunk_size=1000)
    assert moments.n.sum() == len(x)
    for j in range(len(moments.n)):
        cells = x[populations.cell_population == j]
        np.testing.assert_allclose(moments.mean[j], cells.mean(axis=0), rtol=1e-10, atol=1e-12)
        if len(cells) > 1:
            np.testing.assert_allclose(moments.variance[j], cells.var(axis=0, ddof=1), rtol=1e-10, atol=1e-12)
            covariance = np.cov((cells @ loadings).T)
            np.testing.assert_allclose(moments.factor_covariance[j], covariance, rtol=1e-9, atol=1e-11)


def test_kang_wide(data_dir):
    path = data_dir / "kang_ifnb_wide.h5ad"
    populations = read_populations(path, **KEYS, context="cell_type", batch="donor")
    assert populations.keys.scale == "counts"
    assert populations.num_cells == 9544
    assert len(populations.genes) == 590
    assert set(populations.labels["perturbation"]) == {"control", "IFNb"}
    assert populations.labels["batch"].nunique() == 6
    assert any("fewer than 10 cells" in warning for warning in populations.warnings)
    check_moments(populations, path, lambda x, obs: np.log1p(1e4 * x / x.sum(axis=1, keepdims=True)))
    assert len(leave_one_batch_out(populations.labels)) == 6


def test_kang_100_genes_has_an_empty_cell(data_dir):
    path = data_dir / "kang_ifnb_100genes.h5ad"
    populations = read_populations(path, **KEYS, context="cell_type", batch="donor")
    x = anndata.read_h5ad(path).X.toarray()
    empty = ~x.any(axis=1)
    assert f"{empty.sum()} cell with only zeros" in populations.warnings
    equal = (~empty).sum() - len(np.unique(x[~empty], axis=0))
    assert [warning for warning in populations.warnings if "same values" in warning] == [
        f"{equal} cells with the same values as another cell"
    ][: int(equal > 0)]


def test_bodenmiller_must_declare_its_scale(data_dir):
    path = data_dir / "bodenmiller_bcrxl_cytof.h5ad"
    with pytest.raises(DataError, match=r"scale = None.*scale='other'"):
        read_populations(path, **KEYS, context="cell_type", batch="donor")
    with pytest.raises(DataError, match="log1p cannot be negative"):
        read_populations(path, **KEYS, context="cell_type", batch="donor", scale="log1p")
    populations = read_populations(path, **KEYS, context="cell_type", batch="donor", scale="other")
    assert populations.num_cells == 18219
    assert populations.library_size is None
    check_moments(populations, path, lambda x, obs: x)


def test_papalexi_has_library_sizes_and_features(data_dir):
    path = data_dir / "papalexi_eccite_crispr.h5ad"
    populations = read_populations(
        path,
        **KEYS,
        context="cell_type",
        batch="replicate",
        library_size="total_counts",
        perturbation_features=data_dir / "sideinfo_gene_go_svd64.csv.gz",
    )
    assert populations.perturbation_features.shape == (3078, 64)
    assert populations.labels["perturbation"].nunique() == 21
    assert len(populations.labels) == 58
    check_moments(
        populations, path, lambda x, obs: np.log1p(1e4 * x / obs["total_counts"].to_numpy()[:, None])
    )


def test_ova_has_doses_and_two_context_keys(data_dir):
    populations = read_populations(
        data_dir / "ova_activation_flow.h5ad",
        **KEYS,
        context=("treatment", "cell_type"),
        batch="replicate",
        dose="dose",
        scale="other",
    )
    labels = populations.labels
    assert sorted(set(labels["dose"].dropna())) == [0.005, 0.05, 0.5]
    assert labels["dose"].isna().equals(labels["is_control"])
    assert "Stim-A | CD4 T | OVA @ 0.005 | rep1" in labels.index
    assert labels["num_cells"].sum() == 36000


def test_wnv_mice_are_seen_in_one_condition_only(data_dir):
    populations = read_populations(
        data_dir / "wnv_cns_flow.h5ad", **KEYS, context="cell_type", batch="donor", scale="other"
    )
    controlled = populations.labels.groupby("batch")["is_control"].agg(["any", "all"])
    assert (controlled["any"] == controlled["all"]).all()
    assert any(
        "36 of 72 (context, batch) without control cells" in warning for warning in populations.warnings
    )
    with pytest.raises(SplitError, match="found 0"):
        leave_one_batch_out(populations.labels)


def test_bulk_compounds_with_doses(data_dir):
    populations = read_populations(
        data_dir / "l1000_ljp005_a375_bulk.h5ad",
        **KEYS,
        context="cell_type",
        batch="batch",
        dose="dose",
        scale="other",
    )
    assert populations.labels.loc[populations.labels["is_control"], "num_cells"].tolist() == [26]
    assert (populations.labels["num_cells"] == 1).sum() > 300
    assert populations.labels["perturbation"].nunique() == 60


def test_files_in_pieces_equal_the_whole(data_dir, tmp_path):
    """Kang cut into three files with genes in other orders: same labels, same pilot, same moments."""
    path = data_dir / "kang_ifnb_wide.h5ad"
    adata = anndata.read_h5ad(path)
    rng = np.random.default_rng(0)
    rows, pieces = np.array_split(rng.permutation(adata.n_obs), 3), []
    for i, part in enumerate(rows):
        pieces.append(tmp_path / f"{i}.h5ad")
        adata[part, rng.permutation(adata.n_vars) if i else np.arange(adata.n_vars)].copy().write_h5ad(
            pieces[-1]
        )
    whole = read_populations(path, **KEYS, context="cell_type", batch="donor")
    parts = read_populations(pieces, **KEYS, context="cell_type", batch="donor")
    pd.testing.assert_frame_equal(parts.labels, whole.labels)
    np.testing.assert_array_equal(parts.pilot(500)[0], whole.pilot(500)[0])
    loadings, center = rng.normal(size=(590, 3)), np.zeros(590)
    expected = stream_moments(whole, lambda x: x, loadings, center)
    found = stream_moments(parts, lambda x: x, loadings, center)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-10)
    np.testing.assert_allclose(found.variance, expected.variance, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.factor_covariance, expected.factor_covariance, rtol=1e-10, atol=1e-10)
