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
1949, Biometrics 5:162), so that random numbers are spent on molecules added, not on cells x genes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from scipy import sparse

MAX_FOLD = 4.0
FLOOR_SHAPE = np.float32(4.0)  # induced genes of the data sets of this project have gamma shapes of 2 to 20
DENSE_BLOCK = 1 << 18  # rates of cells x genes held at once: 1 MB each in float32, near the processor
STRIDE = 16


@dataclass(frozen=True, eq=False)
class MarkedCounts:
    """The counts of the genes `genes` (B,) as entries, sorted by gene and cell, of molecules.

    Entry e belongs to cell[e], holds base[e] molecules that always stay and the marked ones marks[start[e]:start[e+1]].
    `gene_start` (B + 1,) delimits the entries of each gene, `mark_gene` (positions in `genes`) says whose a mark is.
    """

    genes: np.ndarray
    gene_start: np.ndarray
    cell: np.ndarray
    base: np.ndarray
    start: np.ndarray
    marks: np.ndarray
    mark_gene: np.ndarray

    def counts(self, gain: np.ndarray) -> np.ndarray:
        """Counts (int32) of the entries at the gains (B,)."""
        kept = np.zeros(len(self.marks) + 1, dtype=np.int32)
        np.cumsum(self.marks < gain.astype(np.float32)[self.mark_gene], dtype=np.int32, out=kept[1:])
        return self.base + np.diff(kept[self.start])

    def gene_sums(self, values: np.ndarray) -> np.ndarray:
        """Sums (B,) over each gene's entries of values (E,)."""
        held = np.diff(self.gene_start) > 0
        sums = np.zeros(len(self.genes))
        if held.any():  # an empty slice would return the next gene's first entry
            sums[held] = np.add.reduceat(values, self.gene_start[:-1][held], dtype=np.float64)
        return sums

    def select(self, chosen: np.ndarray) -> "MarkedCounts":
        """The counts of the genes with chosen (B,) True."""
        position = np.cumsum(chosen) - 1
        entries = np.repeat(chosen, np.diff(self.gene_start))
        molecules = chosen[self.mark_gene]
        return MarkedCounts(
            genes=self.genes[chosen],
            gene_start=_delimit(np.diff(self.gene_start)[chosen]),
            cell=self.cell[entries],
            base=self.base[entries],
            start=_delimit(np.diff(self.start)[entries]),
            marks=self.marks[molecules],
            mark_gene=position[self.mark_gene[molecules]],
        )


def reveal_marks(
    counts: sparse.csc_array,
    genes: np.ndarray,
    rates: Callable[[np.ndarray], np.ndarray],
    shape: np.ndarray,
    amplitude: np.ndarray,
    lower: np.ndarray,
    upper: np.ndarray,
    rng: np.random.Generator,
) -> MarkedCounts:
    """Draw the marks that matter for gains between `lower` and `upper`.

    Observed molecules are marked only for genes with lower < 1, else they stay; new ones are drawn only up to `upper`.

    Args:
        counts: (n, G) integer valued, with sorted indices.
        genes: (B,) columns to reveal.
        rates: expected counts mu of given columns, transposed, (number of columns, n) float32.
        shape: (G,) gamma shapes r, float32.
        amplitude: (n,) float32, mean 1, of the cells' response beyond MAX_FOLD.
        lower, upper: (G,) range of the gains.
        rng: source of all randomness.
    """
    num_cells = counts.shape[0]
    held = counts[:, genes]
    gene = np.repeat(np.arange(len(genes)), np.diff(held.indptr))
    key = gene * num_cells + held.indices
    count = held.data.astype(np.int32)
    thinned = (lower[genes] < 1)[gene]
    keys, marks = [np.zeros(0, np.int64)], [np.zeros(0, np.float32)]
    rising = np.flatnonzero(upper[genes] > 1)
    size = max(1, DENSE_BLOCK // num_cells)
    for block in (rising[first : first + size] for first in range(0, len(rising), size)):
        columns = genes[block]
        arrivals = _arrivals(held[:, block], rates(columns), shape[columns], amplitude, upper[columns], rng)
        for row, cell, mark in arrivals:
            keys.append(block[row] * num_cells + cell)
            marks.append(mark)
    new, new_marks = np.concatenate(keys), np.concatenate(marks)
    order = np.argsort(new, kind="stable")
    new, new_marks = new[order], new_marks[order]

    # merge the entries of the counts with those that only new molecules have
    place = np.searchsorted(key, new)
    absent = np.append(key, -1)[place] != new
    absent[1:] &= new[1:] != new[:-1]
    place = place[absent]
    entries = np.insert(key, place, new[absent])
    marked = np.insert(np.where(thinned, count, 0), place, 0)
    observed = np.repeat(key[thinned], count[thinned])
    marked += np.bincount(np.searchsorted(entries, new), minlength=len(entries)).astype(np.int32)
    gene = entries // num_cells
    return MarkedCounts(
        genes=genes,
        gene_start=_delimit(np.bincount(gene, minlength=len(genes))),
        cell=entries - gene * num_cells,
        base=np.insert(np.where(thinned, 0, count), place, 0),
        start=_delimit(marked),
        marks=np.insert(
            rng.random(len(observed), dtype=np.float32), np.searchsorted(observed, new), new_marks
        ),
        mark_gene=np.repeat(gene, marked),
    )


def _arrivals(
    counts: sparse.csc_array,
    mean: np.ndarray,
    shape: np.ndarray,
    amplitude: np.ndarray,
    upper: np.ndarray,
    rng: np.random.Generator,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Genes, cells and marks of new molecules up to the gains `upper`, for counts (n, B) and rates (B, n)."""
    own = (np.minimum(upper, MAX_FOLD) - 1).astype(np.float32)
    odds = own[:, None] * mean / (mean + shape[:, None])
    clusters = np.log1p(odds)
    rate = shape[:, None] * clusters
    gene = np.repeat(np.arange(len(own)), np.diff(counts.indptr))
    rate[gene, counts.indices] += counts.data * clusters[gene, counts.indices]
    row, cell = _clustered(rate, odds, rng)
    yield row, cell, 1 + rng.random(len(row), dtype=np.float32) * own[row]
    far = np.flatnonzero(upper > MAX_FOLD)
    if len(far):
        beyond = (upper[far] - MAX_FOLD).astype(np.float32)
        odds = beyond[:, None] * (mean[far] * amplitude) / FLOOR_SHAPE
        row, cell = _clustered(FLOOR_SHAPE * np.log1p(odds), odds, rng)
        yield far[row], cell, MAX_FOLD + rng.random(len(row), dtype=np.float32) * beyond[row]


def _clustered(rate: np.ndarray, odds: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of molecules: Poisson(rate) clusters of logarithmic size, p = odds / (1 + odds).

    A cluster falls into a stride of cells first, then into a cell of it: partial sums of all rates would cost more
    than all the rest.
    """
    rows, columns = rate.shape
    strides = np.zeros((rows, -(-columns // STRIDE), STRIDE), dtype=np.float32)
    strides.reshape(rows, -1)[:, :columns] = rate
    strides = strides.reshape(-1, STRIDE)
    total = np.cumsum(strides @ np.ones(STRIDE, dtype=np.float32), dtype=np.float64)
    # ordered uniforms without sorting: normalised partial sums of exponentials
    gaps = np.cumsum(rng.standard_exponential(rng.poisson(total[-1]) + 1))
    stride = np.searchsorted(total, gaps[:-1] * (total[-1] / gaps[-1]), side="right")
    within = strides[stride] @ np.triu(np.ones((STRIDE, STRIDE), dtype=np.float32))
    # a little below 1, so that rounding never reaches the end of a stride
    level = rng.random((len(stride), 1), dtype=np.float32) * np.float32(1 - 1e-6) * within[:, -1:]
    where = stride * STRIDE + (within <= level).sum(1)
    row, column = np.divmod(where, strides.size // rows)
    chance = odds[row, column].astype(np.float64)
    size = rng.logseries(chance / (1 + chance))
    return np.repeat(row, size), np.repeat(column, size)


def _delimit(sizes: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(sizes)])
