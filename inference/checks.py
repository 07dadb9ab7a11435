"""Training populations predicted from their own controls: material for posterior predictive plots."""

from typing import TYPE_CHECKING

import jax
import numpy as np

from hilbertcell.inference.predictive import BatchTargets, draw_batch
from hilbertcell.models.microenvironment import Globals, Observations

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

# (population, gene) pairs kept: enough to see a PIT histogram bend, few enough to store.
_NUM_CHECKS = 400


class TrainingChecks:
    """A random choice of (training population, gene) pairs and what the program predicts for them.

    Their batches' latents see the controls alone; the globals saw everything, so this checks fit, not prediction.
    """

    def __init__(self, fit: "Fit", seed: int) -> None:
        """Choose pairs by `seed`."""
        table, num_contexts = fit.table, len(fit.names.contexts)
        self.fit = fit
        blind = table.observations.observed.copy()
        blind[:, num_contexts:] = False
        self.observations = table.observations._replace(observed=blind)
        rng = np.random.default_rng(seed)
        slots = np.argwhere(table.observations.observed[:, num_contexts:])
        count = min(_NUM_CHECKS, len(slots) * len(fit.genes))
        flat = rng.choice(len(slots) * len(fit.genes), count, replace=False)
        self.batch, self.slot = slots[flat // len(fit.genes)].T
        self.gene = flat % len(fit.genes)
        self.row = table.rows[self.batch, num_contexts + self.slot]
        self.noise = table.observations.noise[self.batch, num_contexts + self.slot, self.gene]
        self.observed = table.observations.mean[self.batch, num_contexts + self.slot, self.gene]
        self.rng = rng

    def draw(self, keys: jax.Array, globals_: Globals) -> np.ndarray:
        """Predictive draws (S, observation) of the chosen summaries, cell noise included, standardised.

        `keys` (S,): one per draw of the globals.
        """
        draws = np.empty((len(keys), len(self.gene)))
        for b in np.unique(self.batch):
            observations = Observations(*(field[b] for field in self.observations))
            nobody = Observations(
                observations.mean[:1].repeat(len(observations.condition), 0),
                observations.noise[:1].repeat(len(observations.condition), 0),
                np.zeros(len(observations.condition), bool), observations.condition, observations.context,
            )  # fmt: skip
            targets = BatchTargets(
                observations,
                observations.condition,
                observations.context,
                nobody,
                np.arange(len(observations.condition)),
            )
            chosen = self.batch == b
            own = jax.vmap(jax.random.fold_in, (0, None))(keys, int(b))
            response = draw_batch(own, globals_, targets).response
            draws[:, chosen] = response[:, self.slot[chosen], self.gene[chosen]]
        return draws + np.sqrt(self.noise) * self.rng.standard_normal(draws.shape)
