"""Do predictive laws keep their promise: PIT, coverage by level and by batch, with bands that know the dependence.

Genes of one population, and populations of one batch, err together, so bands for independent values would cry wolf.
The draws know the dependence: each is a whole data set that the program might have produced. Every draw is put in the
place of the measured values and ranked among the other draws; where 95 % of the curves so made run throughout is the
band. Its form is that of sup-t bands (Montiel Olea & Plagborg-Moller 2019): so many standard deviations at every
point, how many read off the curves themselves.
"""

from typing import NamedTuple

import numpy as np
import xarray as xr

LEVELS = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95])
BAND = 0.95  # probability that the whole curve of a right law lies in its band
_GRID = np.linspace(0.02, 0.98, 49)


class Checks(NamedTuple):
    """Measured summaries (N,) of training populations and draws (S, N) of what was predicted for them."""

    observed: np.ndarray
    drawn: np.ndarray
    batch: np.ndarray | None  # (N,) names, or None where the draws do not say


class Curve(NamedTuple):
    """A statistic at `x` (Q,) and its simultaneous band under a right law."""

    x: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray

    @property
    def inside(self) -> bool:
        """Whether the whole curve lies in its band."""
        return bool(((self.low <= self.value) & (self.value <= self.high)).all())


def checks_of(draws: xr.DataTree) -> Checks:
    """The one-dimensional summaries that draws carry; those without a measured value are left out.

    Raises: KeyError if the draws hold none.
    """
    predicted = draws["posterior_predictive"]["population_mean"].transpose("chain", "draw", "observation")
    observed = draws["observed_data"]["population_mean"].values
    known = np.isfinite(observed)
    batch = (
        predicted.coords["batch_name"].values.astype(str)[known] if "batch_name" in predicted.coords else None
    )
    drawn = predicted.values.reshape(-1, len(observed))[:, known]
    return Checks(observed[known], drawn, batch)


def pit(checks: Checks) -> tuple[np.ndarray, np.ndarray]:
    """PIT of the measured values (N,) and of every draw among the others (S, N), in (0, 1)."""
    num_draws = len(checks.drawn)
    measured = ((checks.drawn < checks.observed).sum(axis=0) + 0.5) / (num_draws + 1)
    ranks = checks.drawn.argsort(axis=0).argsort(axis=0)
    return measured, (ranks + 0.5) / num_draws


def ecdf_curve(measured: np.ndarray, replicated: np.ndarray) -> Curve:
    """Distribution function of PIT values minus the uniform one."""
    curves = _below(replicated) - _GRID
    return Curve(_GRID, _below(measured[None])[0] - _GRID, *_band(curves))


def coverage_curve(measured: np.ndarray, replicated: np.ndarray) -> Curve:
    """Share of the values inside their central interval, at every level of `LEVELS`."""
    low, high = _band(_covered(replicated))
    return Curve(LEVELS, _covered(measured[None])[0], np.clip(low, 0, 1), np.clip(high, 0, 1))


def coverage_by_batch(
    measured: np.ndarray, replicated: np.ndarray, batch: np.ndarray, level: float
) -> tuple[np.ndarray, Curve]:
    """Names of the batches and their coverage of one level; `x` is how many values each has."""
    names, index, counts = np.unique(batch, return_inverse=True, return_counts=True)
    share = lambda values: np.stack(
        [np.bincount(index, row, len(names)) / counts for row in (_distance(values) <= level).astype(float)]
    )
    low, high = _band(share(replicated))
    return names, Curve(counts, share(measured[None])[0], np.clip(low, 0, 1), np.clip(high, 0, 1))


def _below(values: np.ndarray) -> np.ndarray:
    """Shares (S, Q) of values (S, N) at or below the grid."""
    return np.stack([np.searchsorted(np.sort(row), _GRID, side="right") for row in values]) / values.shape[1]


def _distance(values: np.ndarray) -> np.ndarray:
    """Level of the smallest central interval that holds a PIT value."""
    return np.abs(2 * values - 1)


def _covered(values: np.ndarray) -> np.ndarray:
    return (_distance(values)[..., None] <= LEVELS).mean(axis=1)


def _band(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The band (Q,), (Q,) in which `BAND` of the curves (S, Q) run throughout."""
    centre, sd = curves.mean(axis=0), curves.std(axis=0)
    unit = np.where(sd > 0, sd, 1.0)
    furthest = (np.abs(curves - centre) / unit).max(axis=1)
    width = np.quantile(furthest, BAND) * sd
    return centre - width, centre + width
