"""Solve for the gain of every gene, so that the means recomputed from the new counts match a target.

Unknown: gains f (G,). Equations, with counts y'(f) from `marked_counts` (monotone in f, all randomness fixed):

    mean over cells of log1p(1e4 y'_ig(f_g) / L'_i(f)) = target_g ,     L'_i = outside_i + per_count_i sum_g y'_ig

Genes are coupled by the library sizes L' alone. One Newton step of the coupled system (rank one, closed form) sets
the library sizes; then genes are solved one by one at fixed library sizes, each by the order of its marks, and library
sizes are renewed, until all means match. Many cells start from the gains of a sample of them (PILOT_CELLS), whose own means stand
for those of all: marks are then drawn near these gains alone, for few molecules.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import sparse

from hilbertcell.models.marked_counts import CellRates, MarkedCounts, reveal_marks, sums_between

TARGET_SUM = 1e4  # the natural scale of counts is log1p of counts per ten thousand
TOLERANCE = 0.1  # of a mean's Monte Carlo standard error, which hides errors of that size
LIBRARY_SLACK = 0.25  # how far mean log library sizes may leave the given ratio, see `_scale`
CHUNK_ENTRIES = 1 << 17  # non-zero counts worked on at once: what stays near the processor
PILOT_CELLS = 1000  # of samples of at least twice as many
PILOT_MOLECULES = 10  # of a gene in the pilot; rarer ones start without it
PARTS = 64  # of a range of gains, see `_nearest`
MAX_ROUNDS = 6  # new marks for genes whose gain left the range that was drawn
MAX_STEPS = 20  # renewals of the library sizes, or of marks

type Each = Callable[..., Iterable[Any]]  # like `map`, perhaps in threads


@dataclass(frozen=True, eq=False)
class GainProblem:
    """Cells to move and where to.

    Attributes:
        counts: (n, G) integer valued, sorted indices.
        library: (n,) old library sizes.
        outside: (n,) part of the new library sizes that does not depend on the new counts.
        per_count: (n,) what one new count adds to the library size.
        rates: what new molecules are drawn from.
        library_ratio: typical new over old library size.
        target: (G,) means on the log1p-CP10k scale.

    """

    counts: sparse.csc_array
    library: np.ndarray
    outside: np.ndarray
    per_count: np.ndarray
    rates: CellRates
    library_ratio: float
    target: np.ndarray

    @property
    def molecule(self) -> float:
        """What one molecule in a small cell adds to a gene's mean: finer than that no mean can be set."""
        small = max(float(np.quantile(self.library, 0.05)), 1.0)
        return float(np.log1p(TARGET_SUM / small)) / len(self.library)


def solve_gains(
    problem: GainProblem, rng: np.random.Generator, each: Each
) -> tuple[list[MarkedCounts], np.ndarray, np.ndarray]:
    """Marked counts in chunks of genes, gains (G,) and library sizes (n,) at the solution.

    `each` maps over chunks; it may use threads, the result does not depend on it.
    """
    start = natural_mean(problem.counts, problem.library)
    first = _first_gains(problem, start)
    piloted = len(problem.library) >= 2 * PILOT_CELLS
    if piloted:
        first = _pilot_gains(problem, start, first, rng, each)
    return _solve(problem, first, rng, each, coupled=not piloted)


def _solve(
    problem: GainProblem,
    first: tuple[np.ndarray, np.ndarray, np.ndarray],
    rng: np.random.Generator,
    each: Each,
    *,
    coupled: bool,
) -> tuple[list[MarkedCounts], np.ndarray, np.ndarray]:
    """As `solve_gains`, from a first guess and range of the gains; `coupled` where library sizes are not nearly right."""

    def reveal(genes: np.ndarray, rng: np.random.Generator) -> MarkedCounts:
        return reveal_marks(problem.counts, genes, problem.rates, low, high, rng)

    # no gene needs ten times the molecules of all genes: bounds the work for targets out of reach
    rates = problem.rates
    expected = np.maximum(rates.weights.sum(0, dtype=np.float64) @ rates.programs, 1e-300)
    ceiling = 10 * max(problem.library_ratio, 1.0) * problem.library.sum() / expected
    gain, low, high = (np.minimum(x, ceiling) for x in first)
    gain = np.clip(gain, low, high)
    parts = _parts(problem.counts)
    chunks = list(each(reveal, parts, rng.spawn(len(parts))))
    if coupled:
        gain = np.clip(_coupled_newton(chunks, gain, problem, each), low, high)
    library, mean, sd = _means(chunks, gain, problem, each)
    tolerance = _tolerance(sd, problem)
    error, settled = problem.target - mean, np.zeros(len(gain), dtype=bool)
    redrawn = 0
    for _ in range(MAX_STEPS):
        wrong = (np.abs(error) > tolerance) & ~settled
        short, over = wrong & (error > 0) & (gain >= high), wrong & (error < 0) & (gain <= low)
        pending = wrong & ~short & ~over
        if not pending.any():
            pending = (short & (high < ceiling)) | (over & (low > 0))
            # targets that drive library sizes to the end of their slack contradict each other: no use in ever more
            contradiction = abs(_excess(library, problem)) > 1e-3
            if not pending.any() or redrawn == (1 if contradiction else MAX_ROUNDS):
                break
            redrawn += 1
            wider = 1.5 if redrawn == 1 else 4.0  # most are missed narrowly
            low, high = (
                np.where(over, gain / wider, low),
                np.minimum(np.where(short, gain * wider, high), ceiling),
            )
            chunks = [chunk.select(~pending[chunk.genes]) for chunk in chunks]
            chunks.append(reveal(np.flatnonzero(pending), rng))
            # other molecules may have come: the errors of these genes are new ones
            fresh = _means(chunks[-1:], gain, problem, each, library)[1]
            error[pending] = (problem.target - fresh)[pending]
        settled |= _nearest_gains(chunks, pending, gain, low, high, error, tolerance, library, problem, each)
        renewed = _library(chunks, gain, problem, each)
        # an upper bound of what the library sizes do to any mean
        if np.abs(np.log(np.maximum(renewed, 1) / np.maximum(library, 1))).mean() > tolerance.min() / 5:
            library, mean, sd = _means(chunks, gain, problem, each)
            tolerance, error = _tolerance(sd, problem), problem.target - mean
    excess = _excess(library, problem)
    if abs(excess) > 1e-3:  # means are matched relative to smaller library sizes: go back to these
        gain = np.clip(gain * np.exp(-excess), low, high)
    return chunks, gain, _library(chunks, gain, problem, each)


def _parts(counts: sparse.csc_array) -> list[np.ndarray]:
    """All genes in runs of about as many entries."""
    number = min(counts.shape[1], 1 + counts.nnz // CHUNK_ENTRIES)
    ends = np.searchsorted(counts.indptr[1:], counts.nnz * np.arange(1, number) / number, side="right")
    return [part for part in np.split(np.arange(counts.shape[1]), ends) if len(part)]


def natural_mean(counts: sparse.sparray, library_size: np.ndarray) -> np.ndarray:
    """Means (G,) of log1p(1e4 y / L) of counts (n, G) with library sizes (n,); 0 where these are 0."""
    y = sparse.csc_array(counts)
    per_molecule = TARGET_SUM / np.maximum(np.asarray(library_size, dtype=np.float64), 1e-9)
    return sums_between(y.indptr, np.log1p(y.data * per_molecule[y.indices])) / y.shape[0]


def _first_gains(problem: GainProblem, start: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First guess and range (G,) of the gains from means `start`.

    Means grow like the counts while these are sparse, like their log later.
    """
    floor = np.maximum(start, problem.molecule / 2)
    ratios = np.stack([problem.target / floor, np.expm1(problem.target) / np.expm1(floor)])
    guesses = ratios * problem.library_ratio
    gain = np.sqrt(guesses[0] * guesses[1])
    molecules = sums_between(problem.counts.indptr, problem.counts.data)
    width = _width(gain, molecules, 0.05)
    return gain, guesses.min(0) / width, guesses.max(0) * width


def _pilot_gains(
    problem: GainProblem,
    start: np.ndarray,
    first: tuple[np.ndarray, np.ndarray, np.ndarray],
    rng: np.random.Generator,
    each: Each,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Guess and range (G,) of the gains from evenly spaced cells.

    Their target is in the ratio to their own means that the target has to the means of all, so that the gains do not hold
    the sampling error of the pilot: those of cells which are at the target are 1.
    """
    cells = np.unique(np.linspace(0, len(problem.library) - 1, PILOT_CELLS).astype(np.int64))
    counts = _rows(problem.counts, cells)
    library = problem.library[cells]
    own = natural_mean(counts, library)
    known = (sums_between(counts.indptr, counts.data) >= PILOT_MOLECULES) & (problem.target > 0)
    target = np.where(known, problem.target * (own / np.where(known, start, 1.0)), 0.0)
    pilot = replace(
        problem,
        counts=counts,
        library=library,
        outside=problem.outside[cells],
        per_count=problem.per_count[cells],
        rates=problem.rates.select(cells),
        target=np.where(known, target, problem.target),
    )
    _, gain, _ = _solve(pilot, _first_gains(pilot, own), rng, each, coupled=True)
    width = _width(gain, sums_between(counts.indptr, counts.data), 0.01)
    guess, low, high = (
        np.where(known, x, far) for x, far in zip((gain, gain / width, gain * width), first, strict=True)
    )
    return guess, low, high


def _rows(counts: sparse.csc_array, cells: np.ndarray) -> sparse.csc_array:
    """The rows `cells`, ascending: one look at each entry."""
    position = np.full(counts.shape[0], -1, dtype=counts.indices.dtype)
    position[cells] = np.arange(len(cells))
    row = position[counts.indices]
    kept = row >= 0
    indptr = np.concatenate([[0], np.cumsum(kept)])[counts.indptr]
    return sparse.csc_array((counts.data[kept], row[kept], indptr), shape=(len(cells), counts.shape[1]))


def _width(gain: np.ndarray, molecules: np.ndarray, least: float) -> np.ndarray:
    """Factor (G,) on either side of gains that were found from so many molecules.

    Three standard errors of the number of those that come or go, and a little for the library sizes.
    """
    moved = np.minimum(np.abs(gain - 1) + 0.02, 1)
    return np.exp(least + 3 * np.sqrt(moved / (molecules * np.maximum(gain, 1) + 4)))


def _tolerance(sd: np.ndarray, problem: GainProblem) -> np.ndarray:
    return np.maximum(TOLERANCE * sd / np.sqrt(len(problem.library)), problem.molecule)


def _coupled_newton(
    chunks: list[MarkedCounts], gain: np.ndarray, problem: GainProblem, each: Each
) -> np.ndarray:
    """Gains (G,) after one Newton step from `gain`, with its effect on the library sizes.

    error = slope * step - pull * rise, where rise = sum(share * step) is the common rise of log library sizes,
    slope = d mean / d log gain = E[y (v(y) - v(y - 1))], pull = - d mean / d log library sizes = E[x / (1 + x)].
    """
    library, mean, sd = _means(chunks, gain, problem, each)
    scale = _scale(library, problem).astype(np.float32)

    def derivatives(marked: MarkedCounts) -> tuple[np.ndarray, ...]:
        y = marked.counts(gain[marked.genes]).astype(np.float32)
        per_molecule = scale[marked.cell]
        x = y * per_molecule
        step = y * (np.log1p(x) - np.log1p(np.maximum(x - per_molecule, 0)))
        return tuple(marked.gene_sums(z) for z in (step, x / (1 + x), y))

    slope, pull, share = np.zeros((3, len(gain)))
    for chunk, found in zip(chunks, each(derivatives, chunks), strict=True):
        slope[chunk.genes], pull[chunk.genes], share[chunk.genes] = found
    slope, pull = np.maximum(slope / len(library), problem.molecule), pull / len(library)
    share /= max(library.sum(), 1.0)
    error = problem.target - mean
    own, common = share @ (error / slope), share @ (pull / slope)
    rise = np.clip(own / max(1 - common, 1e-3), -LIBRARY_SLACK, LIBRARY_SLACK)
    step = np.clip((error + pull * rise) / slope, -1, 1)
    return np.where(np.abs(error) > _tolerance(sd, problem), gain * np.exp(step), gain)


def _nearest_gains(
    chunks: list[MarkedCounts],
    pending: np.ndarray,
    gain: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    error: np.ndarray,
    tolerance: np.ndarray,
    library: np.ndarray,
    problem: GainProblem,
    each: Each,
) -> np.ndarray:
    """Bring `gain` and `error` of the pending genes, in place, as near to no error as their ranges allow.

    Returns where (G,) there is nothing nearer: one molecule more or less leaves more than half the tolerance.
    """
    scale = _scale(library, problem)
    settled = np.zeros(len(gain), dtype=bool)

    def nearest(chunk: MarkedCounts) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        marked = chunk.changing(pending[chunk.genes])
        g = marked.genes
        return g, *_nearest(marked, scale, gain[g], low[g], high[g], error[g], tolerance[g])

    for genes, values, left in list(each(nearest, chunks)):
        gain[genes], error[genes] = values, left
        inside = (values > low[genes]) & (values < high[genes])
        settled[genes] = inside & (np.abs(left) > tolerance[genes] / 2)
    return settled


def _nearest(
    marked: MarkedCounts,
    scale: np.ndarray,
    gain: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    error: np.ndarray,
    tolerance: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Gains (B,) at fixed library sizes, and the errors they leave.

    `marked` may be the changing entries alone. Molecules come one by one in the order of their marks, each with what it
    adds to the mean.
    """
    gene, marks = marked.mark_gene, marked.marks
    if not len(marks):
        return np.where(error > 0, high, low), error
    place = 0.999 * (marks - low[gene]) / np.maximum(high - low, 1e-300)[gene]  # in [0, 1)
    rank = np.zeros(len(marks), dtype=np.int64)  # molecules of the entry that come earlier; most have one
    several = np.flatnonzero(np.bincount(marked.entry)[marked.entry] > 1)
    if len(several):
        several = several[np.argsort(marked.entry[several] + place[several])]
        first = np.append(True, np.diff(marked.entry[several]) > 0)
        rank[several] = np.arange(len(several)) - np.flatnonzero(first)[np.cumsum(first) - 1]
    per_molecule = scale[marked.cell[marked.entry]]
    x = (marked.base[marked.entry] + rank) * per_molecule
    rise = (np.log1p(x + per_molecule) - np.log1p(x)) / len(scale)

    # which part of the range, then which molecule of it: sorting them all would cost more than all the rest
    part = gene * PARTS + (place * PARTS).astype(np.int64)
    total = np.concatenate([[0.0], np.cumsum(np.bincount(part, rise, minlength=len(gain) * PARTS))])
    lowest = np.arange(len(gain)) * PARTS
    there = marks < gain.astype(np.float32)[gene]
    goal = total[lowest] + np.bincount(gene[there], rise[there], minlength=len(gain)) + error
    chosen = np.clip(np.searchsorted(total, goal, side="right") - 1, lowest, lowest + PARTS - 1)
    near = np.flatnonzero(part == chosen[gene])
    near = near[np.argsort(gene[near] + place[near])]
    last = np.cumsum(np.bincount(gene[near], minlength=len(gain)))
    first = np.append(0, last[:-1])
    sums = np.append(0.0, np.cumsum(rise[near]))
    goal = goal - total[chosen] + sums[first]
    above = np.clip(np.searchsorted(sums, goal), first, last)
    below = np.maximum(above - 1, first)
    k = np.where(goal - sums[below] < sums[above] - goal, below, above)  # molecules up to here stay
    top = low + (chosen - lowest + 1) / (0.999 * PARTS) * (high - low)  # above the marks of the part
    result = np.where(
        k < last, marks[near[np.minimum(k, len(near) - 1)]] if len(near) else high, np.minimum(top, high)
    )
    left = goal - sums[k]
    ends = (chosen == lowest) & (k == first) & (left < -tolerance)
    return np.where(ends, low, result), left


def _library(chunks: list[MarkedCounts], gain: np.ndarray, problem: GainProblem, each: Each) -> np.ndarray:
    """New library sizes (n,)."""
    return problem.outside + problem.per_count * sum(each(lambda c: c.cell_sums(gain[c.genes]), chunks))


def _means(
    chunks: list[MarkedCounts],
    gain: np.ndarray,
    problem: GainProblem,
    each: Each,
    library: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Library sizes (n,), those of all chunks if not given, and by gene (G,) mean and standard deviation over cells of
    v = log1p(x), x counts per ten thousand."""
    library = _library(chunks, gain, problem, each) if library is None else library
    scale = _scale(library, problem).astype(np.float32)

    def moments(marked: MarkedCounts) -> tuple[np.ndarray, np.ndarray]:
        value = np.log1p(marked.counts(gain[marked.genes]) * scale[marked.cell])
        mean = marked.gene_sums(value) / len(scale)
        return mean, marked.gene_sums(value * value) / len(scale) - mean * mean

    mean, variance = np.zeros((2, len(gain)))
    for chunk, found in zip(chunks, each(moments, chunks), strict=True):
        mean[chunk.genes], variance[chunk.genes] = found
    return library, mean, np.sqrt(np.maximum(variance, 0))


def _excess(library: np.ndarray, problem: GainProblem) -> float:
    """By how much mean log library sizes leave the given ratio beyond the slack."""
    known = (library > 0) & (problem.library > 0)
    if not known.any():
        return 0.0
    drift = float(np.mean(np.log(library[known] / problem.library[known])) - np.log(problem.library_ratio))
    return drift - float(np.clip(drift, -LIBRARY_SLACK, LIBRARY_SLACK))


def _scale(library: np.ndarray, problem: GainProblem) -> np.ndarray:
    """Counts per ten thousand of one molecule (n,).

    Where library sizes are sums of the counts, means of sparse counts determine them, and those of deep counts do
    not: all gains could rise together for ever in pursuit of a target that contradicts itself. So beyond the slack
    around the given ratio means are matched relative to the library sizes at its end, and stay in error.
    """
    return TARGET_SUM * np.exp(_excess(library, problem)) / np.maximum(library, 1e-9)
