"""One pass over the matrix at the door: is every entry fit for the scale, and which scale is it?

The pass also collects what later steps need and no label can tell: row sums (library sizes) and a hash of
every row (equal rows).
"""

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp

from hilbertcell.data.matrices import CellMatrix
from hilbertcell.data.progress import track_cells
from hilbertcell.data.stores import Rows
from hilbertcell.data.validation import Problems
from hilbertcell.data.workers import ahead

SCALES = ("counts", "log1p", "other")

# log1p of anything below a million is below 14: non-integers that stay under it look like logged data.
_LOGGED_AT_MOST = 14.0


@dataclass
class Entry:
    """One entry of the matrix: its cell, its gene, its value, and how many like it there are."""

    cell: int
    gene: int
    value: float
    count: int = 1


@dataclass
class Scan:
    """What one pass over N cells found. Entries are the first of their kind, None if there is none."""

    row_sums: np.ndarray  # (N,) float64
    row_hashes: np.ndarray  # (N,) uint64, equal for equal rows
    not_finite: Entry | None = None
    negative: Entry | None = None
    fractional: Entry | None = None
    minimum: float = np.inf
    maximum: float = -np.inf

    def equal_rows(self) -> int:
        """How many cells have the same non-zero row as another cell before them."""
        filled = self.row_hashes[self.row_hashes != 0]
        return len(filled) - len(np.unique(filled))

    def empty_rows(self) -> int:
        """How many cells have only zeros."""
        return int(np.sum(self.row_hashes == 0))


def _row_hashes(rows: Rows, salt: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each row that ignores zeros and how they are stored: sum over genes of mix(value) salt."""
    sparse = sp.issparse(rows)
    values = rows.data if sparse else rows
    bits = (values.astype(np.float64) + 0.0).view(np.uint64)  # + 0.0: -0.0 becomes 0.0
    bits ^= bits >> np.uint64(32)  # small integers have their bits on top, where products mod 2^64 lose them
    if not sparse:
        return (bits * salt).sum(axis=1, dtype=np.uint64)
    total = np.concatenate([np.zeros(1, np.uint64), np.cumsum(bits * salt[rows.indices], dtype=np.uint64)])
    return total[rows.indptr[1:]] - total[rows.indptr[:-1]]  # differences wrap around exactly


def _locate(rows: Rows, bad: np.ndarray) -> tuple[int, int, int]:
    """Row, gene and number of the entries marked in `bad` (over rows.data, or over the dense rows)."""
    first = int(np.argmax(bad))
    if sp.issparse(rows):
        row, gene = np.searchsorted(rows.indptr, first, side="right") - 1, rows.indices[first]
    else:
        row, gene = np.unravel_index(first, rows.shape)
    return int(row), int(gene), int(bad.sum())


def scan_matrix(matrix: CellMatrix, chunk_size: int = 4096, progress: bool = False) -> Scan:
    """Read every entry once. Raises: DataError if a file cannot be read to its end."""
    salt = np.random.default_rng(20).integers(0, 2**63, matrix.num_genes, dtype=np.uint64) * np.uint64(
        2
    ) + np.uint64(1)
    scan = Scan(np.zeros(matrix.num_cells), np.zeros(matrix.num_cells, np.uint64))
    blocks = ahead(matrix.blocks(chunk_size))
    for positions, rows in track_cells(blocks, matrix.num_cells, "checking cells", progress):
        values = rows.data if sp.issparse(rows) else np.asarray(rows)
        scan.row_hashes[positions] = _row_hashes(rows, salt)
        with np.errstate(invalid="ignore"):  # inf - inf; reported below
            scan.row_sums[positions] = rows.sum(axis=1, dtype=np.float64)
        if values.size == 0:
            continue
        finite = np.isfinite(values)
        if not finite.all():
            scan.not_finite = _first(scan.not_finite, rows, positions, ~finite)
            values = np.where(finite, values, 0)
        low, high = float(values.min()), float(values.max())
        if values.size < rows.shape[0] * rows.shape[1]:  # the zeros that CSR does not store
            low, high = min(low, 0.0), max(high, 0.0)
        scan.minimum, scan.maximum = min(scan.minimum, low), max(scan.maximum, high)
        if low < 0:
            scan.negative = _first(scan.negative, rows, positions, values < 0)
        if values.dtype.kind == "f":
            fractional = values != np.rint(values)
            if fractional.any():
                scan.fractional = _first(scan.fractional, rows, positions, fractional)
    return scan


def _first(found: Entry | None, rows: Rows, positions: np.ndarray, bad: np.ndarray) -> Entry:
    row, gene, count = _locate(rows, bad)
    if found is not None:
        found.count += count
        return found
    value = rows.data[np.argmax(bad)] if sp.issparse(rows) else rows[row, gene]
    return Entry(int(positions[row]), gene, float(value), count)


def check_scale(
    problems: Problems, key: str, declared: str | None, scan: Scan, cell_names: np.ndarray, genes: np.ndarray
) -> str | None:
    """The scale of the matrix ("counts", "log1p", "other"), or None with the reason noted in `problems`.

    Args:
        problems: where to note what is wrong.
        key: how the matrix is called in messages: "X" or "layer".
        declared: the scale the user declared, None if they did not.
        scan: what the pass over the matrix found.
        cell_names: (N,).
        genes: (G,).

    Undeclared data are counts if every entry is a whole number and none is negative; anything else must be
    declared, because log1p, arcsinh and z-scores cannot be told apart from their values alone.

    """

    def note(entry: Entry, what: str, cure: str) -> None:
        where = f"cell {str(cell_names[entry.cell])!r}, gene {str(genes[entry.gene])!r}"
        problems.add(key, entry.value, f"{what} ({entry.count} of them, the first in {where})", cure)

    before = len(problems.lines)
    if declared is not None and declared not in SCALES:
        problems.add("scale", declared, "is not a scale", f"choose one of {', '.join(map(repr, SCALES))}")
        declared = None
    if scan.not_finite:
        note(scan.not_finite, "entries must be finite", "remove these cells or genes, or fill the entries in")
    whole, negative, fractional = scan.fractional is None, scan.negative, scan.fractional
    if negative and whole:
        note(
            negative,
            "whole numbers with a negative entry are neither counts nor a measured scale",
            "repair the counts",
        )
    elif negative and declared in ("counts", "log1p"):
        note(
            negative,
            f"{declared} cannot be negative",
            "pass scale='other' for arcsinh values, z-scores and the like",
        )
    if declared == "counts" and fractional:
        if not negative and scan.maximum <= _LOGGED_AT_MOST:
            what = f"declared counts, but the values are fractions of at most {scan.maximum:.3g}: logged data"
            note(fractional, what, "pass scale='log1p', or layer= with the raw counts")
        else:
            note(
                fractional,
                "counts must be whole numbers",
                "pass layer= with the raw counts, or the scale they have",
            )
    if declared == "log1p" and whole and scan.maximum > 0 and not negative:
        problems.add("scale", declared, "every entry is a whole number, as counts are", "pass scale='counts'")
    if declared is None and len(problems.lines) == before and not whole:
        what = f"{key} holds values from {scan.minimum:.3g} to {scan.maximum:.3g} that are not whole numbers"
        cure = "pass scale='log1p' (log1p of normalised counts), scale='other' (any other), or layer= with raw counts"
        problems.add("scale", None, what + ", and their scale is not declared", cure)
    return (declared or "counts") if len(problems.lines) == before else None
