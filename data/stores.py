"""Files that hold AnnData, h5ad (HDF5) and zarr, opened alike: groups, arrays, and blocks of rows of a matrix.

Both libraries have groups that are mappings with `attrs`, and arrays with `shape`, `dtype` and slices; what is
written here needs no more than that of either.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp

type Node = Any  # a group or an array of h5py or of zarr
type Rows = Any  # (m, G) CSR or dense array: scipy has no types to say it with
type Reader = Callable[[int, int], Rows]

# What h5py and zarr raise when something inside a file is broken depends on what it is.
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError)
_ZARR_FILES = ("zarr.json", ".zgroup", ".zmetadata")  # of version 3; of version 2


def is_zarr(path: Path) -> bool:
    """Whether a folder is a zarr store (version 2 or 3) and not just a folder."""
    return any((path / name).is_file() for name in _ZARR_FILES)


@contextmanager
def open_store(path: Path) -> Iterator[Node]:
    """The root group of an h5ad file, or of a zarr store if `path` is a folder. Raises: any of `UNREADABLE`."""
    if path.is_dir():
        import zarr

        # Consolidated metadata would tell of what was there when it was written, and zarr fills in the rest.
        yield zarr.open_group(path, mode="r", use_consolidated=False)
    else:
        with h5py.File(path, "r") as file:
            yield file


def is_node(matrix: object) -> bool:
    """Whether a matrix is a node of a file, not in memory."""
    return type(matrix).__module__.partition(".")[0] in ("h5py", "zarr")


def is_group(node: Node) -> bool:
    """Whether a node is a group (as sparse matrices are) and not an array."""
    return not hasattr(node, "dtype")


def stored_as(node: Node) -> str:
    """How a node stores its matrix: 'array', 'csr_matrix', 'csc_matrix' or what else it says."""
    if not is_group(node):
        return "array"
    return str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "unknown group")))


def bytes_per_row(node: Node) -> float:
    """Mean size in memory of one row of a CSR or dense node, as read."""
    if not is_group(node):
        return float(node.shape[1] * node.dtype.itemsize)
    entries = node["data"].shape[0] / max(node["indptr"].shape[0] - 1, 1)
    return float(entries * (node["data"].dtype.itemsize + np.dtype(np.int32).itemsize))


def node_reader(node: Node, num_genes: int) -> Reader:
    """A reader of ranges of rows (start, stop) of a CSR or dense node: CSR in canonical form, or dense."""
    if not is_group(node):
        _check_chunks(node, "; zarr leaves out chunks of zeros too: if they were, store the matrix as CSR")
        return lambda start, stop: node[start:stop]
    data, indices, pointers = node["data"], node["indices"], node["indptr"]
    for array in (data, indices):  # nobody stores a chunk of zeros in a sparse matrix
        _check_chunks(array)

    def read(start: int, stop: int) -> sp.csr_array:
        indptr = pointers[start : stop + 1].astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        return canonical(data[first:last], indices[first:last], indptr - first, num_genes)

    return read


def _check_chunks(array: Node, remark: str = "") -> None:
    """Raises: OSError if chunks of a zarr array are not there, which zarr would read as zeros."""
    if not hasattr(array, "nchunks_initialized"):
        return
    # Of a shard that is there all chunks count, those beyond the end of the array too.
    stored = array.shards or array.chunks
    in_shard = int(np.prod([shard // chunk for shard, chunk in zip(stored, array.chunks, strict=True)]))
    total = in_shard * int(np.prod([-(-n // shard) for n, shard in zip(array.shape, stored, strict=True)]))
    if absent := total - array.nchunks_initialized:
        raise OSError(f"{absent} of the {total} chunks of {array.name} are not there{remark}")


def canonical(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_genes: int) -> sp.csr_array:
    """A CSR matrix with sorted, unique 32-bit indices. Raises: OSError if they point outside of it."""
    if np.any(np.diff(indptr) < 0) or len(indices) != indptr[-1] or len(data) != indptr[-1]:
        raise OSError("the sparse matrix is damaged: its row pointers do not fit its entries")
    if len(indices) and not 0 <= indices.min() <= indices.max() < num_genes:
        raise OSError("the sparse matrix is damaged: its indices point outside of it")
    if data.dtype == np.float16:  # which scipy does not take
        data = data.astype(np.float32)
    if indptr[-1] <= np.iinfo(np.int32).max:  # with one of both in 64 bits, scipy makes it both
        indices, indptr = indices.astype(np.int32, copy=False), indptr.astype(np.int32)
    rows = sp.csr_array((data, indices, indptr), shape=(len(indptr) - 1, num_genes))
    rows.sum_duplicates()  # a repeated index means a sum, which log1p must see
    return rows
