"""Counts as sets of marked molecules: one monotone path of cells through all gains of a gene.

Every molecule of cell i and gene g carries a mark, the gain from which on it is there. The molecules that the cell has
carry uniform marks in (0, 1); further ones arrive beyond 1 at a *drawn* rate. The counts at gain f are the molecules
with marks below f, so that

- f < 1 is binomial thinning of the observed counts, and f = 1 the counts themselves;
- f > 1 is superposition, y + Poisson((f - 1) lambda), lambda_i drawn from its posterior;

and a count never falls when its gain rises: a gain can be solved for with all other randomness fixed.

Up to MAX_FOLD, molecules arrive at the cell's own rate, lambda_ig | y_ig ~ Gamma(r_g + y_ig, r_g / mu_ig + 1), where mu_ig
is the expected count of its state. Beyond MAX_FOLD what a control cell happened to have of the gene says nothing any
more (few stray molecules would carry a whole induced gene) and they arrive at the rate mu_ig of the cell's state, times
an amplitude of the cell that all its genes share (how far it responds) and a fresh gamma factor: the additive floor of
genes near 0 in controls.

No gamma variable is ever stored: a gamma-Poisson count is a Poisson number of clusters of logarithmic size (Quenouille
1949, Biometrics 5:162). Clusters are proposed from rates that factorise over cells and genes, and accepted by the ratio
of their rate to that one, so that work is spent on molecules, not on cells x genes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse

MAX_FOLD = 3.0
# Gamma shape of a gene beyond MAX_FOLD, beside the amplitudes: induced genes of Kang (2018) have 2 to 20 in all.
FLOOR_SHAPE = np.float32(10.0)


@dataclass(frozen=True, eq=False)
class CellRates:
    """Drawn rates of n cells: mu = weights @ programs with weights (n, K), programs (K, G), float32.

    `shape` (G,) gamma shapes r, `amplitude` (n,) of the cells' response beyond MAX_FOLD, mean 1, both float32.
    """

    weights: np.ndarray
    programs: np.ndarray
    shape: np.ndarray
    amplitude: np.ndarray

    def select(self, cells: np.ndarray) -> "CellRates":
        """The rates of some cells."""
        return CellRates(self.weights[cells], self.programs, self.shape, self.amplitude[cells])

    def mean(self, cells: np.ndarray, genes: np.ndarray) -> np.ndarray:
        """Expected counts mu (m,) of pairs of a cell and a gene."""
        return np.einsum("mk,mk->m", self.weights[cells], self._profiles[genes])

    def highest(self, genes: np.ndarray) -> np.ndarray:
        """A bound of mu over cells, by gene."""
        return self._profiles[genes] @ self.weights.max(0)

    def points(
        self, factor: np.ndarray, genes: np.ndarray, rng: np.random.Generator, *, amplified: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """Poisson points with rates factor (B,) x mu, or x mu x amplitude: positions in `genes`, and cells."""
        lots = self._amplified_lots if amplified else self._lots
        number = rng.poisson(factor[:, None] * self._profiles[genes] * np.array([lot.total for lot in lots]))
        rows = [np.repeat(np.arange(len(genes)), number[:, k]) for k in range(len(lots))]
        cells = [lot.draw(len(row), rng) for lot, row in zip(lots, rows, strict=True)]
        return np.concatenate(rows), np.concatenate(cells)

    @cached_property
    def _profiles(self) -> np.ndarray:
        return np.ascontiguousarray(self.programs.T)

    @cached_property
    def _lots(self) -> list["_Lots"]:
        return [_Lots.of(weight) for weight in self.weights.T]

    @cached_property
    def _amplified_lots(self) -> list["_Lots"]:
        return [_Lots.of(weight) for weight in self.weights.T * self.amplitude]


@dataclass(frozen=True, eq=False)
class _Lots:
    """To draw cells with chances in proportion to weights: partial sums up to 1, and the first cell of equal steps of them."""

    total: float
    sums: np.ndarray
    guide: np.ndarray

    @classmethod
    def of(cls, weight: np.ndarray) -> "_Lots":
        sums = np.cumsum(weight, dtype=np.float64)
        total = float(sums[-1])
        sums = sums / total if total > 0 else np.arange(1, len(sums) + 1) / len(sums)
        steps = 1 << (2 * len(sums)).bit_length()
        return cls(total, sums, np.searchsorted(sums, np.arange(steps) / steps, side="right"))

    def draw(self, number: int, rng: np.random.Generator) -> np.ndarray:
        level = rng.random(number)
        cell = self.guide[(level * len(self.guide)).astype(np.int64)]
        late = np.flatnonzero(self.sums[cell] <= level)
        cell[late] = np.searchsorted(self.sums, level[late], side="right")
        return cell


@dataclass(frozen=True, eq=False)
class MarkedCounts:
    """The counts of the genes `genes` (B,) over a range of gains, as entries sorted by gene and cell.

    Entry e belongs to cell[e] and holds base[e] molecules throughout the range; molecule m, of entry[m] and of the gene
    at position mark_gene[m], is there when the gain is above marks[m]. `gene_start` (B + 1,) delimits each gene's entries.
    """

    num_cells: int
    genes: np.ndarray
    gene_start: np.ndarray
    cell: np.ndarray
    base: np.ndarray
    entry: np.ndarray
    marks: np.ndarray
    mark_gene: np.ndarray

    def counts(self, gain: np.ndarray) -> np.ndarray:
        """Counts of the entries at the gains (B,)."""
        return self.base + np.bincount(self.entry[self._there(gain)], minlength=len(self.base))

    def cell_sums(self, gain: np.ndarray) -> np.ndarray:
        """Sums (num_cells,) of the counts at the gains (B,)."""
        return self._base_sums + np.bincount(self._mark_cell[self._there(gain)], minlength=self.num_cells)

    def gene_sums(self, values: np.ndarray) -> np.ndarray:
        """Sums (B,) over each gene's entries of values (E,)."""
        return sums_between(self.gene_start, values)

    def select(self, chosen: np.ndarray) -> "MarkedCounts":
        """The counts of the genes with chosen (B,) True."""
        return self._keep(chosen, np.repeat(chosen, np.diff(self.gene_start)))

    def changing(self, chosen: np.ndarray) -> "MarkedCounts":
        """The entries with molecules that come or go within the range, of the genes with chosen (B,) True."""
        entries = np.zeros(len(self.base), dtype=bool)
        entries[self.entry[chosen[self.mark_gene]]] = True
        return self._keep(chosen, entries)

    def _keep(self, chosen: np.ndarray, entries: np.ndarray) -> "MarkedCounts":
        molecules = chosen[self.mark_gene]
        before = np.concatenate([[0], np.cumsum(entries)])
        return MarkedCounts(
            num_cells=self.num_cells,
            genes=self.genes[chosen],
            gene_start=_delimit(np.diff(before[self.gene_start])[chosen]),
            cell=self.cell[entries],
            base=self.base[entries],
            entry=before[self.entry[molecules]],
            marks=self.marks[molecules],
            mark_gene=(np.cumsum(chosen) - 1)[self.mark_gene[molecules]],
        )

    def _there(self, gain: np.ndarray) -> np.ndarray:
        return self.marks < gain.astype(np.float32)[self.mark_gene]

    @cached_property
    def _base_sums(self) -> np.ndarray:
        return np.bincount(self.cell, self.base, self.num_cells)

    @cached_property
    def _mark_cell(self) -> np.ndarray:
        return self.cell[self.entry]


def sums_between(start: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums (B,) of values[start[b] : start[b + 1]], float64."""
    held = np.diff(start) > 0
    sums = np.zeros(len(held))
    if held.any():  # an empty slice would return the next one's first value
        sums[held] = np.add.reduceat(values, start[:-1][held], dtype=np.float64)
    return sums


def reveal_marks(
    counts: sparse.csc_array,
    genes: np.ndarray,
    rates: CellRates,
    lower: np.ndarray,
    upper: np.ndarray,
    rng: np.random.Generator,
) -> MarkedCounts:
    """Draw the marks of the molecules that matter for gains between `lower` and `upper`.

    Args:
        counts: (n, G) integer valued, with sorted indices.
        genes: (B,) columns to reveal.
        rates: those of the n cells.
        lower, upper: (G,) range of the gains.
        rng: source of all randomness.
    """
    num_cells = counts.shape[0]
    start, cell, count = _columns(counts, genes)
    gene = np.repeat(np.arange(len(genes)), np.diff(start))
    low, high = lower[genes].astype(np.float32), upper[genes].astype(np.float32)

    thinned = np.flatnonzero((low < 1)[gene])
    owner = np.repeat(thinned, count[thinned])  # of each molecule
    mark, owner_gene = rng.random(len(owner), dtype=np.float32), gene[owner]
    gone = np.flatnonzero(mark >= low[owner_gene])
    base = count - np.bincount(owner[gone], minlength=len(count))
    gone = gone[mark[gone] < high[owner_gene[gone]]]
    owner, mark = owner[gone], mark[gone]

    rising = np.flatnonzero(high > 1)
    found = list(_arrivals(start, cell, count, rising, genes, rates, high, rng))
    row, new_cell = (np.concatenate(x) for x in list(zip(*found, strict=True))[:2])
    new_mark = np.concatenate([marks for *_, marks in found])
    new_key = row * num_cells + new_cell
    order = np.argsort(new_key)
    row, new_cell, new_key, new_mark = (x[order] for x in (row, new_cell, new_key, new_mark))

    # entries that only new molecules have are put between those of the counts
    key = gene * num_cells + cell
    place = np.searchsorted(key, new_key)
    absent = np.append(key, -1)[place] != new_key
    first = absent.copy()
    first[1:] &= new_key[1:] != new_key[:-1]
    new_entry = place + np.cumsum(first) - absent
    ahead = np.cumsum(np.bincount(place[first], minlength=len(key) + 1))[:-1]
    base = np.insert(base, place[first], 0)
    always = new_mark < low[row]
    base += np.bincount(new_entry[always], minlength=len(base))
    return MarkedCounts(
        num_cells=num_cells,
        genes=genes,
        gene_start=start + _delimit(np.bincount(row[first], minlength=len(genes))),
        cell=np.insert(cell, place[first], new_cell[first]),
        base=base,
        entry=np.concatenate([owner + ahead[owner], new_entry[~always]]),
        marks=np.concatenate([mark, new_mark[~always]]),
        mark_gene=np.concatenate([gene[owner], row[~always]]),
    )


def _columns(counts: sparse.csc_array, genes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Limits of the columns `genes` (B + 1,), cells and counts of their entries; neighbours are not copied."""
    if len(genes) and genes[-1] - genes[0] == len(genes) - 1:
        start = counts.indptr[genes[0] : genes[-1] + 2].astype(np.int64)
        here = slice(start[0], start[-1])
        return start - start[0], counts.indices[here], counts.data[here].astype(np.int64)
    held = counts[:, genes]
    return held.indptr.astype(np.int64), held.indices, held.data.astype(np.int64)


def _arrivals(
    start: np.ndarray,
    cell: np.ndarray,
    count: np.ndarray,
    rising: np.ndarray,
    genes: np.ndarray,
    rates: CellRates,
    upper: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Positions in `genes`, cells and marks of the new molecules of the genes at `rising`, up to the gains `upper`.

    Given y the own rate is Gamma(r + y), and counts with it are a sum of those of Gamma(r), the same for all cells but
    for mu, and of Gamma(1) for each observed molecule.
    """
    columns, own = genes[rising], np.minimum(upper[rising], MAX_FOLD) - 1
    shape = rates.shape[columns]
    row, where = rates.points(own, columns, rng)  # more than clusters: r log(1 + odds) < (f - 1) mu
    mean = rates.mean(where, columns[row])
    odds = own[row] * mean / (mean + shape[row])
    kept = rng.random(len(row), dtype=np.float32) * own[row] * mean < shape[row] * np.log1p(odds)
    yield _molecules(rising, row[kept], where[kept], odds[kept], 1.0, own, rng)

    last = np.cumsum(count)  # molecules up to each entry
    bounds = np.append(0, last)[start]
    held, before = np.diff(bounds)[rising], bounds[:-1][rising]
    highest = rates.highest(columns)
    most = np.log1p(own * highest / (highest + shape))
    row = np.repeat(np.arange(len(rising)), rng.poisson(most * held))
    molecule = np.sort(
        before[row] + (rng.random(len(row)) * held[row]).astype(np.int64)
    )  # rows stay in order
    where = cell[np.searchsorted(last, molecule, side="right")]
    mean = rates.mean(where, columns[row])
    odds = own[row] * mean / (mean + shape[row])
    kept = rng.random(len(row), dtype=np.float32) * most[row] < np.log1p(odds)
    yield _molecules(rising, row[kept], where[kept], odds[kept], 1.0, own, rng)

    rising = rising[upper[rising] > MAX_FOLD]
    if not len(rising):
        return
    columns, beyond = genes[rising], upper[rising] - np.float32(MAX_FOLD)
    row, where = rates.points(beyond, columns, rng, amplified=True)
    odds = beyond[row] * rates.mean(where, columns[row]) * rates.amplitude[where] / FLOOR_SHAPE
    kept = rng.random(len(row), dtype=np.float32) * odds < np.log1p(odds)
    yield _molecules(rising, row[kept], where[kept], odds[kept], MAX_FOLD, beyond, rng)


def _molecules(
    rising: np.ndarray,
    row: np.ndarray,
    cell: np.ndarray,
    odds: np.ndarray,
    first: float,
    width: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters as molecules: logarithmic numbers, p = odds / (1 + odds), with uniform marks in [first, first + width)."""
    odds = odds.astype(np.float64)
    size = rng.logseries(odds / (1 + odds))
    row, cell = np.repeat(row, size), np.repeat(cell, size)
    marks = np.float32(first) + rng.random(len(row), dtype=np.float32) * width[row].astype(np.float32)
    return rising[row], cell, marks


def _delimit(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
