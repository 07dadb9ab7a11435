"""What a (perturbation, dose) never seen has from the doses of its perturbation that were seen."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.models.effects import DOSE_DECADES

# Share of a level's variance that is its own however near another dose is; keeps doses close to one another solvable.
_OWN_SHARE = 0.01


class DoseCurve(NamedTuple):
    """Law of a quantity that is Gaussian around zero at N new levels given its values at the L known ones."""

    weights: np.ndarray  # (N, L)
    chol: np.ndarray  # (N, N) lower Cholesky factor of what the known levels leave open

    def extend(self, known: Array, noise: Array) -> Array:
        """Values (L + N, ...) of all levels from those known (L, ...) and noise (N, ...) drawn from the prior."""
        new = jnp.tensordot(self.weights, known, 1) + jnp.tensordot(self.chol, noise, 1)
        return jnp.concatenate([known, new])


def dose_curve(levels: Sequence[tuple[str, float]], num_known: int) -> DoseCurve:
    """Curves over log dose, alike within about a decade, one per perturbation (Rasmussen & Williams 2006, eq. 2.19).

    `levels` are (perturbation, dose), the first `num_known` known; a dose that is not positive means none, and such a
    level tells nothing of others: it follows its prior, as does a perturbation of which no dose is known.
    """
    names = np.array([name for name, _ in levels])
    log_dose = np.array([np.log10(dose) if dose > 0 else np.nan for _, dose in levels])
    distance = (log_dose[:, None] - log_dose[None, :]) / DOSE_DECADES
    alike = (names[:, None] == names[None, :]) & np.isfinite(distance)
    kernel = np.where(alike, np.exp(-0.5 * np.nan_to_num(distance) ** 2), 0.0) * (1.0 - _OWN_SHARE)
    np.fill_diagonal(kernel, 1.0)
    between = kernel[num_known:, :num_known]
    weights = np.linalg.solve(kernel[:num_known, :num_known], between.T).T
    return DoseCurve(weights, np.linalg.cholesky(kernel[num_known:, num_known:] - weights @ between.T))
