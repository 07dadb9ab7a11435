"""Count transport: real control cells moved to a target mean, counts to counts.

Each gene gets one gain f: below 1 its counts are thinned, above 1 molecules are superposed at drawn rates (see
`marked_counts`). The gains solve

    mean over cells of log1p(1e4 y'_ig / L'_i) = target_g ,        L'_i the *new* library size,

so that the means recomputed from the new counts match the target, within a tenth of their Monte Carlo error or one
molecule. Library sizes couple the genes: a solve with library sizes fixed alternates with new library sizes.

What the transported sample is. Its means equal those of the target population: a sample without the sampling error
of its means, all other spread between cells being that of the controls, thinned and superposed. Uncertainty about
the population belongs to draws of the target, one transport each, never to the cells of one population.

Where library sizes are row sums, the target means nearly determine the library sizes too (sparse counts: deeper
cells have larger log1p means), and the given ratio is only the start; the solution may leave it by a factor
exp(LIBRARY_SLACK), so that targets which contradict each other end in an error of the means, not in absurd depths.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from scipy import sparse

from hilbertcell.models.expression_state import SPREAD_PRIOR, ExpressionState, fit_expression_state
from hilbertcell.models.marked_counts import MarkedCounts, reveal_marks

TARGET_SUM = 1e4  # the natural scale of counts is log1p of counts per ten thousand
LIBRARY_SLACK = 0.25
TOLERANCE = 0.1  # of the Monte Carlo standard error of a mean; its square is lost beside that error
CHUNK_ENTRIES = 1 << 17  # non-zero counts worked on at once: what stays near the processor
MAX_ROUNDS = 6  # new marks, with a wider range, for gains that ran out of theirs
MAX_STEPS = 8
COUPLED_STEPS = 1
NUM_THREADS = 2


@dataclass(frozen=True, eq=False)
class _Moments:
    """What the counts at one vector of gains give: library sizes (n,), then mean, sd and slope over log gain (G,)."""

    counts: list[np.ndarray]
    library: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    slope: np.ndarray
    pull: np.ndarray
    share: np.ndarray


@dataclass(frozen=True, eq=False)
class _Problem:
    """The cells of one transport. `outside`: new counts of a cell on genes that the matrix does not hold."""

    counts: sparse.csr_matrix
    library: np.ndarray
    outside: np.ndarray
    weights: np.ndarray
    state: ExpressionState
    library_ratio: float
    target: np.ndarray


def transport_counts(
    counts: sparse.csr_matrix,
    library_size: np.ndarray,
    target_mean: np.ndarray,
    library_ratio: float,
    rng: np.random.Generator,
    state: ExpressionState | None = None,
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Move cells to a population with the target means; returns new counts (n, G) and new library sizes (n,).

    Row i of the result is row i of `counts`, transported. Counts that already have the target means at ratio 1 come
    back bit for bit.

    Args:
        counts: (n, G) non-negative integers of any dtype, which is kept.
        library_size: (n,) total counts per cell; they may cover more genes than the matrix. What they cover beyond
            it is scaled by the library ratio (and rounded, if library sizes are whole numbers).
        target_mean: (G,) log1p-CP10k scale; entries below 0 are read as 0, the smallest mean there is.
        library_ratio: typical library size of the target population over that of these cells.
        rng: source of all randomness.
        state: posterior rates of the cells; fitted to `counts` if not given. Pass it when the same cells are
            transported to many targets.

    Raises:
        ValueError: shapes that do not match, library sizes below row sums, a target mean that no counts can have.
    """
    y = sparse.csr_matrix(counts)
    library = np.asarray(library_size, dtype=np.float64)
    target = np.maximum(np.asarray(target_mean, dtype=np.float64), 0.0)
    outside = library - np.asarray(y.sum(1), dtype=np.float64).ravel()
    _check(y, library, target, library_ratio, outside)
    # rounding errors of float library sizes are not counts
    outside = library_ratio * np.where(outside > 1e-6 * library, outside, 0.0)
    if (library == np.rint(library)).all():
        outside = np.rint(outside)
    state = fit_expression_state(y, library) if state is None else state
    weights = state.draw_weights(rng).astype(np.float32)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        chunks, now = _solve(_Problem(y, library, outside, weights, state, library_ratio, target), rng, pool.map)
    return _assemble(chunks, now.counts, y), now.library


def natural_mean(counts: sparse.csr_matrix, library_size: np.ndarray) -> np.ndarray:
    """Means (G,) of log1p(1e4 y / L) of counts (n, G) with library sizes (n,)."""
    y = sparse.csc_matrix(counts)
    gene = np.repeat(np.arange(y.shape[1]), np.diff(y.indptr))
    value = np.log1p(TARGET_SUM * y.data / np.asarray(library_size, dtype=np.float64)[y.indices])
    return np.bincount(gene, value, minlength=y.shape[1]) / y.shape[0]


def _check(y, library, target, library_ratio, outside):
    if library.shape != (y.shape[0],) or target.shape != (y.shape[1],):
        raise ValueError(
            f"counts {y.shape} need library_size ({y.shape[0]},) and target_mean ({y.shape[1]},), "
            f"got {library.shape} and {target.shape}"
        )
    if not (np.isfinite(library_ratio) and library_ratio > 0):
        raise ValueError(f"library_ratio must be positive, got {library_ratio}")
    if outside.size and outside.min() < -1e-6 * max(1.0, library.max()):
        cell = int(outside.argmin())
        raise ValueError(
            f"library_size of cell {cell} is {library[cell]:g}, less than its {library[cell] - outside[cell]:g} counts; "
            "give library sizes that cover the matrix, or its row sums"
        )
    if not (target < np.log1p(TARGET_SUM)).all():
        gene = int(np.argmax(~(target < np.log1p(TARGET_SUM))))
        raise ValueError(
            f"target_mean of gene {gene} is {target[gene]:g}; means of log1p counts per ten thousand are finite and below "
            f"{np.log1p(TARGET_SUM):.2f}: is the target on another scale?"
        )


def _solve(problem: _Problem, rng: np.random.Generator, each) -> tuple[list[MarkedCounts], _Moments]:
    """Marked counts in chunks of genes, and their moments at the target."""
    y = problem.counts.tocsc()
    y.sort_indices()
    num_cells, num_genes = y.shape
    molecule = np.log1p(TARGET_SUM / max(float(np.quantile(problem.library, 0.05)), 1.0)) / num_cells
    shape, programs = problem.state.shape.astype(np.float32), problem.state.programs.astype(np.float32)

    def reveal(genes, low, high, rng):
        return reveal_marks(
            y, genes, lambda g: programs[:, g].T @ problem.weights.T, shape, 1 / SPREAD_PRIOR, low, high, rng
        )

    # no gene needs ten times the molecules of all genes: a bound on the work for targets out of reach
    expected = problem.weights.sum(0) @ problem.state.programs
    ceiling = 10 * max(problem.library_ratio, 1.0) * problem.library.sum() / np.maximum(expected, 1e-300)
    gain, low, high = (np.minimum(x, ceiling) for x in _first_gains(y, problem, molecule))
    parts = np.array_split(np.arange(num_genes), min(num_genes, 1 + y.nnz // CHUNK_ENTRIES))
    chunks = list(each(lambda genes, rng: reveal(genes, low, high, rng), parts, rng.spawn(len(parts))))
    for _ in range(MAX_ROUNDS):
        gain, now, error = _match(chunks, gain, low, high, problem, molecule, each)
        short, over = (error > 0) & (gain >= high) & (high < ceiling), (error < 0) & (gain <= low) & (low > 0)
        redo = short | over
        if not redo.any():
            break
        low, high = np.where(over, gain / 4, low), np.minimum(np.where(short, gain * 4, high), ceiling)
        chunks = [chunk.select(~redo[chunk.genes]) for chunk in chunks] + [reveal(np.flatnonzero(redo), low, high, rng)]
    return chunks, now


def _first_gains(y, problem, molecule):
    """First guess and range of the gains: log1p means grow like the counts while sparse, like their log later."""
    floor = np.maximum(natural_mean(y, np.maximum(problem.library, 1e-9)), molecule / 2)
    guesses = np.stack([problem.target / floor, np.expm1(problem.target) / np.expm1(floor)]) * problem.library_ratio
    gain = np.sqrt(guesses[0] * guesses[1])
    # four standard errors of the number of molecules that come or go, and a little for the library sizes
    molecules = np.asarray(y.sum(0), dtype=np.float64).ravel() * np.maximum(gain, 1) + 4
    width = np.exp(0.05 + 4 * np.sqrt(np.minimum(np.abs(gain - 1) + 0.02, 1) / molecules))
    return gain, guesses.min(0) / width, guesses.max(0) * width


def _match(chunks, gain, low, high, problem, molecule, each):
    """Gains in [low, high] whose recomputed means match, as far as they can; with moments and errors (G,)."""
    gain = np.clip(gain, low, high)
    for step in range(MAX_STEPS):
        now = _moments(chunks, gain, problem, each)
        tolerance = np.maximum(TOLERANCE * now.sd / np.sqrt(len(now.library)), molecule)
        error = problem.target - now.mean
        wrong = np.abs(error) > tolerance
        pending = wrong & np.where(error > 0, gain < high, gain > low)
        # what two brackets in a row leave open cannot be had: the next molecule overshoots
        if not pending.any() or (step > COUPLED_STEPS + 1 and pending.sum() > 0.5 * before):
            break
        before = pending.sum()
        if step < COUPLED_STEPS:
            move = _coupled_newton(error, now, molecule)
            gain = np.where(wrong, np.clip(gain * np.exp(np.clip(move, -1, 1)), low, high), gain)
            continue
        scale = _scale(now.library, problem)
        close = np.maximum(tolerance / 2, 0.6 * molecule)

        def bracket(chunk, scale=scale, gain=gain, pending=pending, close=close):
            here = pending[chunk.genes]
            g = chunk.genes[here]
            return g, _bracketed_newton(chunk.select(here), scale, gain[g], low[g], high[g], problem.target[g], close[g])

        solved = list(each(bracket, chunks))
        gain = gain.copy()
        for genes, values in solved:
            gain[genes] = values
    return gain, now, np.where(wrong, error, 0.0)


def _coupled_newton(error, now, molecule):
    """Steps (G,) of log gain. Genes are coupled by the library sizes alone: a system of rank one.

    error = slope * step - pull * rise, where rise = sum(share * step) is the common change of log library size.
    """
    slope = np.maximum(now.slope, molecule)
    own, common = now.share @ (error / slope), now.share @ (now.pull / slope)
    rise = np.clip(own / max(1 - common, 1e-3), -LIBRARY_SLACK, LIBRARY_SLACK)
    return (error + now.pull * rise) / slope


def _bracketed_newton(marked, scale, gain, low, high, target, tolerance):
    """Gains (B,) at fixed library sizes: Newton steps kept inside a bracket, which the means, monotone, allow."""
    result = gain
    number = np.arange(len(gain))
    low, high = np.maximum(low, 1e-12), high
    low_known, high_known = np.zeros((2, len(gain)), bool)
    for _ in range(MAX_STEPS if len(gain) else 0):
        mean, _, slope, _ = _gene_moments(marked, marked.counts(gain), scale)
        error = target - mean
        low, low_known = np.where(error > 0, gain, low), low_known | (error > 0)
        high, high_known = np.where(error < 0, gain, high), high_known | (error < 0)
        newton = np.clip(gain * np.exp(np.clip(error / np.maximum(slope, tolerance), -1, 1)), low, high)
        seen = ((newton == low) & low_known) | ((newton == high) & high_known)
        wrong = np.abs(error) > tolerance
        gain = np.where(wrong, np.where(seen, np.sqrt(low * high), newton), gain)
        result[number] = gain
        if not wrong.any():
            break
        if wrong.mean() < 0.5:
            marked, number = marked.select(wrong), number[wrong]
            gain, low, high, target, tolerance, low_known, high_known = (
                x[wrong] for x in (gain, low, high, target, tolerance, low_known, high_known)
            )
    return result


def _moments(chunks, gain, problem, each):
    counts = list(each(lambda chunk: chunk.counts(gain[chunk.genes]), chunks))
    num_cells = len(problem.outside)
    per_chunk = each(lambda chunk, count: np.bincount(chunk.cell, count, minlength=num_cells), chunks, counts)
    library = sum(per_chunk, start=problem.outside)
    scale = _scale(library, problem)
    mean, sd, slope, pull, share = np.zeros((5, len(gain)))
    moments = each(lambda chunk, count: _gene_moments(chunk, count, scale), chunks, counts)
    for chunk, count, values in zip(chunks, counts, moments, strict=True):
        g = chunk.genes
        mean[g], sd[g], slope[g], pull[g] = values
        share[g] = chunk.gene_sums(count) / library.sum()
    return _Moments(counts, library, mean, sd, slope, pull, share)


def _gene_moments(marked, counts, scale):
    """Mean and sd of v = log1p(x), x = counts per ten thousand, and the slopes of the mean, for each gene of `marked`.

    Over log gain: E[y (v(y) - v(y - 1))]; over the log of all library sizes, sign changed: E[x / (1 + x)].
    """
    per_molecule = scale.astype(np.float32)[marked.cell]
    x = counts.astype(np.float32) * per_molecule
    value = np.log1p(x)
    step = counts.astype(np.float32) * (value - np.log1p(np.maximum(x - per_molecule, 0)))
    mean, square, slope, pull = (marked.gene_sums(a) / len(scale) for a in (value, value * value, step, x / (1 + x)))
    return mean, np.sqrt(np.maximum(square - mean * mean, 0)), slope, pull


def _scale(library, problem):
    """Counts per ten thousand of one molecule (n,), with library sizes held to the given ratio within the slack."""
    known = (library > 0) & (problem.library > 0)
    drift = 0.0
    if known.any():
        drift = np.mean(np.log(library[known] / problem.library[known])) - np.log(problem.library_ratio)
    excess = drift - np.clip(drift, -LIBRARY_SLACK, LIBRARY_SLACK)
    return TARGET_SUM * np.exp(excess) / np.maximum(library, 1e-9)


def _assemble(chunks, counts, y):
    """The entries of all chunks, whose genes are in any order, as one CSR matrix of y's shape and dtype."""
    size = np.zeros(y.shape[1], dtype=np.int64)
    for chunk in chunks:
        size[chunk.genes] = np.diff(chunk.gene_start)
    indptr = np.concatenate([[0], np.cumsum(size)])
    indices, data = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=y.dtype)
    for chunk, count in zip(chunks, counts, strict=True):
        place = np.arange(len(count)) + np.repeat(indptr[chunk.genes] - chunk.gene_start[:-1], np.diff(chunk.gene_start))
        indices[place], data[place] = chunk.cell, count
    result = sparse.csc_matrix((data, indices, indptr), shape=y.shape)
    result.eliminate_zeros()
    return result.tocsr()
