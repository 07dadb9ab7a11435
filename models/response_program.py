"""The response program: populations of batches given the globals, every latent of a batch a site of its own.

The generative process at the head of `models.microenvironment`, written site by site. `PopulationMeans` is its
marginal law and `draw_latents` its conditional, both in closed form and what inference uses; this program is for what
they cannot answer: conditioning on a latent, intervening on one, reading all of them.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers

from hilbertcell.models.microenvironment import Globals, Latents, Observations, response_mean


def response_program(globals_: Globals, layout: Observations, means: Array | None = None) -> Array:
    """Generate population means of batches given the globals, standardised features.

    Sites, all in the plate `batch`: `microenvironment` (B, K), where there are factors; `batch_effect` (B, D);
    `control_mean` (B, C, D); `response` (B, J, D), the latent means of the perturbed populations; `observed_mean`
    (B, C + J, D). Slots that are not observed keep their latents, which are then predictions, and add nothing to
    the density of `observed_mean`.

    Args:
        globals_: unknowns shared by all batches. Where a strength is zero, `response` has no density.
        layout: (B, ...) slots, noise and indices of the batches; its `mean` gives only shapes.
        means: observed means (B, C + J, D), or None to simulate them.

    Returns:
        Observed means (B, C + J, D), given or simulated.
    """
    num_batches = layout.mean.shape[0]
    num_features, num_factors = globals_.baseline_loading.shape
    zeros = partial(jnp.zeros, dtype=globals_.alpha.dtype)
    spread = globals_.strength[layout.condition][..., None] * globals_.response_scale[layout.context]
    with numpyro.plate("batch", num_batches):
        u = zeros((num_batches, 0))
        if num_factors:
            u = numpyro.sample("microenvironment", dist.Normal(zeros(num_factors), 1.0).to_event(1))
        batch_law = dist.Normal(zeros(num_features), globals_.batch_scale)
        batch_effect = numpyro.sample("batch_effect", batch_law.to_event(1))
        expected = globals_.alpha + (u @ globals_.baseline_loading.T)[:, None]
        control_mean = numpyro.sample(
            "control_mean", dist.Normal(expected, globals_.baseline_scale).to_event(2)
        )
        latents = Latents(u, batch_effect, control_mean)
        expected = jax.vmap(partial(response_mean, globals_))(latents, layout.condition, layout.context)
        response = numpyro.sample("response", dist.Normal(expected, spread).to_event(2))
        latent = jnp.concatenate([control_mean, response], axis=1)
        noise = dist.Normal(latent, jnp.sqrt(layout.noise)).mask(layout.observed[..., None])
        return numpyro.sample("observed_mean", noise.to_event(2), obs=means)


def in_microenvironments(
    globals_: Globals, population_slots: Observations, microenvironments: Array
) -> Callable[[], Array]:
    """The response program of the same populations in each of several microenvironments.

    How would these populations look in each batch? In row b of every site all slots are put under
    `microenvironments[b]` by intervention (Pearl's do): what of the batch is not its microenvironment is drawn anew.

    Args:
        globals_: unknowns shared by all batches, of at least one factor.
        population_slots: slots of one batch, (C + J, ...): which conditions and contexts are asked for.
        microenvironments: (B, K), of training batches (`draw_latents`) or of any other origin.

    Raises:
        ValueError: the microenvironments have not the K factors of the globals, or there are none.
    """
    num_factors = globals_.baseline_loading.shape[1]
    if microenvironments.ndim != 2 or microenvironments.shape[1] != num_factors or not num_factors:
        raise ValueError(
            f"microenvironments have shape {microenvironments.shape}, expected (B, {num_factors}) with at least one "
            "factor: a program without factors has no microenvironment to set"
        )
    number = len(microenvironments)
    layout = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (number, *leaf.shape)), population_slots)
    return partial(handlers.do(response_program, {"microenvironment": microenvironments}), globals_, layout)
