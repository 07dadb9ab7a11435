"""Log score of whole batches that training did not see: does a part of the program earn its place?"""

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.special import logsumexp

from hilbertcell.data.populations import Populations
from hilbertcell.inference.predictive import batch_log_density, draw_globals
from hilbertcell.inference.requests import read_batches

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit


def batch_log_score(
    fit: "Fit", populations: Populations, *, num_samples: int = 200, seed: int = 0
) -> pd.Series:
    """Log predictive density of all observed means of each batch of `populations`, as batches never seen.

    The mean over draws of the globals of the batch's collapsed density (latents integrated out exactly), standardised
    features, controls and perturbed populations together. Larger is better. Only fits that share a feature map, that is
    the same training populations, seed and embedding settings, can be compared; their paired differences over batches
    are what `analyses.verdicts` judges. Leaving batches out in turn and scoring each is leave-one-batch-out without
    approximation.

    Raises: DataError for contexts or conditions that the fit does not know.
    """
    table = read_batches(fit, populations, observe=True, new_batch=True).table
    with jax.enable_x64(True):
        observations = jax.tree.map(jnp.asarray, table.observations)
        density = np.concatenate(
            [
                np.asarray(batch_log_density(globals_, observations))
                for _, globals_ in draw_globals(fit, fit.names, fit.perturbations, num_samples, seed)
            ]
        )
    return pd.Series(logsumexp(density, axis=0) - np.log(len(density)), index=table.batches)
