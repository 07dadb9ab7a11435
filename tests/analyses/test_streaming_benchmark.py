"""The streaming benchmark on a few cells: its files, its measures, and that streaming them is exact."""

from dataclasses import replace

import anndata
import numpy as np
import pytest
import scipy.sparse as sp

from hilbertcell.analyses import streaming_benchmark
from hilbertcell.analyses.streaming_benchmark import (
    KEYS,
    STORAGES,
    WORLD,
    copy_cells,
    measure,
    page,
    prepare,
    ratios,
    read_only,
    simulated_blocks,
    stream,
    write_cells,
)
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.moments import stream_moments

SMALL = replace(
    WORLD, contexts=("B", "T"), perturbations=("a",), num_batches=2, num_genes=150, library_size=12.0
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cells")
    write_cells(folder / STORAGES[0], 700, SMALL.num_genes, simulated_blocks(700, SMALL, size=300))
    for name in STORAGES[1:]:
        copy_cells(folder / STORAGES[0], folder / name)
    prepare(folder / STORAGES[0], folder / "prepared.safetensors")
    return folder


def test_the_file_is_that_of_the_simulated_cells(folder):
    whole = anndata.read_h5ad(folder / STORAGES[0])
    rows, obs = zip(*simulated_blocks(700, SMALL, size=300), strict=True)
    np.testing.assert_array_equal(whole.X.toarray(), sp.vstack(rows).toarray())
    assert whole.obs["donor"].tolist() == [label for block in obs for label in block["donor"]]
    assert whole.obs_names.is_unique
    labels = read_populations(folder / STORAGES[0], **KEYS).labels
    assert len(labels) == 2 * 2 * 2
    assert not any(block["donor"].cat.codes.is_monotonic_increasing for block in obs), (
        "cells lie in random order"
    )


@pytest.mark.parametrize("name", STORAGES[1:])
def test_copies_hold_the_same_cells_as_anndata_reads_them(name, folder):
    whole = anndata.read_h5ad(folder / STORAGES[0])
    copy = (anndata.read_zarr if name.endswith("zarr") else anndata.read_h5ad)(folder / name)
    np.testing.assert_array_equal(copy.X.toarray(), whole.X.toarray())
    assert copy.obs.equals(whole.obs)


def test_read_only_reads_the_entries_of_its_rows(folder):
    counts = anndata.read_h5ad(folder / STORAGES[0]).X
    for name in STORAGES:
        assert read_only(folder / name, (100, 250)) == counts[100:250].nnz * (4 + 4) + 151 * 8


def test_measures(folder):
    found = measure(folder / STORAGES[0], folder / "prepared.safetensors", 1, 2)
    assert found["cells"] == 700
    assert {len(taken) for taken in found["seconds"].values()} == {2}
    result = {"seconds": {"read": [1.0, 2.0], "stream": [4.0, 4.0]}}
    assert ratios(result, "stream").tolist() == [0.25, 0.5]
    text = page({"density": 0.05, "num_genes": 150, "storages": {STORAGES[0]: found | {"bytes": 5e6}}})
    assert "700 simulated cells of 8 populations" in text
    assert "| gzip.h5ad |" in text


@pytest.mark.slow
def test_fifty_thousand_cells_are_summed_as_in_memory(tmp_path):
    """Whatever the blocks, the processes and the order of the rows."""
    num_cells = 50_000
    world = replace(WORLD, perturbations=("a", "b"), num_batches=6, num_genes=500, library_size=35.0)
    path, prepared = tmp_path / STORAGES[0], tmp_path / "prepared.safetensors"
    write_cells(path, num_cells, world.num_genes, simulated_blocks(num_cells, world))
    prepare(path, prepared)
    populations = read_populations(path, **KEYS)
    whole = anndata.read_h5ad(path)
    arrays = streaming_benchmark.load_file(prepared)
    feature_map = streaming_benchmark.FeatureMap.from_arrays(arrays)
    loadings, center = arrays["loadings"], arrays["scores_center"]
    x = whole.X.toarray().astype(np.float64)
    phi = feature_map(np.log1p(1e4 * x / np.maximum(x.sum(axis=1, keepdims=True), 1)))
    of = [populations.cell_population == j for j in range(len(populations.labels))]
    expected = {
        "mean": np.array([phi[cells].mean(axis=0) for cells in of]),
        "variance": np.array([phi[cells].var(axis=0, ddof=1) for cells in of]),
        "factor_covariance": np.array([np.cov(((phi[cells] - center) @ loadings).T) for cells in of]),
    }
    shuffled = whole[np.random.default_rng(0).permutation(num_cells)].copy()
    shuffled.write_zarr(tmp_path / "shuffled.zarr")
    found = {
        "one block": stream(populations, prepared),
        "blocks": stream(populations, prepared, chunk_size=7_001),
        "two processes": stream(populations, prepared, 2, 7_001),
        "shuffled": stream(read_populations(tmp_path / "shuffled.zarr", **KEYS), prepared, chunk_size=9_999),
        "in memory": stream_moments(read_populations(shuffled, **KEYS), feature_map, loadings, center),
    }
    for how, moments in found.items():
        np.testing.assert_array_equal(moments.n, [cells.sum() for cells in of])
        for name, wanted in expected.items():
            # A covariance may vanish, a gene may have no count: rounding is relative to the terms of the sums.
            scale = np.abs(wanted).max() * 1e-13 if name == "factor_covariance" else 1e-14
            got = getattr(moments, name)
            np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=scale, err_msg=f"{how}: {name}")
    np.testing.assert_array_equal(found["blocks"].variance, found["two processes"].variance)
    np.testing.assert_array_equal(found["blocks"].factor_covariance, found["two processes"].factor_covariance)
