"""Point metrics: how near one predicted population is to the held-out one.

Effects on both sides are taken against the same real controls, which must not be the cells that were transported.
Nothing is corrected for sampling noise here, so compare predictors only with equal numbers of cells; what does
correct for it are the scores of `law_scores`.
"""

import numpy as np

BLOCK = 1024  # rows of a distance block: 8 MB at a time, whatever the number of cells


def pearson_delta(prediction: np.ndarray, truth: np.ndarray, control: np.ndarray) -> float:
    """Pearson correlation over genes of the shifts prediction - control and truth - control; all means (G,).

    nan when one of the shifts is constant over genes (no change, for one). As in cell-eval, `pearson_delta`.
    """
    predicted, true = prediction - control, truth - control
    predicted, true = predicted - predicted.mean(), true - true.mean()
    norms = np.linalg.norm(predicted) * np.linalg.norm(true)
    return float(predicted @ true / norms) if norms > 0 else float("nan")


def mae_delta(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute error over genes of the shift; the common control cancels. Means (G,), units of the data."""
    return float(np.abs(prediction - truth).mean())


def mse_delta(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Mean squared error over genes of the shift; the common control cancels. Means (G,), squared units."""
    return float(np.square(prediction - truth).mean())


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of cells x (n, G), y (m, G): Euclidean, unsquared norm.

    Szekely and Rizzo (2013), J. Stat. Plan. Inference 143. The two inner means leave out a cell's distance to itself, so
    that two samples of one population score 0 on average, whatever their sizes. Distances are taken in blocks:
    memory does not grow with the number of cells. Raises: ValueError with fewer than two cells on a side.
    """
    if min(len(x), len(y)) < 2:
        raise ValueError(f"energy_distance needs two cells or more on each side, got {len(x)} and {len(y)}")
    # |a - b|^2 from inner products loses digits unless the cells lie about the origin
    center = (x.mean(0) + y.mean(0)) / 2
    x, y = x - center, y - center
    n, m = len(x), len(y)
    return 2 * _sum_of_distances(x, y) / (n * m) - sum(
        _sum_of_distances(z, z) / (len(z) * (len(z) - 1)) for z in (x, y)
    )


def within_variance_ratio(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Variance between the cells of prediction (n, G) over that of truth (m, G), both unbiased and summed over genes.

    Below 1: the predicted population is too narrow, a mean with little around it.
    """
    return float(prediction.var(0, ddof=1).sum() / truth.var(0, ddof=1).sum())


def _sum_of_distances(x: np.ndarray, y: np.ndarray) -> float:
    total = 0.0
    y_squared = np.square(y).sum(1)
    for start in range(0, len(x), BLOCK):
        rows = x[start : start + BLOCK]
        squared = np.square(rows).sum(1)[:, None] + y_squared - 2 * rows @ y.T
        if y is x:  # a cell and itself: exactly 0, not the root of a rounding error
            squared[np.arange(len(rows)), start + np.arange(len(rows))] = 0.0
        total += float(np.sqrt(np.maximum(squared, 0.0)).sum())
    return total
