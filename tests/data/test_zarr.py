"""Zarr stores that are broken or are none: refused by name, with a cure."""

import shutil

import pytest
import zarr

from hilbertcell.data.validation import DataError


@pytest.fixture
def store(make_screen, tmp_path):
    path = tmp_path / "cells.zarr"
    make_screen(genes=60).write_zarr(path, chunks=None)
    return path


def chunks_of(store, array):
    return sorted(file for file in (store / array / "c").rglob("*") if file.is_file())


def test_the_whole_store_is_read_without_a_warning(store, read):
    assert read(store).num_cells == 288


@pytest.mark.parametrize("array", ["X/data", "X/indices"])
def test_a_chunk_that_is_not_there_is_no_chunk_of_zeros(array, store, read):
    chunks_of(store, array)[0].unlink()
    with pytest.raises(
        DataError,
        match=rf"cannot read 'X' of .*cells\.zarr: 1 of .* chunks of /{array} are not there; .*copy",
    ):
        read(store)


def test_nor_is_a_shard_of_many_chunks(store, read):
    group = zarr.open_group(store, mode="r+")
    for name in ("data", "indices"):
        values = group["X"][name][:]
        copy = group["X"].create_array(
            name, shape=values.shape, dtype=values.dtype, chunks=(100,), shards=(1000,), overwrite=True
        )
        copy[:] = values
    assert read(store).num_cells == 288
    chunks_of(store, "X/data")[0].unlink()
    with pytest.raises(DataError, match=r"10 of the \d+ chunks of /X/data are not there"):
        read(store)


def test_nor_is_one_of_a_dense_matrix(make_screen, read, tmp_path):
    adata = make_screen()
    adata.X = adata.X.toarray()
    adata.write_zarr(tmp_path / "dense.zarr")
    assert read(tmp_path / "dense.zarr").num_cells == len(adata)
    chunks_of(tmp_path / "dense.zarr", "X")[0].unlink()
    with pytest.raises(DataError, match=r"of the .* chunks of /X are not there; zarr leaves out .* as CSR"):
        read(tmp_path / "dense.zarr")


@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr", "obs/donor/codes"])
@pytest.mark.parametrize("kept", [0, 20])
def test_a_chunk_that_is_cut(array, kept, store, read):
    chunk = chunks_of(store, array)[-1]
    chunk.write_bytes(chunk.read_bytes()[:kept])
    with pytest.raises(DataError, match=r"cells\.zarr"):
        read(store)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: shutil.rmtree(path / "X"), "cells.zarr'?: holds no X"),
        (lambda path: shutil.rmtree(path / "X" / "indices"), "cells.zarr: 'indices'; write or copy"),
        (lambda path: shutil.rmtree(path / "obs"), r"holds no obs; write it with AnnData\.write_zarr"),
        (lambda path: (path / "zarr.json").write_text("{"), "cannot be read as zarr"),
        (lambda path: (path / "zarr.json").unlink(), "is a folder, and not a zarr store; give"),
    ],
)  # fmt: skip
def test_unsound_stores(change, message, store, read):
    change(store)
    with pytest.raises(DataError, match=message):
        read(store)


def test_a_store_of_something_else(read, tmp_path):
    zarr.open_group(tmp_path / "other.zarr", mode="w")
    with pytest.raises(
        DataError, match=r"other\.zarr': holds no obs and no var; write it with AnnData\.write_zarr"
    ):
        read(tmp_path / "other.zarr")


def test_column_major_and_missing_layers(make_screen, read, tmp_path):
    adata = make_screen()
    adata.X = adata.X.tocsc()
    adata.write_zarr(tmp_path / "a.zarr")
    with pytest.raises(DataError, match=r"is stored as csc_matrix.*tocsr\(\)"):
        read(tmp_path / "a.zarr")
    with pytest.raises(DataError, match=r"layer = 'raw': is not a layer of .*a\.zarr; there are none"):
        read(tmp_path / "a.zarr", layer="raw")


def test_inspect_shows_a_store(store):
    from typer.testing import CliRunner

    from hilbertcell.analyses.cli import app

    keys = [
        "--perturbation",
        "treatment",
        "--control",
        "vehicle",
        "--context",
        "cell_type",
        "--batch",
        "donor",
    ]
    shown = CliRunner().invoke(app, ["inspect", str(store), *keys])
    assert shown.exit_code == 0
    assert "288 cells x 60 genes" in shown.output
    (store / "zarr.json").unlink()
    broken = CliRunner().invoke(app, ["inspect", str(store), *keys])
    assert broken.exit_code == 2
    assert "is a folder, and not a zarr store" in broken.output
