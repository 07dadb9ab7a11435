"""Simulation-based calibration of the inference of a fit, on tables laid out like its own: SBC and TARP on request."""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from hilbertcell.inference.calibration import (
    Experiment,
    calibrate,
    calibration_p,
    nuts_posterior,
    svi_posterior,
)
from hilbertcell.inference.diagnostics.result import Result, judged

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

NUM_FEATURES = 3  # of the fit's genes: what a table of this many does not show are effects of many features
_NUTS = (200, 30, 10, 5)  # warm-up, draws kept, steps per draw, depth of trees
_SVI_DRAWS, _SVI_STEPS = 100, 6000


def calibrate_fit(fit: "Fit", num_simulations: int, seed: int) -> Result:
    """Are posteriors of tables simulated from the program the right ones? Smallest Holm-adjusted p-value of uniform ranks.

    Batches, contexts, conditions and noise are those of the fit, three genes spread over the range of noise; the method is the
    fit's. `details` hold the p-value of every quantity, TARP included.
    """
    order = np.argsort(fit.within.noise_variance[:, : len(fit.genes)].mean(0))
    number = min(NUM_FEATURES, len(order))
    chosen = order[np.linspace(0, len(order) - 1, number).astype(int)]
    with jax.enable_x64(True):
        layout = jax.tree.map(jnp.asarray, fit.table.observations)
        layout = layout._replace(mean=layout.mean[..., chosen], noise=layout.noise[..., chosen])
        _, kernels, level, block, num_factors, _ = fit.program_args
        first = jax.tree.map(lambda leaf: leaf[0], layout)
        experiment = Experiment(layout, kernels, level, block[chosen], num_factors, first)
        posterior = (
            nuts_posterior(*_NUTS)
            if fit.inference[0] == "nuts"
            else svi_posterior(
                _SVI_DRAWS,
                fit.settings.num_steps or _SVI_STEPS,
                fit.settings.learning_rate,
                fit.settings.num_particles,
                fit.settings.objective,
            )
        )
        found = calibrate(jax.random.key(seed), experiment, posterior, num_simulations)
    truth = {name: values for name, values in found.truth.items() if np.ptp(values) > 0}
    draws = {name: found.draws[name] for name in truth}
    p = calibration_p(truth, draws, np.random.default_rng(seed))
    worst = min(p, key=lambda name: p[name])
    return judged(p[worst], p[worst], worst if p[worst] < 0.05 else "", p)
