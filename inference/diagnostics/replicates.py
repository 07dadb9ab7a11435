"""Does the program, as fitted, make tables like the measured one? Statistics of a table of means among replicates.

Replicated tables have the same layout and come from the program under draws of its unknowns, noise of the cells added. With
the true unknowns the p-values are exact; with fitted ones, which saw the table, they are too large (Bayarri and Berger
2000), so that alarms are rarer than their level.
"""

from typing import NamedTuple

import numpy as np

from hilbertcell.inference.diagnostics.result import Result, Side, judged, monte_carlo_p


class Kinds(NamedTuple):
    """Rows of a table of P populations by batch and kind; the same batch has one population of a kind at most."""

    row: np.ndarray  # (B, M) row of the population of each kind, -1 for none; controls first
    control: np.ndarray  # (M,) the kind that is a kind's control; a control's own place

    def gather(self, values: np.ndarray) -> np.ndarray:
        """(..., B, M, D) of values (..., P, D), nan where there is no population."""
        found = values[..., self.row, :]
        return np.where((self.row >= 0)[..., None], found, np.nan)


def _centred(values: np.ndarray) -> np.ndarray:
    """Values (..., B, M, D) minus the mean over batches; 0 where missing, or alone of its kind."""
    present = np.isfinite(values)
    count = present.sum(-3, keepdims=True)
    filled = np.where(present, values, 0.0)
    return np.where(present & (count > 1), filled - filled.sum(-3, keepdims=True) / np.maximum(count, 1), 0.0)


def spread_between(table: np.ndarray) -> np.ndarray:
    """Log root mean square over features of what is left of tables (..., B, M, D) around the mean of each kind: (...)."""
    residual = _centred(table)
    square = (residual**2).sum((-3, -2)) / np.maximum((residual != 0).sum((-3, -2)), 1)
    return 0.5 * np.log(np.maximum(square, 1e-300)).mean(-1)


def largest_residual(table: np.ndarray) -> np.ndarray:
    """Largest residual of tables (..., B, M, D) in root mean squares of its feature: (...)."""
    residual = _centred(table)
    square = (residual**2).sum((-3, -2)) / np.maximum((residual != 0).sum((-3, -2)), 1)
    return (np.abs(residual).max((-3, -2)) / np.sqrt(np.maximum(square, 1e-300))).max(-1)


def own_baseline_slope(table: np.ndarray, control: np.ndarray) -> np.ndarray:
    """Slope of responses on the control of their batch, both around their means over batches: (...)."""
    perturbed = np.flatnonzero(control != np.arange(len(control)))
    base = table[..., control[perturbed], :]
    response = table[..., perturbed, :] - base
    base = _centred(np.where(np.isfinite(response), base, np.nan))
    response = _centred(response)
    return (response * base).sum((-3, -2, -1)) / np.maximum((base**2).sum((-3, -2, -1)), 1e-300)


def predictive_checks(table: np.ndarray, replicates: np.ndarray, kinds: Kinds) -> dict[str, Result]:
    """Measured table (P, D) among replicated ones (R, P, D), standardised features."""
    observed, null = kinds.gather(table), kinds.gather(replicates)

    def check(observed: np.ndarray, null: np.ndarray, side: Side) -> Result:
        p = monte_carlo_p(float(observed), null, side)
        return judged(float(observed), p, details={"expected": float(np.median(null))})

    slope = [own_baseline_slope(values, kinds.control) for values in (observed, null)]
    return {
        "spread between batches": check(spread_between(observed), spread_between(null), "two-sided"),
        "largest residual": check(largest_residual(observed), largest_residual(null), "greater"),
        "slope on own baseline": check(slope[0], slope[1], "two-sided"),
    }
