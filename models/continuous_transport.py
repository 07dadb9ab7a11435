"""Transport of continuous measurements: every feature by its own monotone map, cells kept.

Gaussian marginal transport (the optimal map between two normal distributions is affine): centre, scale, move. Ranks
of the cells within a feature, and so their dependence between features, stay those of the controls.

| symbol | code |
|---|---|
| x, y | old and new values of a feature |
| m', log(s'/s) | `target_mean`, `sd_log_ratio` |
"""

import numpy as np

# as in `marked_counts`: beyond it a control cell's own level says nothing about the induced one
MAX_FOLD = 3.0


def transport_continuous(x: np.ndarray, target_mean: np.ndarray, sd_log_ratio: np.ndarray) -> np.ndarray:
    """Cells x (n, G), units of the data, moved to means `target_mean` (G,): y = m' + (x - mean x) s'/s.

    The sample mean of y *is* the target, to rounding; `sd_log_ratio` (G,) is log of new over old standard deviation.
    Returns x itself, bit for bit, where neither changes. Keeps a floating dtype of x.

    Raises:
        ValueError: no cells, or shapes that do not match.
    """
    x, target_mean = _checked(x, target_mean)
    ratio = np.broadcast_to(np.exp(np.asarray(sd_log_ratio, dtype=np.float64)), target_mean.shape)
    mean = x.mean(0, dtype=np.float64)
    # x plus a correction, not the formula as it stands: no rounding where nothing moves
    y = x + ((x - mean) * (ratio - 1) + (target_mean - mean))
    return y.astype(x.dtype)


def transport_nonnegative(x: np.ndarray, target_mean: np.ndarray) -> np.ndarray:
    """Cells x (n, G) >= 0 with zeros of their own (log1p expression), moved to means `target_mean` (G,), zeros kept.

    y = f x with f = m' / mean x, at most MAX_FOLD; what is then missing to the mean is added to all cells. An added
    shift would turn every zero into a small positive number, and every gene into a differentially expressed one.
    Spread follows the mean. Targets below 0 are read as 0. Keeps a floating dtype of x.

    Raises:
        ValueError: no cells, shapes that do not match, or negative values.
    """
    x, target_mean = _checked(x, target_mean)
    if (x < 0).any():
        raise ValueError(f"x must not be negative, its minimum is {x.min():g}; use transport_continuous")
    target_mean = np.maximum(target_mean, 0.0)
    mean = x.mean(0, dtype=np.float64)
    fold = np.minimum(
        np.divide(target_mean, mean, out=np.full(len(mean), MAX_FOLD), where=mean > 0), MAX_FOLD
    )
    missing = np.where(fold < MAX_FOLD, 0.0, target_mean - fold * mean)
    return (x * fold + missing).astype(x.dtype)


def _checked(x: np.ndarray, target_mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, target_mean = np.asarray(x), np.asarray(target_mean, dtype=np.float64)
    if not np.issubdtype(x.dtype, np.floating):
        x = x.astype(np.float64)
    if x.ndim != 2 or not len(x) or target_mean.shape != x.shape[1:]:
        raise ValueError(
            f"x must be cells (n, G), n > 0, and target_mean (G,); got {x.shape} and {target_mean.shape}"
        )
    return x, target_mean
