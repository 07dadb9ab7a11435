"""Count transport: real control cells moved to a population with given means, counts to counts.

Every gene gets one gain: below 1 its molecules are thinned, above 1 new ones are superposed, at rates drawn from the
posterior of each cell's rates (`marked_counts`, `expression_state`). Gains are solved for until the log1p-CP10k means
*recomputed* from the new counts match the target within a tenth of their Monte Carlo error, or one molecule
(`gain_solver`).

What the transported sample is. Its means are those of the target population: a sample without the sampling error of
its means, a control variate. All other spread between cells is that of the controls, thinned and superposed. How
uncertain the population is belongs to draws of the target, one transport each, never into the cells of one of them.

| symbol | code | |
|---|---|---|
| f | gain | (G,), expected new counts over old ones |
| lambda | rate | expected counts of a cell; mu those of its state |
| L | `library_size` | may cover genes that the matrix does not hold |

Exact under the gamma-Poisson model of `expression_state`: thinning, and the margins of superposition up to MAX_FOLD. Not exact
is co-expression among genes that controls do not express: their floors share one amplitude per cell, and how
strong it is, is an assumption.
"""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from scipy import sparse

from hilbertcell.models.expression_state import ExpressionState, fit_expression_state
from hilbertcell.models.gain_solver import TARGET_SUM, GainProblem, natural_mean, solve_gains
from hilbertcell.models.marked_counts import CellRates, MarkedCounts

__all__ = ["natural_mean", "transport_counts"]

# Spread of the cells' amplitudes of response, a coefficient of variation of 0.6. Under interferon (Kang 2018) the most
# induced genes correlate by 0.06 within populations; without amplitudes the transported ones do by 0.01, with them by 0.05.
AMPLITUDE_SHAPE = 3.0
HIGHEST_MEAN = float(np.log1p(TARGET_SUM))  # of a population in which every molecule is of one gene
# genes are independent given library sizes; more threads would wait for memory
NUM_THREADS = min(4, os.cpu_count() or 1)


def transport_counts(
    counts: sparse.sparray | sparse.spmatrix,
    library_size: np.ndarray,
    target_mean: np.ndarray,
    library_ratio: float,
    rng: np.random.Generator,
    state: ExpressionState | None = None,
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Move cells to a population with the target means; returns new counts (n, G) and new library sizes (n,).

    Row i of the result is cell i of `counts`, transported. Cells that have the target means already come back bit for
    bit at ratio 1.

    Args:
        counts: (n, G) non-negative integers of any dtype, which is kept.
        library_size: (n,) total counts per cell. What they hold beyond the matrix is scaled by the library
            ratio, rounded if library sizes are whole numbers; library sizes below a cell's sum of counts change in
            proportion to it.
        target_mean: (G,) on the log1p-CP10k scale; entries below 0 are read as 0, the smallest mean there is.
        library_ratio: typical (geometric mean) library size of the target population over that of these cells.
            Where library sizes are sums of the counts the target means take precedence and the ratio is met
            within a factor exp(0.25).
        rng: source of all randomness.
        state: posterior rates of the cells, from `fit_expression_state`; fitted to `counts` if not given. Pass
            it when the same cells are moved to many targets.

    Raises:
        ValueError: no cells, shapes that do not match, a target mean that no counts can have, a ratio that is not
            positive.

    Example:
        >>> counts = sparse.csr_matrix(np.random.default_rng(0).poisson(3.0, (100, 4)))
        >>> library = np.asarray(counts.sum(1)).ravel()
        >>> target = natural_mean(counts, library) + np.array([0.5, -0.5, 0.0, 0.0])
        >>> moved, new_library = transport_counts(counts, library, target, 1.0, np.random.default_rng(1))
        >>> bool(np.abs(natural_mean(moved, new_library) - target).max() < 0.1)
        True
    """
    y = sparse.csr_array(counts)
    library = np.asarray(library_size, dtype=np.float64)
    target = np.maximum(np.asarray(target_mean, dtype=np.float64), 0.0)
    _check(y, library, target, library_ratio)
    state = fit_expression_state(y, library) if state is None else state
    columns = y.tocsc()
    columns.sort_indices()
    problem = GainProblem(
        columns,
        library,
        *_library_rule(y, library, library_ratio),
        rates=CellRates(
            weights=state.draw_weights(rng).astype(np.float32),
            programs=state.programs.astype(np.float32),
            shape=state.shape.astype(np.float32),
            amplitude=(rng.gamma(AMPLITUDE_SHAPE, size=len(library)) / AMPLITUDE_SHAPE).astype(np.float32),
        ),
        library_ratio=library_ratio,
        target=target,
    )
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        chunks, gain, new_library = solve_gains(problem, rng, pool.map)
        counts = list(pool.map(lambda chunk: chunk.counts(gain[chunk.genes]), chunks))
    return _assemble(chunks, counts, y), new_library


def _check(y: sparse.csr_array, library: np.ndarray, target: np.ndarray, library_ratio: float) -> None:
    if y.shape[0] == 0:
        raise ValueError("counts have no rows: there are no cells to transport")
    if library.shape != (y.shape[0],) or target.shape != (y.shape[1],):
        raise ValueError(
            f"counts {y.shape} need library_size ({y.shape[0]},) and target_mean ({y.shape[1]},), "
            f"got {library.shape} and {target.shape}"
        )
    if not (np.isfinite(library_ratio) and library_ratio > 0):
        raise ValueError(f"library_ratio must be positive, got {library_ratio}")
    if not (target <= HIGHEST_MEAN).all():
        gene = int(np.argmax(~(target <= HIGHEST_MEAN)))
        raise ValueError(
            f"target_mean of gene {gene} is {target[gene]:g}: a mean of log1p counts per ten thousand is at most "
            f"{HIGHEST_MEAN:.2f}; is the target on another scale?"
        )


def _library_rule(
    y: sparse.csr_array, library: np.ndarray, library_ratio: float
) -> tuple[np.ndarray, np.ndarray]:
    """`outside` and `per_count` (n,) of the new library sizes, outside + per_count * new counts."""
    held = np.asarray(y.sum(1), dtype=np.float64)
    outside = library - held
    beyond = outside > 1e-6 * library  # less than that are rounding errors of float library sizes
    outside = library_ratio * np.where(beyond, outside, 0.0)
    if (library == np.rint(library)).all():
        outside = np.rint(outside)
    below = -(library - held) > 1e-6 * library
    return outside, np.where(below, library / np.maximum(held, 1.0), 1.0)


def _assemble(chunks: list[MarkedCounts], counts: list[np.ndarray], y: sparse.csr_array) -> sparse.csr_matrix:
    """The entries of all chunks, whose genes come in any order, as one matrix of y's shape and dtype."""
    size = np.zeros(y.shape[1], dtype=np.int64)
    for chunk in chunks:
        size[chunk.genes] = np.diff(chunk.gene_start)
    indptr = np.concatenate([[0], np.cumsum(size)])
    indices, data = np.empty(indptr[-1], dtype=np.int32), np.empty(indptr[-1], dtype=y.dtype)
    for chunk, count in zip(chunks, counts, strict=True):
        for run in np.split(np.arange(len(chunk.genes)), np.flatnonzero(np.diff(chunk.genes) != 1) + 1):
            if len(run):  # neighbouring genes are copied at once
                here = slice(chunk.gene_start[run[0]], chunk.gene_start[run[-1] + 1])
                first = indptr[chunk.genes[run[0]]]
                there = slice(first, first + here.stop - here.start)
                indices[there], data[there] = chunk.cell[here], count[here]
    result = sparse.csc_matrix((data, indices, indptr), shape=y.shape)
    result.eliminate_zeros()
    return result.tocsr()
