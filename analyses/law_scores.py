"""Scores of a law: draws of population means against held-out populations (mathematics, section 6).

Everywhere `draws` are draws of *latent* means, without sampling noise, on the scale of the data; `truth` is the
observed mean of the held-out population, whose sampling variance is `noise_variance` = C / n of its own cells.
The truth's noise is either added to the draws (`add_noise`; CRPS, PIT, intervals, energy and variogram scores)
or subtracted from squared errors (`excess_squared_error`). The controls' noise is never subtracted: prediction
and response share it, so taking it off would reward wrong slopes.

Sample scores are in their fair form (Ferro 2014, Q. J. R. Meteorol. Soc. 140): unbiased for the score of the law
from which the draws come, whatever the number of draws.
"""

from typing import Any

import numpy as np
from scipy.spatial.distance import cdist, pdist

from hilbertcell.analyses import conformal

LEVELS = (50, 80, 90, 95)  # central intervals reported everywhere, in per cent


def add_noise(draws: np.ndarray, noise_variance: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws of what would be observed: latent draws (S, ...) plus the truth's own noise N(0, noise_variance).

    `noise_variance` (...) is the variance of the observed mean, C / n, in squared units of the draws.
    """
    return draws + np.sqrt(noise_variance) * rng.standard_normal(draws.shape)


def excess_squared_error(prediction: np.ndarray, truth: np.ndarray, noise_variance: np.ndarray) -> np.ndarray:
    """Squared error less the truth's own noise: unbiased for the squared error against the latent mean.

    All arrays broadcast; squared units of the data. Single values may be negative: average, do not clip.
    """
    return (prediction - truth) ** 2 - noise_variance


def crps_sample(draws: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Continuous ranked probability score E|X - y| - E|X - X'| / 2 from draws (S, ...) and truth (...), fair form.

    Gneiting and Raftery (2007), J. Am. Stat. Assoc. 102, eq. 21; units of the data; needs S >= 2. `draws` must hold
    the truth's noise already (`add_noise`).
    """
    num_draws = _num_draws(draws)
    ordered = np.sort(draws, axis=0)
    weights = 2.0 * np.arange(1, num_draws + 1) - num_draws - 1  # sum_i<j (x_j - x_i) = sum_i weight_i x_(i)
    spread = np.tensordot(weights, ordered, axes=1) / (num_draws * (num_draws - 1))
    return np.abs(ordered - truth).mean(0) - spread


def energy_score(draws: np.ndarray, truth: np.ndarray) -> float:
    """Energy score E||X - y|| - E||X - X'|| / 2 of draws (S, D) for truth (D,): unsquared Euclidean norm, fair form.

    Gneiting and Raftery (2007), eq. 22 with exponent 1. `draws` must hold the truth's noise already.
    """
    _num_draws(draws)
    return float(cdist(draws, truth[None]).mean() - pdist(draws).mean() / 2)


def variogram_score(draws: np.ndarray, truth: np.ndarray, power: float = 0.5) -> float:
    """Variogram score, sum over ordered pairs of dimensions, of draws (S, D) for truth (D,); fair form.

    Scheuerer and Hamill (2015), Mon. Wea. Rev. 143, eq. 15 with unit weights: sensitive to wrong correlations where
    the energy score is not. `draws` must hold the truth's noise already. Memory: S x D per dimension, not S x D x D.
    """
    num_draws = _num_draws(draws)
    score = 0.0
    for i in range(draws.shape[1] - 1):
        variogram = np.abs(draws[:, i + 1 :] - draws[:, i : i + 1]) ** power
        observed = np.abs(truth[i + 1 :] - truth[i]) ** power
        # the mean of S draws has variance s^2 / S, which would otherwise count as error
        score += np.sum((variogram.mean(0) - observed) ** 2 - variogram.var(0, ddof=1) / num_draws)
    return float(2 * score)


def interval(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end (...) of the central interval of `level` per cent of draws (S, ...).

    Weibull quantiles k / (S + 1): an interval between order statistics then covers a further draw with exactly its
    nominal probability, however few the draws.
    """
    tail = (1 - level / 100) / 2
    lower, upper = np.quantile(draws, [tail, 1 - tail], axis=0, method="weibull")
    return lower, upper


def pit(draws: np.ndarray, truth: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Randomised probability integral transform of truth (...) among draws (S, ...): uniform on (0, 1) if calibrated.

    Ties share their mass at random (Czado, Gneiting and Held 2009, Biometrics 65).
    """
    below = (draws < truth).sum(0)
    ties = (draws == truth).sum(0)
    return (below + rng.random(below.shape) * (ties + 1)) / (draws.shape[0] + 1)


def score_law(
    draws: np.ndarray, truth_mean: np.ndarray, truth_noise_variance: np.ndarray, rng: np.random.Generator
) -> dict[str, np.ndarray]:
    """All scalar scores of draws (S, T, G) of latent means for truth (T, G) with noise variance C / n (T, G).

    Returns arrays (T, G): `excess` (squared error of the mean of the draws, less the truth's noise and less the
    Monte Carlo variance of that mean, so that it does not depend on S), `crps`, `pit`, and for each level
    `covered_90` (0/1) and `width_90` of the noisy draws; `residual`, the truth's distance from the centre of the 80 %
    interval in half widths, is what conformal widening calibrates. Entries whose truth, noise or draws are missing are
    nan.
    """
    if draws.shape[1:] != truth_mean.shape or truth_mean.shape != truth_noise_variance.shape:
        raise ValueError(
            f"score_law got draws {draws.shape}, truth {truth_mean.shape}, noise variance "
            f"{truth_noise_variance.shape}; expected (S, T, G), (T, G), (T, G)"
        )
    num_draws = _num_draws(draws)
    names = [
        "excess",
        "crps",
        "pit",
        "residual",
        *(f"{kind}_{level}" for level in LEVELS for kind in ("covered", "width")),
    ]
    scores: dict[str, np.ndarray] = {name: np.full(truth_mean.shape, np.nan) for name in names}
    for t, (truth, noise) in enumerate(zip(truth_mean, truth_noise_variance, strict=True)):
        # one target at a time bounds the memory
        latent = np.asarray(draws[:, t], dtype=np.float64)
        known = np.isfinite(truth) & np.isfinite(noise) & np.isfinite(latent).all(0)
        latent, truth, noise = latent[:, known], truth[known], noise[known]
        observable = add_noise(latent, noise, rng)
        row: dict[str, Any] = {
            "excess": excess_squared_error(latent.mean(0), truth, noise) - latent.var(0, ddof=1) / num_draws,
            "crps": crps_sample(observable, truth),
            "pit": pit(observable, truth, rng),
        }
        for level in LEVELS:
            lower, upper = interval(observable, level)
            row[f"covered_{level}"] = (lower <= truth) & (truth <= upper)
            row[f"width_{level}"] = upper - lower
            if level == conformal.LEVEL:
                row["residual"] = conformal.residual(lower, upper, truth)
        for name, values in row.items():
            scores[name][t, known] = values
    return scores


def _num_draws(draws: np.ndarray) -> int:
    if draws.shape[0] < 2:
        raise ValueError(f"a law is scored on at least 2 draws, got {draws.shape[0]}: a point has no spread")
    return draws.shape[0]
