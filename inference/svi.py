"""Stochastic variational inference of a program with a guide: one compiled loop, losses kept."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import Array
from numpyro.infer import SVI, Trace_ELBO

# Gradients of the collapsed density are dominated by a few scales early on; clipping keeps Adam's second moments sane.
_CLIP_NORM = 50.0
_FINAL_RATE = 0.02  # share of the learning rate left at the last step: averages out the noise of the gradient


class VariationalFit(NamedTuple):
    """Fitted variational parameters and the negative ELBO of every step."""

    params: dict[str, Array]
    losses: np.ndarray


def fit_svi(
    key: Array,
    program: Callable,
    guide: Callable,
    args: tuple[Any, ...],
    *,
    num_steps: int,
    learning_rate: float,
    num_particles: int,
    on_progress: Callable[[int], None] | None = None,
) -> VariationalFit:
    """Maximise the ELBO of `program(*args)` under `guide` with Adam and a cosine decay.

    Raises:
        FloatingPointError: the ELBO became NaN or infinite; the message names the first such step.
    """
    schedule = optax.cosine_decay_schedule(learning_rate, num_steps, _FINAL_RATE)
    optimiser = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(schedule))
    svi = SVI(program, guide, optimiser, Trace_ELBO(num_particles=num_particles))

    def body(state: Any, _: None) -> tuple[Any, Array]:
        return svi.update(state, *args)

    block = jax.jit(lambda state: jax.lax.scan(body, state, None, length=_block_length(num_steps)))
    state, losses = jax.jit(lambda key: svi.init(key, *args))(key), []
    for _ in range(num_steps // _block_length(num_steps)):
        state, block_losses = block(state)
        losses.append(np.asarray(block_losses))
        if on_progress:
            on_progress(_block_length(num_steps))
    trace = np.concatenate(losses)
    if not np.isfinite(trace).all():
        step = int(np.argmin(np.isfinite(trace)))
        raise FloatingPointError(
            f"the ELBO is not finite from step {step} of {num_steps} on: lower learning_rate (now {learning_rate}) "
            "or look for features of extreme scale"
        )
    return VariationalFit(svi.get_params(state), trace)


def _block_length(num_steps: int) -> int:
    """Largest divisor of `num_steps` up to a hundredth of it or 50 steps: progress without recompiling."""
    target = max(50, num_steps // 100)
    return max(d for d in range(1, min(target, num_steps) + 1) if num_steps % d == 0)
