"""Rows of a cells x genes matrix, read in blocks from h5ad and zarr files or AnnData, never the whole of a file.

A `CellMatrix` is one or several parts stacked by rows, each with its own gene order. Compressed sparse rows are
read straight from `indptr`, `data` and `indices` (contiguous ranges), dense matrices by slices of rows.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import scipy.sparse as sp

from hilbertcell.data.stores import (
    UNREADABLE,
    Node,
    Reader,
    Rows,
    bytes_per_row,
    canonical,
    is_node,
    node_reader,
    open_store,
)
from hilbertcell.data.validation import DataError

# read_cells joins wanted rows that are closer than this into one read: decompressing some rows more is
# cheaper than one more call into HDF5 (about 0.1 ms each).
_JOIN_GAP = 32
_MAX_READ = 8192  # rows of one read in read_cells: bounds the memory


@dataclass(frozen=True, eq=False)
class FilePart:
    """A matrix of (num_cells, num_genes) at `node` of a file, opened for each pass and closed after it.

    `row_bytes` is the mean size of a row in memory, as read.
    """

    path: Path
    node: str
    num_cells: int
    num_genes: int
    is_sparse: bool
    row_bytes: float

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of row ranges. Raises: DataError if the file cannot be read any more."""
        try:
            with open_store(self.path) as store:
                yield node_reader(store[self.node], self.num_genes)
        except DataError:
            raise
        except UNREADABLE as error:
            raise DataError(
                f"cannot read {self.node!r} of {self.path}: {error}; write or copy the file again"
            ) from None


@dataclass(frozen=True, eq=False)
class MemoryPart:
    """A matrix of (num_cells, num_genes) that is in memory, or a node of an h5ad file somebody else holds open."""

    matrix: Rows | Node
    num_cells: int
    num_genes: int
    is_sparse: bool

    @property
    def row_bytes(self) -> float:
        """Mean size of a row in memory."""
        if is_node(self.matrix):
            return bytes_per_row(self.matrix)
        entries = self.matrix.nnz / self.num_cells if self.is_sparse else self.num_genes
        return float(entries * (self.matrix.dtype.itemsize + 4 * self.is_sparse))

    @contextmanager
    def open(self) -> Iterator[Reader]:
        """A reader of row ranges."""
        if is_node(self.matrix):
            yield node_reader(self.matrix, self.num_genes)
        elif self.is_sparse:
            m = self.matrix
            yield lambda a, b: canonical(
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

    def partition(self, size: int | None, num_bytes: float) -> list[tuple[int, int]]:
        """All rows as consecutive ranges (start, stop), none across two parts.

        Args:
            size: rows of a range; if None, as many as make about `num_bytes` in memory.
            num_bytes: see `size`.

        """
        ranges, offset = [], 0
        for part in self.parts:
            step = size or max(1, int(num_bytes / max(part.row_bytes, 1.0)))
            step = -(-part.num_cells // -(-part.num_cells // step))  # equal ranges, no short one at the end
            stop = offset + part.num_cells
            ranges += [(start, min(start + step, stop)) for start in range(offset, stop, step)]
            offset = stop
        return ranges

    def read_range(self, start: int, stop: int) -> Rows:
        """Rows start <= i < stop, all of one part: (stop - start, G) CSR or dense. Raises: DataError."""
        offset = 0
        for part, columns in zip(self.parts, self.columns, strict=True):
            if start < offset + part.num_cells:
                with part.open() as read:
                    return self._in_order(read(start - offset, stop - offset), columns)
            offset += part.num_cells
        raise IndexError(f"rows must lie in [0, {self.num_cells}), got {start} to {stop}")

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
