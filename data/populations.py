"""Populations: the cells of one (context, perturbation, dose, batch), as labels plus chunked access to the cells.

Made by `hilbertcell.data.anndata_io.read_populations`, which checks everything; nothing here reads labels from
a file again. Rows of the matrix are read when asked for, in blocks.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pandas as pd
import scipy.sparse as sp

from hilbertcell.data.matrices import CellMatrix
from hilbertcell.data.progress import track_cells
from hilbertcell.data.stores import Rows
from hilbertcell.data.validation import DataError, listing, missing_and_extra

COUNTS_PER = 1e4  # library size that natural-scale counts are brought to


@dataclass(frozen=True)
class Keys:
    """Which obs columns (and layer) of a file mean what, and the scale of its matrix.

    `control` is the label in column `perturbation` of unperturbed cells; `context` may be several columns, whose
    labels are joined with ' | '; `scale` is "counts" (raw), "log1p" (of normalised counts) or "other".
    """

    perturbation: str
    control: str
    context: tuple[str, ...]
    batch: str
    dose: str | None = None
    library_size: str | None = None
    layer: str | None = None
    scale: str = "counts"

    def to_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return asdict(self) | {"context": list(self.context)}

    @classmethod
    def from_dict(cls, values: dict) -> "Keys":
        """The inverse of `to_dict`."""
        return cls(**(values | {"context": tuple(values["context"])}))


def natural_rows(rows: Rows, scale: str, library_size: np.ndarray | None) -> Rows:
    """Cells on the scale that models use, float64 (m, G), CSR or dense as they were given.

    Counts become log1p(1e4 count / library size), with zeros for a cell without counts; "log1p" and "other"
    stay as they are. `library_size` (m,) is needed for counts only.
    """
    sparse = sp.issparse(rows)
    if scale != "counts":
        return rows.astype(np.float64) if sparse else np.asarray(rows, dtype=np.float64)
    if library_size is None:
        raise ValueError("library_size = None: counts need one library size per cell; pass (m,) total counts")
    factor = np.divide(COUNTS_PER, library_size, out=np.zeros(len(library_size)), where=library_size > 0)
    if not sparse:
        return np.log1p(rows * factor[:, None])
    scaled = rows.data * np.repeat(factor, np.diff(rows.indptr))
    return sp.csr_array((np.log1p(scaled, out=scaled), rows.indices, rows.indptr), shape=rows.shape)


def natural_scale(rows: Rows, scale: str, library_size: np.ndarray | None) -> np.ndarray:
    """As `natural_rows`, but dense whatever the rows are."""
    natural = natural_rows(rows, scale, library_size)
    return natural.toarray() if sp.issparse(natural) else natural


def hash_names(names: np.ndarray, seed: int) -> np.ndarray:
    """Keyed 64-bit hashes (N,) of names: an order of the cells that depends on name and seed only."""
    key = hashlib.blake2b(str(seed).encode(), digest_size=8).hexdigest()  # 16 characters, as SipHash wants
    return pd.util.hash_array(np.asarray(names, dtype=object), hash_key=key, categorize=False)


@dataclass(frozen=True, eq=False)
class Populations:
    """P populations of N cells with G genes.

    Attributes:
        keys: what the obs columns of the file mean, and the scale.
        genes: (G,) str, unique.
        labels: index = name of the population, f"{context} | {perturbation}[ @ {dose:g}] | {batch}"; columns
            context, perturbation (the control label for controls), dose (nan for controls or without a dose
            key), batch, num_cells, is_control. Sorted by context, batch, controls first, perturbation, dose,
            whatever the order of the rows in the file.
        cell_population: (N,) int64, the row of `labels` of each cell; -1 for a cell that is not selected.
        cell_names: (N,) str, unique.
        library_size: (N,) float64 counts per cell for scale "counts" (row sums or the library_size column).
        perturbation_features: index = names of single perturbations, float64 columns; None if not given.
        warnings: what is legal but worth knowing, one sentence each.

    """

    keys: Keys
    genes: np.ndarray
    labels: pd.DataFrame
    cell_population: np.ndarray
    cell_names: np.ndarray
    library_size: np.ndarray | None
    perturbation_features: pd.DataFrame | None
    warnings: tuple[str, ...]
    matrix: CellMatrix = field(repr=False)
    cell_obs: pd.DataFrame = field(repr=False)

    @property
    def num_cells(self) -> int:
        """Cells of the selected populations."""
        return int(self.labels["num_cells"].sum())

    def raw_chunks(self, size: int = 4096, progress: bool = False) -> Iterator[tuple[np.ndarray, Rows]]:
        """Selected cells in file order, at most `size` at a time: (positions (m,) int64, rows (m, G)).

        Rows are CSR or dense as in the file, in the file's own scale. Raises: DataError if it cannot be read.
        """
        blocks = self.matrix.blocks(size, self.cell_population >= 0)
        return track_cells(blocks, self.num_cells, "reading cells", progress)

    def chunks(self, size: int = 4096, progress: bool = False) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """As `raw_chunks`, on the natural scale (see `natural_scale`): dense float64 (m, G)."""
        for positions, rows in self.raw_chunks(size, progress):
            yield positions, self._natural(positions, rows)

    def read_cells(self, positions: np.ndarray) -> Rows:
        """Rows (m, G) of the cells at `positions` (m,), in that order, in the file's own scale."""
        return self.matrix.read_cells(positions)

    def obs(self, positions: np.ndarray) -> pd.DataFrame:
        """The file's own obs (all its columns) of the cells at `positions` (m,)."""
        return self.cell_obs.iloc[positions]

    def cells_of(self, population: str) -> np.ndarray:
        """Positions (n,) int64 of the cells of one population, in file order. Raises: DataError if unknown."""
        if population not in self.labels.index:
            known = listing(self.labels.index)
            raise DataError(
                f"population = {population!r}: is not one of the {len(self.labels)} here; there are {known}"
            )
        return np.flatnonzero(self.cell_population == self.labels.index.get_loc(population))

    def select(self, mask: np.ndarray | Sequence[bool]) -> "Populations":
        """Only the populations where `mask` (P,) is true. Lazy: the same files, other cells get -1."""
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != (len(self.labels),):
            raise ValueError(
                f"mask must have one entry per population, ({len(self.labels)},), got {mask.shape}"
            )
        new_row = np.append(np.where(mask, np.cumsum(mask) - 1, -1), -1)  # the last entry keeps -1 at -1
        return replace(self, labels=self.labels[mask].copy(), cell_population=new_row[self.cell_population])

    def keep_cells(self, population: str, num_cells: int, seed: int = 0) -> "Populations":
        """Only `num_cells` cells of one population, by smallest hash of (cell name, seed); the others whole.

        Raises: DataError if the population is unknown or has fewer cells.
        """
        cells = self.cells_of(population)
        if not 1 <= num_cells <= len(cells):
            what = f"asked for {num_cells} cells of population {population!r}, which has {len(cells)}"
            raise DataError(f"num_cells = {num_cells}: {what}; ask for 1 to {len(cells)}")
        order = np.argsort(hash_names(self.cell_names[cells], seed), kind="stable")
        cell_population, labels = self.cell_population.copy(), self.labels.copy()
        cell_population[cells[order[num_cells:]]] = -1
        labels.loc[population, "num_cells"] = num_cells
        return replace(self, labels=labels, cell_population=cell_population)

    def match_genes(self, genes: np.ndarray | Sequence[str]) -> "Populations":
        """The same cells with the genes in the given order.

        Raises: DataError that names missing and extra genes unless both are equal as sets.
        """
        genes = np.asarray(genes, dtype=str)
        if np.array_equal(genes, self.genes):
            return self
        differ = missing_and_extra(self.genes.tolist(), genes.tolist())
        if differ["missing"] or differ["extra"]:
            raise DataError(
                f"genes = {len(self.genes)} in the file, {len(genes)} in the fit: missing {listing(differ['missing'])},"
                f" extra {listing(differ['extra'])}; subset the file to the genes of the fit, or fit on these genes"
            )
        order = pd.Index(self.genes).get_indexer(genes)
        return replace(self, genes=genes, matrix=self.matrix.reorder(order))

    def pilot(self, max_cells: int = 20_000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """A sample of the selected cells: X (m, G) natural scale, row of `labels` of each cell (m,).

        The cells with the smallest hash of (cell name, seed), in the order of the hashes: the same X whatever
        the order of the rows in the file.
        """
        cells = np.flatnonzero(self.cell_population >= 0)
        hashes = hash_names(self.cell_names[cells], seed)
        chosen = cells[np.argsort(hashes, kind="stable")[:max_cells]]
        return self._natural(chosen, self.read_cells(chosen)), self.cell_population[chosen]

    def _natural(self, positions: np.ndarray, rows: Rows) -> np.ndarray:
        library = None if self.library_size is None else self.library_size[positions]
        return natural_scale(rows, self.keys.scale, library)
