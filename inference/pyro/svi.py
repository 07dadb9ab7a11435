"""Stochastic variational inference in Pyro by the recipe of `inference.svi`: Adam, cosine decay, one clipped gradient."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch.distributions import constraints

from hilbertcell.inference.pyro.guides import CONSTRAINTS
from hilbertcell.inference.svi import CLIP_NORM, FINAL_RATE, VariationalFit

# Numbers in the largest argument from which a step gains by threads. With 2,000 of them, a step took 120 ms of two busy
# cores with two threads and 16 ms with one.
_LARGE = 100_000


def fit_svi(
    seed: int,
    program: Callable,
    guide: Callable,
    args: tuple[Any, ...],
    *,
    num_steps: int,
    learning_rate: float,
    num_particles: int,
    params: dict[str, np.ndarray] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> VariationalFit:
    """Maximise the ELBO of `program(*args)` under `guide`, which may be one of Pyro's AutoGuides.

    The loop is its own: Pyro's optimisers clip parameter by parameter, the recipe clips the gradient as a whole.
    Parameters live in a store of this call; torch's generator and its number of threads are left as they were.

    Args:
        seed: same seed, same fit, on one device and one version of torch.
        program: Pyro function.
        guide: of the same signature.
        args: tensors; their device is used.
        num_steps: steps of Adam.
        learning_rate: at the first step; 2 % of it are left at the last.
        num_particles: draws of the guide per step.
        params: constrained values that the parameters of a `BlockGuide` start from, of this or of a NumPyro fit.
        on_progress: told after every step.

    Returns:
        Constrained parameters by name, numpy, and the negative ELBO of every step.

    Raises:
        FloatingPointError: the ELBO became NaN or infinite; the message names the first such step.
    """
    losses, elbo = np.empty(num_steps), Trace_ELBO(num_particles=num_particles)
    tensors = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, torch.Tensor)]
    with pyro.get_param_store().scope(), torch.random.fork_rng(), _threads(tensors):
        torch.manual_seed(seed)
        load_params(params or {}, tensors[0].device)
        with torch.no_grad(), poutine.trace(param_only=True) as made:
            guide(*args)
        nodes: dict[str, Any] = dict(made.trace.nodes)
        free = [site["value"].unconstrained() for site in nodes.values()]
        optimiser = torch.optim.Adam(free, lr=learning_rate)
        decay = lambda step: FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * step / num_steps)) / 2
        schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, decay)
        for step in range(num_steps):
            optimiser.zero_grad()
            with pyro.validation_enabled(False):  # what is not finite is told by its step, below
                losses[step] = elbo.loss_and_grads(program, guide, *args)
            if not np.isfinite(losses[step]):
                raise FloatingPointError(
                    f"the ELBO is not finite from step {step} of {num_steps} on: lower learning_rate (now "
                    f"{learning_rate}) or look for features of extreme scale"
                )
            torch.nn.utils.clip_grad_norm_(free, CLIP_NORM)
            optimiser.step()
            schedule.step()
            if on_progress:
                on_progress(1)
        fitted = {name: value.detach().cpu().numpy().copy() for name, value in pyro.get_param_store().items()}
    return VariationalFit(fitted, losses)


def draw_sites(
    seed: int,
    guide: Callable,
    args: tuple[Any, ...],
    num_samples: int,
    params: dict[str, np.ndarray] | None = None,
) -> dict[str, torch.Tensor]:
    """Draws (S, ...) of a program's sites from its guide: a `BlockGuide` with `params`, or a trained AutoGuide.

    Shapes are those of the sites. Pyro's `Predictive(program, guide=guide)` puts an axis before those outside plates.
    """
    tensors = [leaf for leaf in jax.tree.leaves(args) if isinstance(leaf, torch.Tensor)]
    with pyro.get_param_store().scope(), torch.random.fork_rng(), torch.no_grad(), _threads(tensors):
        torch.manual_seed(seed)
        load_params(params or {}, tensors[0].device)
        draws = [guide(*args) for _ in range(num_samples)]
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


@contextmanager
def _threads(tensors: list[torch.Tensor]) -> Iterator[None]:
    """One thread for small tables: on a few thousand numbers torch's threads wait for each other."""
    before = torch.get_num_threads()
    size = max(tensor.numel() for tensor in tensors)
    try:
        torch.set_num_threads(1 if size < _LARGE else before)
        yield
    finally:
        torch.set_num_threads(before)


def load_params(params: dict[str, np.ndarray], device: str | torch.device) -> None:
    """Put constrained values of the parameters of a `BlockGuide` into Pyro's store."""
    for name, value in params.items():
        tensor = torch.tensor(np.asarray(value), dtype=torch.float64, device=device)
        pyro.param(name, tensor, CONSTRAINTS.get(name, constraints.real))
