"""Fits go back and forth: SVI of a fit's program in Pyro, and draws of any Pyro inference as a fit that predicts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import torch
from rich.progress import Progress

from hilbertcell.inference.fit import Fit
from hilbertcell.inference.pyro.guides import BlockGuide, latent_sites
from hilbertcell.inference.pyro.svi import fit_svi
from hilbertcell.inference.starting_values import starting_values
from hilbertcell.inference.svi import usual_steps
from hilbertcell.models.pyro.arguments import as_tensors
from hilbertcell.models.pyro.hidden_factors import hidden_factor_program


def program_args(fit: Fit, device: str | torch.device = "cpu") -> tuple[Any, ...]:
    """Arguments of Pyro's `hidden_factor_program` for the training populations of a fit."""
    with jax.enable_x64(True):
        return as_tensors(fit.program_args, device)


def block_guide(fit: Fit, device: str | torch.device = "cpu") -> BlockGuide:
    """The variational family of a fit in Pyro; its parameters are those of `fit.guide()`."""
    with jax.enable_x64(True):
        initial, initial_sd = starting_values(fit.program_args, fit.seed)
    args = program_args(fit, device)
    return BlockGuide(hidden_factor_program, *args, initial=initial, initial_sd=initial_sd)


def infer(start: Fit, *, device: str | torch.device = "cpu", progress: bool = False) -> Fit:
    """Run variational inference of a fit's program in Pyro, with the settings of the fit.

    It goes on from the parameters of `start`, of NumPyro's or of Pyro's making; for a fresh start take them away,
    `dataclasses.replace(fit, params={}, losses=numpy.zeros(0))`. The learning rate begins anew. The result predicts,
    is saved and reported on as any fit, without torch.

    Args:
        start: a fit; its embedding and moments stay.
        device: where torch works.
        progress: show a progress bar.

    Raises:
        ValueError: a fit by NUTS, one whose response law is a diffusion trained around these parameters, or one
            with another objective than the ELBO.
        FloatingPointError: the ELBO became NaN or infinite.
    """
    settings = start.settings
    if start.posterior or start.inference[0] == "nuts":
        raise ValueError(
            "the fit is one by NUTS: Pyro goes on with variational fits; fit with inference = 'svi'"
        )
    if start.diffusion is not None:
        raise ValueError(
            "the response law of the fit is a diffusion that was trained around its parameters, which would change; fit "
            "with law = 'gaussian'"
        )
    if settings.objective != "elbo":
        raise ValueError(
            f"objective = {settings.objective!r}: in Pyro the ELBO alone is maximised; use 'elbo'"
        )
    num_steps = settings.num_steps or usual_steps(start.table.observations)
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task("inference in Pyro", total=num_steps)
        result = fit_svi(
            start.seed, hidden_factor_program, block_guide(start, device), program_args(start, device),
            num_steps=num_steps, learning_rate=settings.learning_rate, num_particles=settings.num_particles,
            params=start.params, on_progress=lambda steps: bar.advance(task, steps),
        )  # fmt: skip
    return replace(start, params=result.params, losses=np.concatenate([start.losses, result.losses]))


def with_draws(fit: Fit, draws: Mapping[str, torch.Tensor]) -> Fit:
    """The fit with draws (S, ...) of the program's sites for a posterior: from `Predictive`, an AutoGuide or MCMC.

    Its predictions pick among the draws. What is no latent site of the program is not kept.

    Raises:
        ValueError: a site is missing, or its shape is not the program's; all are named.
    """
    problems, posterior = [], {}
    for name, site in latent_sites(hidden_factor_program, *program_args(fit)).items():
        shape = tuple(site["value"].shape)
        if name not in draws:
            problems.append(f"{name} is missing")
        elif tuple(draws[name].shape[1:]) != shape:
            problems.append(
                f"{name} has shape {tuple(draws[name].shape)}, expected (draws, {str(shape)[1:-1]})"
            )
        else:
            posterior[name] = draws[name].detach().cpu().numpy()[None]
    if problems:
        raise ValueError(f"draws are not those of the fit's program: {'; '.join(problems)}")
    return replace(fit, params={}, losses=np.zeros(0), posterior=posterior)
