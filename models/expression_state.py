"""What its counts say about a cell's rates: size factor x low-rank state x one gamma factor per gene.

Generative process, for counts y of cell i and gene g, library size L_i, K expression programs:

    w_ik ~ Gamma(a, a / (L_i s_k))        molecules of program k in the cell, around the share s_k of the population
    e_ig ~ Gamma(r_g, r_g)                what the programs leave: one factor of mean 1 per cell and gene
    y_ig ~ Poisson(e_ig mu_ig),           mu_ig = sum_k w_ik h_kg

Given y, weights and factors are gamma variables again, so that rates can be *drawn*: a posterior mean would shrink
the spread between cells. Fitted by the multiplicative updates of Poisson factorisation (Cemgil 2009, Computational
Intelligence and Neuroscience 785152; Gopalan, Hofman and Blei 2015, UAI).

| symbol | code | |
|---|---|---|
| w | `weight_shape`, `weight_rate` | posterior of w: Gamma(shape, rate), (n, K) |
| h | `programs` | expected counts per unit of weight, (K, G), positive everywhere |
| r | `shape` | (G,), large: no spread beyond the programs |
"""

from dataclasses import dataclass, replace

import numpy as np
from scipy import sparse

WEIGHT_PRIOR = 2.0  # a: weights of a program vary between cells by 70 % before the counts are seen
PROFILE_PRIOR = (
    50.0  # pseudo-molecules of the mean profile in each program: keeps programs of few cells near it
)
SPREAD_PRIOR = (
    0.25  # 1/r where the counts cannot tell, and its standard deviation: induced genes have r of 2 to 20
)
SPREAD_RANGE = (1e-4, 2.0)  # r above 1/2: below it a few stray cells would carry the whole gene
MAX_PROGRAMS = 5
CELLS_PER_PROGRAM = 100
NUM_STEPS = 20  # of the programs: held-out likelihoods change by less than 5e-3 per molecule after that
WEIGHT_STEPS = 6  # of the weights, with programs fixed
NUM_CELLS = 2000  # enough for the programs; the weights of further cells are found with programs fixed


@dataclass(frozen=True, eq=False)
class ExpressionState:
    """Posterior of the rates of n cells, see the table of the module. All rates are expected counts of the cell."""

    weight_shape: np.ndarray
    weight_rate: np.ndarray
    programs: np.ndarray
    shape: np.ndarray

    def select(self, rows: np.ndarray) -> "ExpressionState":
        """The state of the cells `rows` (m,), repeats allowed."""
        return replace(self, weight_shape=self.weight_shape[rows], weight_rate=self.weight_rate[rows])

    def draw_weights(self, rng: np.random.Generator) -> np.ndarray:
        """Posterior draws of the weights w, (n, K): one draw of the cells' states, joint over all genes."""
        return rng.gamma(self.weight_shape) / self.weight_rate


def fit_expression_state(counts: sparse.csr_array, library_size: np.ndarray) -> ExpressionState:
    """Fit the programs, the cells' weights and the gamma shapes to counts (n, G) with library sizes (n,).

    One program for each 100 cells, one to five; beyond 2,000 cells programs and shapes are those of evenly spaced
    ones. Deterministic, and up to 2,000 cells the same whatever their order. The rates keep each gene's mean, but for
    half a molecule in the whole sample that is added to it, so that no gene is out of reach.
    """
    y = sparse.csr_array(counts, dtype=np.float64)
    library = np.maximum(np.asarray(library_size, dtype=np.float64), 1e-12)
    profile = (np.asarray(y.sum(0)).ravel() + 0.5) / library.sum()
    fitted = np.unique(np.linspace(0, len(library) - 1, min(NUM_CELLS, len(library))).astype(np.int64))
    num_programs = int(np.clip(len(fitted) // CELLS_PER_PROGRAM, 1, MAX_PROGRAMS))
    if num_programs == 1:
        programs = profile[None]
        share = np.ones(1)
    else:
        programs, share = _fit_programs(y[fitted], library[fitted], profile, num_programs)
    shape, rate = _weights(y, library, programs, share)
    # what the priors pull away from the margins is given back: the rates keep each gene's mean
    programs = programs * (profile * library.sum() / ((shape / rate).sum(0) @ programs))
    return ExpressionState(
        shape, rate, programs, _gamma_shape(y[fitted], shape[fitted] / rate[fitted], programs)
    )


def _fit_programs(
    y: sparse.csr_array, library: np.ndarray, profile: np.ndarray, num_programs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Programs (K, G) and their shares (K,), by expectation-maximisation from principal components."""
    scores = _principal_scores(y, library, num_programs - 1)
    start = np.exp(np.column_stack([np.zeros(len(library)), scores]))
    weight = library[:, None] * start / start.sum(1, keepdims=True)
    prior = PROFILE_PRIOR * profile / profile.sum()
    programs = (y.T @ (weight / library[:, None])).T + prior
    programs *= profile.sum() / programs.sum(1, keepdims=True)
    for _ in range(NUM_STEPS):
        ratio = _over_mean(y, weight, programs)
        share = weight.sum(0) / weight.sum()
        shape, rate = _update(ratio, library, weight, programs, share)
        programs = (programs * (ratio.T @ weight).T + prior) / (
            weight.sum(0)[:, None] + prior.sum() / profile.sum()
        )
        weight = shape / rate
    return programs, weight.sum(0) / weight.sum()


def _principal_scores(y: sparse.csr_array, library: np.ndarray, number: int) -> np.ndarray:
    """Standardised scores (n, number) of the leading principal components of sqrt(y / L), by orthogonal iteration.

    A start for the programs needs directions, not converged eigenvectors. The first guess is a fixed one, so that
    the result is a function of the cells, whatever their order.
    """
    root = sparse.csr_array(
        (np.sqrt(y.data / np.repeat(library, np.diff(y.indptr))), y.indices, y.indptr), y.shape
    )
    mean = np.asarray(root.mean(0))
    axes = np.random.default_rng(0).standard_normal((y.shape[1], number))
    for _ in range(10):
        axes = np.linalg.qr(axes)[0]
        scores = root @ axes - mean @ axes
        axes = root.T @ scores - mean[:, None] * scores.sum(0)
    scores = scores * np.where(axes.sum(0) < 0, -1, 1)
    return scores / np.maximum(scores.std(0), 1e-12)


def _weights(
    y: sparse.csr_array, library: np.ndarray, programs: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior gamma shape and rate (n, K) of all cells' weights with the programs fixed."""
    if len(programs) == 1:  # the size factor alone; nothing is uncertain about it
        return np.full((len(library), 1), 1e8), 1e8 / library[:, None]
    parts = []
    for first in range(0, len(library), NUM_CELLS):  # what stays near the processor
        rows = slice(first, first + NUM_CELLS)
        weight = library[rows, None] * share
        for _ in range(WEIGHT_STEPS):
            shape, rate = _update(
                _over_mean(y[rows], weight, programs), library[rows], weight, programs, share
            )
            weight = shape / rate
        parts.append((shape, rate))
    shape, rate = (np.concatenate(x) for x in zip(*parts, strict=True))
    return shape, rate


def _over_mean(y: sparse.csr_array, weight: np.ndarray, programs: np.ndarray) -> sparse.csr_array:
    """y / mu at the non-zero counts."""
    profiles = np.ascontiguousarray(programs.T, dtype=np.float32)
    of_entries = np.repeat(weight.astype(np.float32), np.diff(y.indptr), axis=0)
    mean = np.einsum("ek,ek->e", of_entries, profiles[y.indices])
    return sparse.csr_array((y.data / mean, y.indices, y.indptr), shape=y.shape)


def _update(
    ratio: sparse.csr_array, library: np.ndarray, weight: np.ndarray, programs: np.ndarray, share: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Posterior shape and rate (n, K) of the weights given the molecules' current attribution to programs."""
    shape = WEIGHT_PRIOR + weight * (ratio @ programs.T)
    rate = WEIGHT_PRIOR / (library[:, None] * share) + programs.sum(1)
    return shape, rate


def _gamma_shape(y: sparse.csr_array, weight: np.ndarray, programs: np.ndarray) -> np.ndarray:
    """Gamma shapes (G,) by moments, Var y = mu + mu^2 / r, with mu = weight @ programs.

    1/r is averaged with its prior, each by its precision; the sampling variance is that of Poisson counts.
    """
    mean = weight.sum(0) @ programs
    square = np.einsum("kg,kl,lg->g", programs, weight.T @ weight, programs)  # sum of mu^2 over cells
    product = ((y.T @ weight) * programs.T).sum(1)
    residual = np.asarray(y.power(2).sum(0)) - 2 * product + square
    estimate = (residual - mean) / square
    precision = np.square(square) / (2 * square + mean)
    prior = 1 / np.square(SPREAD_PRIOR)
    spread = (estimate * precision + SPREAD_PRIOR * prior) / (precision + prior)
    return 1 / np.clip(spread, *SPREAD_RANGE)
