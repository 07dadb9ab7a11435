"""Stochastic variational inference of a program with a guide: one compiled loop, losses kept.

Objectives: the ELBO; the importance-weighted bound (Burda et al. 2016), which is tighter and less shy of tails; the
Renyi bound of order 1/2 (Li & Turner 2016) between the two.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

from hilbertcell.models.microenvironment import Observations

# Gradients of the collapsed density are dominated by a few scales early on; clipping keeps Adam's second moments sane.
CLIP_NORM = 50.0
FINAL_RATE = 0.02  # share of the learning rate left at the last step: averages out the noise of the gradient
# Observed means from which a table is large: steps take about half the time in single precision.
_LARGE = 200_000
# A small table is not at its optimum after 1,000 steps and has time for up to 6,000; from this many observed means on
# (five donors of 600 genes) the fit would take minutes.
_USUAL_STEPS, _SMALL = (1000, 6000), 30_000

Objective = Literal["elbo", "iwae", "renyi"]
_ORDER = {"iwae": 0.0, "renyi": 0.5}
_MIN_PARTICLES = 8


def usual_steps(layout: Observations) -> int:
    """Steps that are taken if nobody says how many, for a table (B, C + J, D); in hundreds."""
    fewest, most = _USUAL_STEPS
    return int(np.clip(fewest * _SMALL // layout.noise.size // 100 * 100, fewest, most))


class VariationalFit(NamedTuple):
    """Fitted variational parameters and the negative bound on the log evidence of every step."""

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
    objective: Objective = "elbo",
    params: dict[str, np.ndarray] | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> VariationalFit:
    """Maximise the bound `objective` of `program(*args)` under `guide` with Adam and a cosine decay.

    It starts from `params` (constrained) where they are given, else from where the guide starts.

    Raises:
        FloatingPointError: the ELBO became NaN or infinite; the message names the first such step.
    """
    svi = _svi(program, guide, num_steps, learning_rate, num_particles, objective)
    leaves, structure = jax.tree.flatten(_prepared(args))
    # What is an array is handed to the compiled loop: as a constant it would be folded, for seconds.
    arrays = [leaf if isinstance(leaf, jax.Array) else None for leaf in leaves]

    def whole(arrays: list[Array | None]) -> tuple[Any, ...]:
        pairs = zip(arrays, leaves, strict=True)
        return structure.unflatten([leaf if array is None else array for array, leaf in pairs])

    @jax.jit
    def block(state: Any, arrays: list[Array | None]) -> tuple[Any, Array]:
        update = lambda state, _: svi.update(state, *whole(arrays))
        return jax.lax.scan(update, state, None, length=_block_length(num_steps))

    init = lambda key, arrays, start: svi.init(key, *whole(arrays), init_params=start)
    state, losses = jax.jit(init)(key, arrays, params and jax.tree.map(jnp.asarray, params)), []
    for _ in range(num_steps // _block_length(num_steps)):
        state, block_losses = block(state, arrays)
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


def svi_params(
    key: Array,
    program: Callable,
    guide: Callable,
    args: tuple[Any, ...],
    *,
    num_steps: int,
    learning_rate: float,
    num_particles: int,
    objective: Objective = "elbo",
) -> dict[str, Array]:
    """Variational parameters that `fit_svi` finds, as a pure function of arrays: to be vmapped over data sets."""
    svi, args = _svi(program, guide, num_steps, learning_rate, num_particles, objective), _prepared(args)
    state = svi.init(key, *args)
    return svi.get_params(jax.lax.fori_loop(0, num_steps, lambda _, s: svi.update(s, *args)[0], state))


def _prepared(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments of a program with large tables in single precision (`models.microenvironment`: what that means)."""
    return tuple(
        arg._replace(noise=arg.noise.astype(jnp.float32))
        if isinstance(arg, Observations) and arg.noise.size > _LARGE
        else arg
        for arg in args
    )


def _svi(
    program: Callable, guide: Callable, num_steps: int, rate: float, num_particles: int, objective: Objective
) -> SVI:
    optimiser = optax.chain(
        optax.clip_by_global_norm(CLIP_NORM),
        optax.adam(optax.cosine_decay_schedule(rate, num_steps, FINAL_RATE)),
    )
    if objective == "elbo":
        return SVI(program, guide, optimiser, Trace_ELBO(num_particles=num_particles))
    # One particle makes every bound the ELBO.
    bound = RenyiELBO(alpha=_ORDER[objective], num_particles=max(num_particles, _MIN_PARTICLES))
    return SVI(program, guide, optimiser, bound)


def _block_length(num_steps: int) -> int:
    """Largest divisor of `num_steps` up to a hundredth of it or 50 steps: progress without recompiling."""
    target = max(50, num_steps // 100)
    return max(d for d in range(1, min(target, num_steps) + 1) if num_steps % d == 0)
