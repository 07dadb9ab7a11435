"""Intervals widened until they cover batches like those seen: hierarchical split-conformal prediction.

A Bayesian interval is as honest as its model; a conformal one is honest for any model, if the next batch is
exchangeable with the calibration batches. It is reported beside the former and never replaces it: the factor says how
far the model was from its own claim.
"""

from collections.abc import Sequence

import numpy as np

LEVEL = 80  # per cent; 90 % needs nine calibration batches, more than most screens have


def residual(lower: np.ndarray, upper: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Distance of the truth from the centre of its interval in half widths, any shape: covered where it is <= 1."""
    center, half = (lower + upper) / 2, (upper - lower) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(truth == center, 0.0, np.abs(truth - center) / half)


def widening(batches: Sequence[np.ndarray], level: float = LEVEL) -> float:
    """The factor on the half widths of the intervals of a new batch, from the residuals of calibration batches.

    Each of the B batches has mass 1 / (B + 1), spread evenly over its own residuals (any number, missing ones left
    out), and 1 / (B + 1) lies at infinity, where the new batch may be; the factor is the quantile of `level` per cent.
    A random member of an exchangeable new batch is then covered with at least that probability. Infinite where
    level / 100 > B / (B + 1): so few batches promise nothing at that level. Below 1 the intervals were too wide.

    Lee, Barber and Willett (2023), "Distribution-free inference with hierarchical data", section 3; Dunn, Wasserman and
    Ramdas (2023), J. Am. Stat. Assoc. 118. Units: none.
    """
    known = [values[np.isfinite(values) | np.isposinf(values)].ravel() for values in batches]
    known = [values for values in known if values.size]
    if not known:
        return float("inf")
    values = np.concatenate(known)
    mass = np.concatenate([np.full(part.size, 1 / part.size) for part in known]) / (len(known) + 1)
    order = np.argsort(values)
    # rounding of the sum of masses must not push a level that is just reached to infinity
    reached = np.flatnonzero(np.cumsum(mass[order]) >= level / 100 - 1e-9)
    return float(values[order][reached[0]]) if reached.size else float("inf")


def conformal_summary(
    residuals: np.ndarray, width: np.ndarray, batch: np.ndarray, level: float = LEVEL
) -> dict[str, float]:
    """What widening does to each batch when the others calibrate it: mean over batches of factor, cover and width.

    `residuals` (T, G), mean interval width `width` (T,) and the batch (T,) of each target. Each batch's factor comes
    from the other batches only, but their predictions were made by fits that saw this one (leave-one-batch-out folds), so
    that the guarantee is that of the jackknife: nominal in practice, not in the worst case. A factor that is infinite
    (fewer batches than the level needs, or many intervals of no width) makes everything nan.
    """
    names = np.unique(batch)
    rows = []
    for name in names:
        own = batch == name
        factor = widening([residuals[batch == other] for other in names if other != name], level)
        values = residuals[own]
        values = values[~np.isnan(values)]
        if not np.isfinite(factor):
            return {"level": level, "factor": np.nan, "cover": np.nan, "width": np.nan}
        rows.append((factor, np.mean(values <= factor), factor * np.nanmean(width[own])))
    factor, cover, wide = np.mean(rows, axis=0)
    return {"level": level, "factor": float(factor), "cover": float(cover), "width": float(wide)}
