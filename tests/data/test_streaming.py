"""One streaming pass over sparse files: its arithmetic, its processes, and going on after an interruption."""

import os
import signal
import subprocess
import sys
import tracemalloc
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
import pytest
import scipy.sparse as sp

from hilbertcell.data import moments as streaming
from hilbertcell.data.moments import Moments, stream_moments
from hilbertcell.data.population_sums import Scoring
from hilbertcell.data.populations import natural_scale
from hilbertcell.data.scan import scan_matrix
from hilbertcell.data.stream_progress import StreamProgress
from hilbertcell.models.feature_maps import FeatureMap

NAMES = [field.name for field in fields(Moments) if field.name != "labels"]


def waves(frequency=1.0):
    """40 genes and two waves, one of gene 0 and one of gene 1 (spawned processes know no class of a test)."""
    return FeatureMap(
        center=np.full(40, 0.5),
        scale=np.ones(40),
        directions=np.eye(40)[:, :2],
        frequencies=frequency * np.eye(2),
        phase=np.array([0.0, 1.0]),
        bandwidths=np.ones(2),
        weights=np.ones(42),
    )


class Genes:
    """No feature but the genes."""

    def random_features(self, rows):
        return np.zeros((rows.shape[0], 0))

    __call__ = staticmethod(np.array)


@pytest.fixture
def thin(make_screen):
    """A screen in which one count of six is left."""
    adata = make_screen(genes=40, cells=20)
    adata.X = adata.X.multiply(np.random.default_rng(1).random(adata.shape) < 0.17).tocsr()
    adata.X.eliminate_zeros()
    return adata


LOADINGS = np.random.default_rng(1).normal(size=(42, 3))
CENTER = np.random.default_rng(2).normal(size=42)


def stream(populations, **options):
    return stream_moments(populations, options.pop("feature_map", waves()), LOADINGS, CENTER, **options)


def assert_equal(found, expected, **tolerance):
    for name in NAMES:
        got, wanted = getattr(found, name), getattr(expected, name)
        if tolerance:
            np.testing.assert_allclose(got, wanted, err_msg=name, **tolerance)
        else:
            np.testing.assert_array_equal(got, wanted, err_msg=name)


def test_sparse_rows_give_what_dense_rows_give(thin, read):
    populations = read(thin)
    assert Scoring(waves(), LOADINGS, CENTER).is_sparse(thin.X), "or nothing sparse is tested"
    dense = stream(populations, feature_map=lambda rows: waves()(rows))
    assert_equal(stream(populations), dense, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("chunk_size", [1, 7, 101, 10_000])
def test_neither_blocks_nor_order_of_rows_matter(chunk_size, thin, read):
    expected = stream(read(thin))
    shuffled = thin[np.random.default_rng(chunk_size).permutation(len(thin))].copy()
    assert_equal(stream(read(shuffled), chunk_size=chunk_size), expected, rtol=1e-10, atol=1e-13)


def test_small_pieces_change_nothing_but_rounding(thin, read, monkeypatch):
    """A population that goes over several pieces of a block is put together again."""
    expected = stream(read(thin))
    monkeypatch.setattr("hilbertcell.data.population_sums._PIECE", 300)
    assert_equal(stream(read(thin)), expected, rtol=1e-10, atol=1e-13)


def test_stored_values_far_from_zero_cost_no_precision(thin, read):
    """Sums of squares lose everything: gene 0 is 1e8 with standard deviation 1 wherever it is stored."""
    rng = np.random.default_rng(4)
    x = np.zeros(thin.shape)
    x[:, 0] = 1e8 + rng.normal(size=len(thin))
    x[:, 1] = np.where(rng.random(len(thin)) < 0.5, x[:, 0], 0)
    thin.X = sp.csr_matrix(x)
    populations = read(thin, scale="other")
    found = stream_moments(populations, Genes(), np.eye(40)[:, 2:4], np.zeros(40), chunk_size=50)
    for j in range(len(populations.labels)):
        cells = x[populations.cell_population == j]
        np.testing.assert_allclose(found.variance[j], cells.var(axis=0, ddof=1), rtol=1e-7)


def test_blocks_follow_the_memory_they_take(thin, read, tmp_path):
    thin.write_h5ad(tmp_path / "a.h5ad")
    matrix = read(tmp_path / "a.h5ad").matrix
    sparse_bytes = thin.X.nnz * (4 + 4)
    assert len(matrix.partition(None, sparse_bytes)) == 1
    bounds = matrix.partition(None, sparse_bytes / 3.5)
    assert len(bounds) == 4
    assert [bounds[0][0], bounds[-1][1]] == [0, len(thin)]
    assert all(a[1] == b[0] for a, b in pairwise(bounds))
    assert np.ptp([stop - start for start, stop in bounds]) <= 3, "blocks of one part are alike"


def test_the_number_of_processes_changes_no_bit(thin, read, tmp_path):
    thin[:100].copy().write_h5ad(tmp_path / "a.h5ad", compression="gzip")
    thin[100:, ::-1].copy().write_zarr(tmp_path / "b.zarr")
    source = [tmp_path / "a.h5ad", tmp_path / "b.zarr"]
    populations = read(source)
    some = populations.select(populations.labels["context"] == "T")
    expected = stream(some, chunk_size=37)
    assert_equal(stream(some, chunk_size=37, workers=2), expected)
    assert_equal(
        expected, stream(read(thin).select(populations.labels["context"] == "T")), rtol=1e-10, atol=1e-13
    )


def interrupted(populations, path, after, monkeypatch, **options):
    """Break a pass off when `after` blocks are in its file."""
    save = StreamProgress.save

    def then_break(self, total, done):
        save(self, total, done)
        if done == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(streaming, "SAVE_SECONDS", 0.0)
        patch.setattr(StreamProgress, "save", then_break)
        with pytest.raises(KeyboardInterrupt):
            stream(populations, resume=path, **options)
    assert path.is_file()


def test_an_interrupted_pass_goes_on_to_the_same_bits(thin, read, tmp_path, monkeypatch):
    thin.write_h5ad(tmp_path / "a.h5ad")
    populations, path = read(tmp_path / "a.h5ad"), tmp_path / "sums"
    expected = stream(populations, chunk_size=60)
    interrupted(populations, path, 5, monkeypatch, chunk_size=60)
    read_again = []
    sum_up = streaming._Blocks.sum_up
    monkeypatch.setattr(
        streaming._Blocks, "sum_up", lambda self, block: read_again.append(block) or sum_up(self, block)
    )
    assert_equal(stream(populations, chunk_size=60, resume=path), expected)
    assert len(read_again) == len(populations.matrix.partition(60, 0)) - 5
    assert [file.name for file in tmp_path.iterdir()] == ["a.h5ad"], "nothing is left behind"


CHANGES = {
    "other blocks": lambda p: (p, {"chunk_size": 61}),
    "other features": lambda p: (p, {"feature_map": waves(2.0)}),
    "other populations": lambda p: (p.select(p.labels["context"] == "T"), {}),
    "other genes": lambda p: (p.match_genes(p.genes[::-1]), {}),
    "other counts": lambda p: (replace(p, library_size=p.library_size + 1), {}),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_pass_over_anything_else_begins_anew(change, thin, read, tmp_path, monkeypatch):
    thin.write_h5ad(tmp_path / "a.h5ad")
    populations, path = read(tmp_path / "a.h5ad"), tmp_path / "sums"
    interrupted(populations, path, 2, monkeypatch, chunk_size=60)
    other, options = CHANGES[change](populations)
    options = {"chunk_size": 60} | options
    assert_equal(stream(other, resume=path, **options), stream(other, **options))
    assert not path.exists()


def test_what_cannot_be_resumed_is_named(thin, read, tmp_path):
    thin.write_h5ad(tmp_path / "a.h5ad")
    populations = read(tmp_path / "a.h5ad")
    (tmp_path / "notes").write_text("mine")
    with pytest.raises(ValueError, match=r"resume = .*notes.* is not the file of a streaming pass"):
        stream(populations, resume=tmp_path / "notes")
    assert (tmp_path / "notes").read_text() == "mine"
    with pytest.raises(ValueError, match="resume is for files"):
        stream(read(thin), resume=tmp_path / "sums")
    with pytest.raises(ValueError, match=r"with to_arrays\(\)"):
        stream_moments(populations, Genes(), np.eye(40)[:, :2], np.zeros(40), resume=tmp_path / "sums")


def test_natural_scale_of_sparse_and_dense_agree():
    rng = np.random.default_rng(0)
    x = rng.poisson(0.5, (30, 9))
    x[3] = 0
    library = x.sum(axis=1).astype(float)
    expected = np.log1p(1e4 * x / np.maximum(library, 1)[:, None])
    np.testing.assert_allclose(natural_scale(x, "counts", library), expected, rtol=1e-12)
    np.testing.assert_allclose(natural_scale(sp.csr_array(x), "counts", library), expected, rtol=1e-12)


def test_memory_is_bounded_by_the_chunk(make_screen, read, tmp_path):
    """A file whose dense matrix has 24 MB is read in blocks of 1.3 MB: the peak stays far below the matrix."""
    adata = make_screen(donors=5, cells=75, genes=1000)
    adata.write_h5ad(tmp_path / "a.h5ad")
    matrix = adata.n_obs * adata.n_vars * 8
    populations = read(tmp_path / "a.h5ad")
    del adata
    tracemalloc.start()
    scan_matrix(populations.matrix, chunk_size=128)
    for _ in populations.chunks(128):
        pass
    stream_moments(populations, lambda x: x[:, :5], np.eye(5), np.zeros(5), chunk_size=128)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert matrix > 20e6
    assert peak < matrix / 3


KILLED = """
import os, signal, sys
import numpy as np
import hilbertcell.data.moments
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.moments import stream_moments
from hilbertcell.data.stream_progress import StreamProgress
from hilbertcell.models.feature_maps import FeatureMap

folder, kill = sys.argv[1:]
hilbertcell.data.moments.SAVE_SECONDS = 0.0
save = StreamProgress.save
def save_and_die(self, total, done):
    save(self, total, done)
    if done == 4 and kill == "yes":
        os.kill(os.getpid(), signal.SIGKILL)
StreamProgress.save = save_and_die
populations = read_populations(
    folder + "/a.h5ad", perturbation="treatment", control="vehicle", context="cell_type", batch="donor"
)
arrays = dict(center=np.ones(40), scale=np.ones(40), directions=np.eye(40)[:, :2], frequencies=np.eye(2),
              phase=np.zeros(2), bandwidths=np.ones(2), weights=np.ones(42))
moments = stream_moments(populations, FeatureMap(**arrays), np.eye(42)[:, 38:], np.zeros(42), 60,
                         resume=__import__("pathlib").Path(folder) / "sums")
sys.stdout.buffer.write(b"".join(array.tobytes() for array in moments.to_arrays().values()))
"""


@pytest.mark.slow
def test_a_killed_pass_goes_on_to_the_same_bits(thin, tmp_path):
    thin.write_h5ad(tmp_path / "a.h5ad")

    def run(kill):
        return subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path), kill],
            capture_output=True,
            env=os.environ,
            check=False,
        )

    whole = run("no")
    assert whole.returncode == 0, whole.stderr
    assert not (tmp_path / "sums").exists()
    assert run("yes").returncode == -signal.SIGKILL
    assert (tmp_path / "sums").exists()
    assert run("no").stdout == whole.stdout
