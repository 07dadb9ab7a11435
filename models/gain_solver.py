"""Solve for the gain of every gene, so that the means recomputed from the new counts match a target.

Unknown: gains f (G,). Equations, with counts y'(f) from `marked_counts` (monotone in f, all randomness fixed):

    mean over cells of log1p(1e4 y'_ig(f_g) / L'_i(f)) = target_g ,     L'_i = outside_i + per_count_i sum_g y'_ig

Genes are coupled by the library sizes L' alone. One Newton step of the coupled system (rank one, closed form) sets
the library sizes; then genes are solved one by one at fixed library sizes, inside a bracket, and library sizes are
renewed, until all means match.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from hilbertcell.models.marked_counts import MarkedCounts, reveal_marks

TARGET_SUM = 1e4  # the natural scale of counts is log1p of counts per ten thousand
TOLERANCE = 0.1  # of a mean's Monte Carlo standard error, which hides errors of that size
LIBRARY_SLACK = 0.25  # how far log library sizes may leave the given ratio, see `_scale`
CHUNK_ENTRIES = 1 << 17  # non-zero counts worked on at once: what stays near the processor
MAX_ROUNDS = 6  # new marks for genes whose gain left the range that was drawn
MAX_STEPS = 8

type Each = Callable[..., Iterable[Any]]  # like `map`, perhaps in threads


@dataclass(frozen=True, eq=False)
class GainProblem:
    """Cells to move and where to.

    Attributes:
        counts: (n, G) integer valued, sorted indices.
        library: (n,) old library sizes.
        outside: (n,) part of the new library sizes that does not depend on the new counts.
        per_count: (n,) what one new count adds to the library size.
        weights, programs: (n, K) and (K, G) float32, expected counts mu = weights @ programs.
        amplitude: (n,) float32, see `marked_counts`.
        shape: (G,) float32 gamma shapes.
        library_ratio: typical new over old library size.
        target: (G,) means on the log1p-CP10k scale.

    """

    counts: sparse.csc_array
    library: np.ndarray
    outside: np.ndarray
    per_count: np.ndarray
    weights: np.ndarray
    programs: np.ndarray
    amplitude: np.ndarray
    shape: np.ndarray
    library_ratio: float
    target: np.ndarray

    @property
    def molecule(self) -> float:
        """What one molecule in a small cell adds to a gene's mean: finer than that no mean can be set."""
        small = max(float(np.quantile(self.library, 0.05)), 1.0)
        return float(np.log1p(TARGET_SUM / small)) / len(self.library)


@dataclass(frozen=True, eq=False)
class Moments:
    """What the counts at one vector of gains give.

    `counts` (entries of each chunk), `library` (n,); by gene (G,): `mean`, `sd`, `slope` = d mean / d log gain,
    `pull` = - d mean / d log library sizes, `share` of all library sizes.
    """

    counts: list[np.ndarray]
    library: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    slope: np.ndarray
    pull: np.ndarray
    share: np.ndarray


def solve_gains(
    problem: GainProblem, rng: np.random.Generator, each: Each
) -> tuple[list[MarkedCounts], Moments]:
    """Marked counts, in chunks of genes, and their moments at the solution.

    `each` maps over chunks; it may use threads, the result does not depend on it.
    """
    num_genes = problem.counts.shape[1]

    def reveal(genes: np.ndarray, rng: np.random.Generator) -> MarkedCounts:
        return reveal_marks(
            problem.counts,
            genes,
            lambda columns: problem.programs[:, columns].T @ problem.weights.T,
            problem.shape,
            problem.amplitude,
            low,
            high,
            rng,
        )

    # no gene needs ten times the molecules of all genes: bounds the work for targets out of reach
    expected = np.maximum(problem.weights.sum(0, dtype=np.float64) @ problem.programs, 1e-300)
    ceiling = 10 * max(problem.library_ratio, 1.0) * problem.library.sum() / expected
    gain, low, high = (np.minimum(x, ceiling) for x in _first_gains(problem))
    parts = np.array_split(np.arange(num_genes), min(num_genes, 1 + problem.counts.nnz // CHUNK_ENTRIES))
    chunks = list(each(reveal, parts, rng.spawn(len(parts))))
    for _ in range(MAX_ROUNDS):
        gain, now, error = _match(chunks, gain, low, high, problem, each)
        short = (error > 0) & (gain >= high) & (high < ceiling)
        over = (error < 0) & (gain <= low) & (low > 0)
        redo = short | over
        if not redo.any():
            break
        low, high = np.where(over, gain / 4, low), np.minimum(np.where(short, gain * 4, high), ceiling)
        chunks = [chunk.select(~redo[chunk.genes]) for chunk in chunks] + [reveal(np.flatnonzero(redo), rng)]
    return chunks, now


def natural_mean(counts: sparse.sparray, library_size: np.ndarray) -> np.ndarray:
    """Means (G,) of log1p(1e4 y / L) of counts (n, G) with library sizes (n,); 0 where these are 0."""
    y = sparse.csc_array(counts)
    gene = np.repeat(np.arange(y.shape[1]), np.diff(y.indptr))
    library = np.maximum(np.asarray(library_size, dtype=np.float64), 1e-9)
    return np.bincount(gene, np.log1p(TARGET_SUM * y.data / library[y.indices]), y.shape[1]) / y.shape[0]


def _first_gains(problem: GainProblem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First guess and range (G,) of the gains: means grow like the counts while these are sparse, like their log later."""
    floor = np.maximum(natural_mean(problem.counts, problem.library), problem.molecule / 2)
    ratios = np.stack([problem.target / floor, np.expm1(problem.target) / np.expm1(floor)])
    guesses = ratios * problem.library_ratio
    gain = np.sqrt(guesses[0] * guesses[1])
    # four standard errors of the number of molecules that come or go, and a little for the library sizes
    molecules = np.asarray(problem.counts.sum(0), dtype=np.float64) * np.maximum(gain, 1) + 4
    width = np.exp(0.05 + 4 * np.sqrt(np.minimum(np.abs(gain - 1) + 0.02, 1) / molecules))
    return gain, guesses.min(0) / width, guesses.max(0) * width


def _match(
    chunks: list[MarkedCounts],
    gain: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    problem: GainProblem,
    each: Each,
) -> tuple[np.ndarray, Moments, np.ndarray]:
    """Gains within [low, high] whose means match as far as they can, their moments, and the errors left (G,)."""
    gain = np.clip(gain, low, high)
    before = len(gain)
    for step in range(MAX_STEPS):
        now = _moments(chunks, gain, problem, each)
        tolerance = np.maximum(TOLERANCE * now.sd / np.sqrt(len(now.library)), problem.molecule)
        error = problem.target - now.mean
        wrong = np.abs(error) > tolerance
        pending = wrong & np.where(error > 0, gain < high, gain > low)
        # what brackets leave open twice cannot be had: the next molecule overshoots
        if not pending.any() or (step > 2 and pending.sum() > before / 2):
            break
        before = pending.sum()
        if step == 0:
            move = np.clip(_coupled_newton(error, now, problem.molecule), -1, 1)
            gain = np.where(wrong, np.clip(gain * np.exp(move), low, high), gain)
            continue
        bounds = (gain, low, high, problem.target, np.maximum(tolerance / 2, 0.6 * problem.molecule))
        scale = _scale(now.library, problem)

        def bracket(chunk, pending=pending, scale=scale, bounds=bounds):
            here = pending[chunk.genes]
            genes = chunk.genes[here]
            return genes, _bracketed_newton(chunk.select(here), scale, *(x[genes] for x in bounds))

        gain = gain.copy()
        for genes, values in each(bracket, chunks):
            gain[genes] = values
    excess = _excess(now.library, problem)
    if abs(excess) > 1e-3:  # means are matched relative to smaller library sizes: go back to these
        gain = np.clip(gain * np.exp(-excess), low, high)
        now = _moments(chunks, gain, problem, each)
    return gain, now, np.where(wrong, error, 0.0)


def _coupled_newton(error: np.ndarray, now: Moments, least: float) -> np.ndarray:
    """Steps (G,) of log gain for errors of the means, with their effect on the library sizes.

    error = slope * step - pull * rise, where rise = sum(share * step) is the common rise of log library sizes.
    """
    slope = np.maximum(now.slope, least)
    own, common = now.share @ (error / slope), now.share @ (now.pull / slope)
    rise = np.clip(own / max(1 - common, 1e-3), -LIBRARY_SLACK, LIBRARY_SLACK)
    return (error + now.pull * rise) / slope


def _bracketed_newton(
    marked: MarkedCounts,
    scale: np.ndarray,
    gain: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    target: np.ndarray,
    tolerance: np.ndarray,
) -> np.ndarray:
    """Gains (B,) at fixed library sizes: Newton steps inside a bracket, which the means, monotone in them, allow."""
    result = gain.copy()
    number = np.arange(len(gain))
    low = np.maximum(low, 1e-12)
    low_known, high_known = np.zeros((2, len(gain)), dtype=bool)
    for _ in range(MAX_STEPS if len(gain) else 0):
        mean, _, slope, _ = _gene_moments(marked, marked.counts(gain), scale)
        error = target - mean
        low, low_known = np.where(error > 0, gain, low), low_known | (error > 0)
        high, high_known = np.where(error < 0, gain, high), high_known | (error < 0)
        newton = gain * np.exp(np.clip(error / np.maximum(slope, tolerance), -1, 1))
        newton = np.clip(newton, low, high)
        seen = ((newton == low) & low_known) | ((newton == high) & high_known)
        wrong = np.abs(error) > tolerance
        gain = np.where(wrong, np.where(seen, np.sqrt(low * high), newton), gain)
        result[number] = gain
        if not wrong.any():
            break
        if wrong.mean() < 0.5:  # go on with those genes alone
            marked, number = marked.select(wrong), number[wrong]
            gain, low, high, low_known, high_known, target, tolerance = (
                x[wrong] for x in (gain, low, high, low_known, high_known, target, tolerance)
            )
    return result


def _moments(chunks: list[MarkedCounts], gain: np.ndarray, problem: GainProblem, each: Each) -> Moments:
    counts = list(each(lambda chunk: chunk.counts(gain[chunk.genes]), chunks))
    num_cells = len(problem.library)
    sums = each(lambda chunk, count: np.bincount(chunk.cell, count, num_cells), chunks, counts)
    library = problem.outside + problem.per_count * sum(sums)
    scale = _scale(library, problem)
    mean, sd, slope, pull, share = np.zeros((5, len(gain)))
    moments = each(lambda chunk, count: _gene_moments(chunk, count, scale), chunks, counts)
    for chunk, count, found in zip(chunks, counts, moments, strict=True):
        g = chunk.genes
        mean[g], sd[g], slope[g], pull[g] = found
        share[g] = chunk.gene_sums(count) / max(library.sum(), 1.0)
    return Moments(counts, library, mean, sd, slope, pull, share)


def _gene_moments(
    marked: MarkedCounts, counts: np.ndarray, scale: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean and sd over cells of v = log1p(x), x counts per ten thousand, slope and pull of the mean; (B,) each.

    d mean / d log gain = E[y (v(y) - v(y - 1))], - d mean / d log library sizes = E[x / (1 + x)].
    """
    y = counts.astype(np.float32)
    per_molecule = scale.astype(np.float32)[marked.cell]
    x = y * per_molecule
    value = np.log1p(x)
    step = y * (value - np.log1p(np.maximum(x - per_molecule, 0)))
    mean, square, slope, pull = (
        marked.gene_sums(v) / len(scale) for v in (value, value * value, step, x / (1 + x))
    )
    return mean, np.sqrt(np.maximum(square - mean * mean, 0)), slope, pull


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
