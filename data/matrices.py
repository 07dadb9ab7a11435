"""Rows of a cells x genes matrix, read in blocks from h5ad files or AnnData, never the whole of a file.

A `CellMatrix` is one or several parts stacked by rows, each with its own gene order. Compressed sparse rows are
read straight from `indptr`, `data` and `indices` (contiguous ranges), dense matrices by slices of rows.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import scipy.sparse as sp

from hilbertcell.data.validation import DataError

type Rows = Any  # (m, G) CSR or dense array: scipy has no types to say it with
type Reader = Callable[[int, int], Rows]

# read_cells joins wanted rows that are closer than this into one read: decompressing some rows more is
# cheaper than one more call into HDF5 (about 0.1 ms each).
_JOIN_GAP = 32
_MAX_READ = 8192  # rows of one read in read_cells: bounds the memory


def h5_format(node: h5py.Group | h5py.Dataset) -> str:
    """How an h5ad node stores its matrix: 'array', 'csr_matrix', 'csc_matrix' or what else it says."""
    if isinstance(node, h5py.Dataset):
        return "array"
    return str(node.attrs.get("encoding-type", node.attrs.get("h5sparse_format", "unknown group")))


def _canonical(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_genes: int) -> sp.csr_array:
    if np.any(np.diff(indptr) < 0) or (len(indices) and not 0 <= indices.min() <= indices.max() < num_genes):
        raise OSError("the sparse matrix is damaged: its indices point outside of it")
    if data.dtype == np.float16:  # which scipy does not take
        data = data.astype(np.float32)
    rows = sp.csr_array((data, indices, indptr), shape=(len(indptr) - 1, num_genes))
    rows.sum_duplicates()  # a repeated index means a sum, which log1p must see
    return rows


def _h5_reader(node: h5py.Group | h5py.Dataset, num_genes: int) -> Reader:
    if isinstance(node, h5py.Dataset):
        return lambda start, stop: node[start:stop]
    data, indices, pointers = node["data"], node["indices"], node["indptr"]

    def read(start: int, stop: int) -> sp.csr_array:
        indptr = pointers[start : stop + 1].astype(np.int64)
        first, last = int(indptr[0]), int(indptr[-1])
        return _canonical(data[first:last], indices[first:last], indptr - first, num_genes)

    return read


@dataclass(frozen=True, eq=False)
class FilePart:
    """A matrix of (num_cells, num_genes) at `node` of an h5ad file, opened for each pass and closed after it."""

    path: Path
    node: str
    num_cells: int
    num_genes: int
    is_sparse: bool

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of row ranges. Raises: DataError if the file cannot be read any more."""
        try:
            with h5py.File(self.path, "r") as file:
                yield _h5_reader(file[self.node], self.num_genes)
        except (OSError, KeyError, RuntimeError) as error:
            raise DataError(
                f"cannot read {self.node!r} of {self.path}: {error}; write or copy the file again"
            ) from None


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """A matrix of (num_cells, num_genes) that is in memory, or a node of an h5ad file somebody else holds open."""

    matrix: Rows | h5py.Group | h5py.Dataset
    num_cells: int
    num_genes: int
    is_sparse: bool

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of row ranges."""
        if isinstance(self.matrix, h5py.Group | h5py.Dataset):
            yield _h5_reader(self.matrix, self.num_genes)
        elif self.is_sparse:
            m = self.matrix
            yield lambda a, b: _canonical(
                m.data[m.indptr[a] : m.indptr[b]].copy(),
                m.indices[m.indptr[a] : m.indptr[b]].copy(),
                m.indptr[a : b + 1] - m.indptr[a],
                self.num_genes,
            )
        else:
            yield lambda start, stop: self.matrix[start:stop]


@dataclass(frozen=True, eq=False)
class CellMatrix:
    """Parts stacked by rows: N cells x G genes in the file's own scale.

    `columns[i]` (G,) says where the genes stand in part i (None: in its own order).
    """

    parts: tuple[FilePart | MemoryPart, ...]
    columns: tuple[np.ndarray | None, ...]

    @property
    def num_cells(self) -> int:
        """N, the cells of all parts."""
        return sum(part.num_cells for part in self.parts)

    @property
    def num_genes(self) -> int:
        """G."""
        return self.parts[0].num_genes

    @property
    def is_sparse(self) -> bool:
        """Whether blocks come as CSR (all parts sparse) or as dense arrays."""
        return all(part.is_sparse for part in self.parts)

    def reorder(self, order: np.ndarray) -> "CellMatrix":
        """The same cells with gene order[i] in column i; nothing is read."""
        return replace(self, columns=tuple(order if c is None else c[order] for c in self.columns))

    def _in_order(self, rows: Rows, columns: np.ndarray | None) -> Rows:
        if columns is not None:
            rows = rows[:, columns]
        return rows if self.is_sparse or not sp.issparse(rows) else rows.toarray()

    def blocks(self, size: int, wanted: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, Rows]]:
        """Blocks of at most `size` rows in file order: (positions (m,) int64, rows (m, G)), unwanted rows left out.

        Args:
            size: rows per read; bounds the memory.
            wanted: (N,) bool, the rows to return; all if None. Blocks without wanted rows are not read.

        """
        offset = 0
        for part, columns in zip(self.parts, self.columns, strict=True):
            with part.open() as read:
                for start in range(0, part.num_cells, size):
                    stop = min(start + size, part.num_cells)
                    keep = None if wanted is None else np.flatnonzero(wanted[offset + start : offset + stop])
                    if keep is None or len(keep) == stop - start:
                        yield (
                            np.arange(offset + start, offset + stop),
                            self._in_order(read(start, stop), columns),
                        )
                    elif len(keep):
                        rows = read(start + int(keep[0]), start + int(keep[-1]) + 1)[keep - keep[0]]
                        yield offset + start + keep, self._in_order(rows, columns)
            offset += part.num_cells

    def read_cells(self, positions: np.ndarray) -> Rows:
        """The rows at `positions` (m,), in that order, repeats allowed: (m, G) CSR or dense."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < self.num_cells:
            raise IndexError(
                f"cell positions must lie in [0, {self.num_cells}), got {positions.min()} to {positions.max()}"
            )
        unique, inverse = np.unique(positions, return_inverse=True)
        pieces: list[Rows] = []
        offset = 0
        for part, columns in zip(self.parts, self.columns, strict=True):
            here = unique[(unique >= offset) & (unique < offset + part.num_cells)] - offset
            with part.open() as read:
                for run in _runs(here):
                    rows = read(int(run[0]), int(run[-1]) + 1)[run - run[0]]
                    pieces.append(self._in_order(rows, columns))
            offset += part.num_cells
        if not pieces:
            return sp.csr_array((0, self.num_genes)) if self.is_sparse else np.empty((0, self.num_genes))
        stacked = sp.vstack(pieces, format="csr") if self.is_sparse else np.concatenate(pieces)
        return stacked[inverse]


def _runs(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Sorted rows cut where the gap is wide or a read would become long."""
    start = 0
    for i in range(1, len(rows) + 1):
        if i == len(rows) or rows[i] - rows[i - 1] > _JOIN_GAP or rows[i] - rows[start] >= _MAX_READ:
            yield rows[start:i]
            start = i
