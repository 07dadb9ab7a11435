"""The best law of a new batch that anybody could have: the simulator's own, given the controls that were seen.

The oracle knows the `World` and nothing of the batch but its controls. Cells are counts, so the mean of a population
on the log1p-CP10k scale is no linear function of its log rates. Two approximations, both tested, take the place of
the integrals without a closed form:

- `mean_curves`: the first two moments of a cell's log1p-CP10k value of gene g are functions of the log share of the
  gene and of the log library size alone. Over counts they are sums, over overdispersion, cell state and library sizes
  quasi-Monte Carlo; the overdispersion of the other genes enters through their total.
- `condition`: the observed control means are Gaussian around these curves (central limit theorem), which are linearised
  at the posterior mean again and again (iterated extended Kalman filter, Bell and Cathey 1993, IEEE Trans. Autom.
  Control 38). What is left is linear and Gaussian: u given all genes, eps given u, gene by gene. Noise that genes share
  through the cell state (1 / n of a small variance) is left out.

What controls do not tell (d, eps', u if they are blind) is drawn from its prior.
"""

from typing import NamedTuple

import jax
import numpy as np
from scipy.ndimage import map_coordinates
from scipy.special import logsumexp, ndtri
from scipy.stats import gamma, poisson, qmc

from hilbertcell.models.simulator import (
    MODES,
    Environments,
    SimulatorSettings,
    World,
    draw_environments,
    populations,
)

_STEP = 0.125  # of the log share: an error of interpolation of 0.001 on the log1p scale
_LIBRARY = np.arange(
    -1.0, 1.01, 0.2
)  # log library sizes around their median that batches and responses reach
_MARGIN = 1.5  # log rates that a batch may leave the range of the world's populations by
_POINTS = 256  # of quasi-Monte Carlo over the cells of one population
_ITERATIONS = 10
_MIN_SLOPE = 1e-4  # of a curve: below, a gene is not expressed and its mean says nothing of its rate
_COUNT = np.arange(6000)
_LOG_RATE = np.arange(-16.0, 8.2, 0.1)
_LOG_REST = np.arange(2.0, 10.0, 0.1)


class MeanCurves(NamedTuple):
    """Mean and variance of a cell's log1p-CP10k value over grids of log library size (L,) and log share (N,)."""

    log_library: np.ndarray  # (L,)
    first_share: np.ndarray  # (G,) log share of the first grid point of each gene, then steps of 1/8
    mean: np.ndarray  # (G, L, N)
    variance: np.ndarray  # (G, L, N)


def mean_curves(settings: SimulatorSettings, world: World, rng: np.random.Generator) -> MeanCurves:
    """Tabulate the curves of every gene over the shares that populations of `world` can have."""
    world = World(*(np.asarray(leaf, np.float64) for leaf in world))
    typical = world.baseline[:, None] + world.effect + world.interaction
    share = typical - logsumexp(typical, axis=-1, keepdims=True)  # (C, T, G)
    low, high = share.min((0, 1)) - _MARGIN, share.max((0, 1)) + _MARGIN
    offset = _STEP * np.arange(int(np.ceil((high - low).max() / _STEP)) + 1)

    uniform = qmc.Sobol(settings.num_states + 2, rng=rng).random(_POINTS)
    state = ndtri(uniform[:, 2:]) @ world.state  # (points, G)
    log_reference = logsumexp(world.baseline, axis=0) - logsumexp(world.baseline)
    state -= logsumexp(log_reference + state, axis=1, keepdims=True)
    shape = 1 / world.dispersion
    reference = np.exp(log_reference + state)
    others = rng.gamma(shape, 1 / shape, state.shape) * reference
    total = others.sum(1, keepdims=True)
    rest = (total - others) / (1 - reference)  # total of the other genes per cell, 1 on average
    library = np.log(settings.library_size) + _LIBRARY
    cell_library = library[:, None] + settings.library_scale * ndtri(uniform[:, 0])  # (L, points)

    tables = _count_moments()
    moments = np.empty((2, len(low), len(library), len(offset)))
    for g in range(len(low)):
        multiplier = gamma.ppf(uniform[:, 1], shape[g], scale=1 / shape[g])
        log_share = np.minimum(low[g] + offset[:, None] + state[:, g], -1e-6)  # (N, points)
        log_rate = cell_library[:, None] + log_share + np.log(np.maximum(multiplier, 1e-300))
        log_rest = cell_library[:, None] + np.log1p(-np.exp(log_share)) + np.log(rest[:, g])
        where = [(log_rate - _LOG_RATE[0]) / 0.1, (log_rest - _LOG_REST[0]) / 0.1]
        for moment, table in zip(moments, tables, strict=True):
            moment[g] = map_coordinates(table, where, order=1, mode="nearest").mean(-1)
    return MeanCurves(library, low, moments[0], moments[1] - moments[0] ** 2)


def _count_moments() -> tuple[np.ndarray, np.ndarray]:
    """First and second moment of log1p(1e4 y / (y + rest)), y Poisson, over grids of log rate and log rest."""
    value = np.log1p(1e4 * _COUNT[:, None] / np.maximum(_COUNT[:, None] + np.exp(_LOG_REST), 1.0))
    weight = poisson.pmf(_COUNT, np.exp(_LOG_RATE)[:, None])
    return weight @ value, weight @ value**2


def read_curves(curves: MeanCurves, log_share: np.ndarray, log_library: np.ndarray) -> tuple[np.ndarray, ...]:
    """Mean, variance and slope of the mean in the log share, each (..., G), at log_share (..., G), log_library (...).

    Outside the grid the curves stay at their last value.
    """
    column = np.clip((log_share - curves.first_share) / _STEP, 0, curves.mean.shape[2] - 1.001)
    step = curves.log_library[1] - curves.log_library[0]
    row = np.clip((log_library - curves.log_library[0]) / step, 0, len(curves.log_library) - 1.001)[..., None]
    j, i = column.astype(int), row.astype(int)
    right, down = column - j, row - i
    gene = np.arange(curves.mean.shape[0])

    def at(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        left_value = (1 - down) * table[gene, i, j] + down * table[gene, i + 1, j]
        right_value = (1 - down) * table[gene, i, j + 1] + down * table[gene, i + 1, j + 1]
        return left_value + right * (right_value - left_value), (right_value - left_value) / _STEP

    mean, slope = at(curves.mean)
    return mean, at(curves.variance)[0], slope


def condition(
    settings: SimulatorSettings,
    world: World,
    curves: MeanCurves,
    control_mean: np.ndarray,
    num_cells: np.ndarray,
    log_library: float,
    num_draws: int,
    seed: int,
) -> Environments:
    """Draws of one batch's latents given its controls, as the environments of `num_draws` batches.

    Args:
        settings, world, curves: the truth.
        control_mean: (C, G) observed control means, log1p CP10k; anything where num_cells is 0.
        num_cells: (C,) cells behind each.
        log_library: mean log library size of the batch (`log_library_of`), nan if unknown: it is then drawn.
        num_draws: S.
        seed: same seed, same draws, and common random numbers for batches that differ in their controls.
    """
    rng = np.random.default_rng(seed)
    prior = jax.device_get(draw_environments(jax.random.key(seed), settings, num_draws))
    depth = np.asarray(prior.depth, np.float64)
    if np.isfinite(log_library):
        depth = np.full(num_draws, log_library - np.log(settings.library_size))
    center = np.log(settings.library_size) + depth.mean()
    seen = np.asarray(num_cells) > 0
    loading = np.moveaxis(np.asarray(world.loading, np.float64)[seen], 1, 2)  # (C, G, K)
    baseline = np.asarray(world.baseline, np.float64)[seen]
    scale = settings.control_residual_scale**2
    u, eps = np.zeros(settings.num_factors), np.zeros(baseline.shape)
    for _ in range(_ITERATIONS):
        logits = baseline + loading @ u + eps
        log_share = logits - logsumexp(logits, axis=1, keepdims=True)
        mean, variance, slope = read_curves(curves, log_share, np.full(len(baseline), center))
        slope = np.maximum(slope, _MIN_SLOPE)
        noise = variance / np.asarray(num_cells)[seen, None] / slope**2
        # a common shift of all rates changes no share
        local = loading - np.einsum("cg,cgk->ck", np.exp(log_share), loading)[:, None]
        residual = (control_mean[seen] - mean) / slope + local @ u + eps
        weight = 1 / (scale + noise)
        precision = np.einsum("cg,cgk,cgl->kl", weight, local, local)
        linear = np.einsum("cg,cgk,cg->k", weight, local, residual)
        probability, means, covariances = _posterior(settings, precision, linear)
        u = probability @ means
        eps = scale * weight * (residual - local @ u)
    mode = rng.choice(len(probability), num_draws, p=probability)
    root = np.linalg.cholesky(covariances)
    white = rng.standard_normal((num_draws, len(u)))
    draws_u = means[mode] + np.einsum("skl,sl->sk", root[mode], white)
    draws_eps = np.array(
        prior.control_residual, np.float64
    )  # (S, C, G): contexts without controls keep their prior
    # a draw of the prior moved by the gain is a draw of the posterior (Matheron's rule)
    pseudo = draws_eps[:, seen] + np.sqrt(noise) * rng.standard_normal((num_draws, *noise.shape))
    target = residual - np.einsum("cgk,sk->scg", local, draws_u)
    draws_eps[:, seen] += scale * weight * (target - pseudo)
    return prior._replace(
        microenvironment=draws_u.astype(np.float32),
        control_residual=draws_eps.astype(np.float32),
        depth=depth.astype(np.float32),
    )


def _posterior(
    settings: SimulatorSettings, precision: np.ndarray, linear: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mixture weights (M,), means (M, K) and covariances (M, K, K) of u given a Gaussian likelihood."""
    num_factors = len(linear)
    centers, widths = np.zeros((1, num_factors)), np.ones((1, num_factors))
    if settings.bimodal_environment:
        centers, widths = np.zeros((2, num_factors)), np.ones((2, num_factors))
        centers[:, 0], widths[:, 0] = MODES, np.sqrt(1 - MODES[1] ** 2)
    means, covariances, logs = [], [], []
    for center, width in zip(centers, widths, strict=True):
        covariance = np.linalg.inv(precision + np.diag(width**-2))
        mean = covariance @ (linear + center / width**2)
        means.append(mean)
        covariances.append(covariance)
        logs.append(
            0.5 * np.linalg.slogdet(covariance)[1]
            - np.log(width).sum()
            + 0.5 * (mean @ (linear + center / width**2) - np.sum((center / width) ** 2))
        )
    return np.exp(logs - logsumexp(logs)), np.array(means), np.array(covariances)


def log_library_of(settings: SimulatorSettings, library_size: np.ndarray) -> float:
    """Mean log library size of a batch from the totals of its control cells, nan without cells.

    A cell's total counts have mean exp(log library size): the log of their mean, less what a log normal law adds.
    """
    if not len(library_size):
        return float("nan")
    return float(np.log(np.mean(library_size)) - settings.library_scale**2 / 2)


def predicted_means(
    settings: SimulatorSettings,
    world: World,
    curves: MeanCurves,
    environments: Environments,
    context: str,
    perturbation: str,
    dose: float = np.nan,
) -> np.ndarray:
    """Latent means (S, G), log1p CP10k, of one population in each of S batches."""
    num_draws = len(environments.depth)
    c, t = settings.contexts.index(context), settings.labels.index(perturbation)
    codes = np.full(num_draws, c), np.full(num_draws, t), np.arange(num_draws)
    doses = None if np.isnan(dose) else np.full(num_draws, dose, np.float32)
    rates = jax.device_get(populations(settings, world, environments, *codes, doses))
    mean = np.zeros(rates.control.shape)
    for logits, library, share in (
        (rates.control, rates.log_library, 1 - rates.fraction),
        (rates.control + rates.shift, rates.log_library + rates.library_response, rates.fraction),
    ):
        log_share = logits - logsumexp(np.asarray(logits, np.float64), axis=1, keepdims=True)
        mean += share[:, None] * read_curves(curves, log_share, library)[0]
    return mean
