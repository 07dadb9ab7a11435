"""The response program in Pyro: site by site that of `models.response_program`."""

import pyro
import torch
from pyro.distributions import Normal
from torch import Tensor

from hilbertcell.models.microenvironment import Globals, Latents, Observations
from hilbertcell.models.pyro.microenvironment import response_mean


def response_program(globals_: Globals, layout: Observations, means: Tensor | None = None) -> Tensor:
    """Generate population means of batches given the globals; arguments and sites as in the NumPyro program.

    Tensors in float64 (`models.pyro.arguments.as_tensors`). A strength of zero leaves `response` without a density.
    """
    num_batches = layout.mean.shape[0]
    num_features, num_factors = globals_.baseline_loading.shape
    zeros, spread = globals_.alpha.new_zeros, globals_.strength[layout.condition][..., None]
    spread = spread * globals_.response_scale[layout.context]
    with pyro.plate("batch", num_batches):
        u = zeros(num_batches, 0)
        if num_factors:
            u = pyro.sample("microenvironment", Normal(zeros(num_factors), 1.0).to_event(1))
        batch_law = Normal(zeros(num_features), globals_.batch_scale)
        batch_effect = pyro.sample("batch_effect", batch_law.to_event(1))
        expected = globals_.alpha + (u @ globals_.baseline_loading.T)[:, None]
        control_mean = pyro.sample("control_mean", Normal(expected, globals_.baseline_scale).to_event(2))
        expected = response_mean(globals_, Latents(u, batch_effect, control_mean), layout)
        response = pyro.sample("response", Normal(expected, spread).to_event(2))
        latent = torch.cat([control_mean, response], 1)
        noise = Normal(latent, layout.noise.sqrt()).mask(layout.observed[..., None])
        return pyro.sample("observed_mean", noise.to_event(2), obs=means)
