"""What draws of the globals say about batches as such: collected block by block, one entry per draw."""

from typing import TYPE_CHECKING

import jax
import numpy as np
from jax import Array

from hilbertcell.inference.batch_responses import LeadingResponses, leading_responses, new_batches
from hilbertcell.inference.checks import TrainingChecks
from hilbertcell.inference.predictive import batch_log_density, draw_batches
from hilbertcell.inference.training_summary import variance_shares
from hilbertcell.models.microenvironment import Globals

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit
    from hilbertcell.inference.requests import Given

# Draws of the globals behind the variance decomposition: shares are means over hundreds of (population, gene).
_SHARE_DRAWS = 20


class TrainingDraws:
    """Draws of microenvironments, log densities, scales and predictive checks of the training batches.

    Attributes:
        checks: the (training population, gene) pairs that are predicted from their batch's controls.
        leading: the conditions and genes whose responses are drawn in every batch, `new` ones after those of training.
        shares: (7,) variance decomposition, see `training_summary.variance_shares`.

    """

    leading: LeadingResponses

    def __init__(self, fit: "Fit", given: "Given", seed: int) -> None:
        """Nothing drawn yet."""
        self.fit, self.checks, self.shares = fit, TrainingChecks(fit, seed), np.zeros(0)
        self.new, self._new_observations = new_batches(given)
        self._blocks: list[dict[str, np.ndarray]] = []

    def add(self, keys: Array, globals_: Globals) -> None:
        """Draw for a block of globals, one key each; call it where float64 is enabled."""
        key_latents, key_checks = jax.vmap(jax.random.split, out_axes=1)(keys)
        observations = self.fit.program_args[0]
        if not self._blocks:
            first = jax.tree.map(lambda leaf: leaf[:_SHARE_DRAWS], globals_)
            self.shares = variance_shares(self.fit, key_latents[:_SHARE_DRAWS], first)
            self.leading = leading_responses(self.fit, globals_)
        unit = self.fit.unit.scale[self.leading.gene]
        u, response = draw_batches(key_latents, globals_, observations, *self.leading)
        responses = [np.asarray(response)]
        if self.new:
            key_new = jax.vmap(jax.random.fold_in, (0, None))(key_latents, 1)
            _, response = draw_batches(key_new, globals_, self._new_observations, *self.leading)
            responses.append(np.asarray(response))
        fixed = np.asarray(globals_.effect)[:, self.leading.condition[:, None], self.leading.gene]
        self._blocks.append(
            {
                "microenvironment": np.asarray(u),
                "batch_response": np.concatenate(responses, axis=1) * unit,
                "fixed_response": fixed * unit,
                "log_density": np.asarray(batch_log_density(globals_, observations)),
                "check": self.checks.draw(key_checks, globals_),
                **_scalars(self.fit, globals_),
            }
        )

    def __getitem__(self, name: str) -> np.ndarray:
        """All draws (S, ...) of one quantity."""
        return np.concatenate([block[name] for block in self._blocks])


def _scalars(fit: "Fit", globals_: Globals) -> dict[str, np.ndarray]:
    """Posterior draws worth reporting, genes only, scales in units of the data."""
    genes = slice(0, len(fit.genes))
    unit = fit.unit.scale[genes]
    return {
        "slope": np.asarray(globals_.slope[:, genes]),
        "baseline_scale": np.asarray(globals_.baseline_scale[:, :, genes].mean(axis=1)) * unit,
        "response_scale": np.asarray(globals_.response_scale[:, :, genes].mean(axis=1)) * unit,
        "batch_scale": np.asarray(globals_.batch_scale[:, genes]) * unit,
        "factor_scale": np.sqrt(
            np.asarray((globals_.baseline_loading[:, genes] ** 2).mean(axis=1)),
        ),
        "strength": np.asarray(globals_.strength)[:, : len(fit.names.conditions)],
    }
