"""Train the residual network of a denoiser by score matching on noisy points: init/step, early stopping, resumable.

Adam with clipped gradients and a cosine decay; what is kept is an exponential average of the weights, judged every so
often on held-out batches by its loss less that of the program's own denoiser, under noise that never changes. The network
starts as the program, so that "no better than the program" ends as the program itself.
"""

import json
import os
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hilbertcell.inference.score_matching import Conditions, NoisyPoints, deconvolution_loss, pick
from hilbertcell.models.denoisers import ResidualDenoiser

BLOCK = 100  # steps between two looks at the held-out batches
_CLIP_NORM = 1.0
_FINAL_RATE = 0.01  # share of the learning rate that is left at the end
# Noise on standardised features while training: exact ones tell single populations and batches apart, and would be used to.
JITTER = 0.5
_DROPPED = 0.1  # share of training points that do not see which perturbation it is: as for an unseen one
_EVALUATIONS = (
    4_000  # (draw, population, noise) triples behind one look: its error is that of the batches, not of noise
)


class Recipe(NamedTuple):
    """How long and how fast a network is trained."""

    num_steps: int = 3_000
    batch_size: int = 256
    learning_rate: float = 1e-3
    averaging: float = 0.995  # of the weights, per step; shorter at the start
    patience: int = 8  # looks without a better one before training ends


class TrainingData(NamedTuple):
    """Populations, draws of the program for each, and which features say what the perturbation is."""

    points: NoisyPoints
    conditions: Conditions
    names: Array  # (F,) bool: features that name the perturbation, dropped now and then


class State(NamedTuple):
    """All that goes on from one block to the next."""

    denoiser: ResidualDenoiser
    average: ResidualDenoiser
    best: ResidualDenoiser
    optimiser: optax.OptState
    step: Array  # () int
    best_loss: Array  # () held-out loss less the program's; 0 for the program itself
    stale: Array  # () int, looks since the best one


def _optimiser(recipe: Recipe) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(recipe.learning_rate, recipe.num_steps, _FINAL_RATE)
    return optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(schedule))


def init(denoiser: ResidualDenoiser, recipe: Recipe) -> State:
    """Start at `denoiser`."""
    optimiser = _optimiser(recipe).init(eqx.filter(denoiser.network, eqx.is_array))
    zero = jnp.zeros((), jnp.int32)
    return State(denoiser, denoiser, denoiser, optimiser, zero, jnp.zeros(()), zero)


def step(key: Array, state: State, data: TrainingData, recipe: Recipe) -> tuple[State, Array]:
    """One step on `batch_size` populations, each with a draw of the program, a level and noise; returns its loss."""
    num_draws, num_points = data.conditions.mean.shape[:2]
    key_draw, key_point, key_drop, key_jitter, key_loss = jax.random.split(key, 5)
    draws = jax.random.randint(key_draw, (recipe.batch_size,), 0, num_draws)
    chosen = jax.random.randint(key_point, (recipe.batch_size,), 0, num_points)
    dropped = jax.random.bernoulli(key_drop, _DROPPED, (recipe.batch_size,))
    jitter = jax.random.normal(key_jitter, (recipe.batch_size, *data.names.shape))
    keys = jax.random.split(key_loss, recipe.batch_size)

    def loss(network: eqx.Module) -> Array:
        denoiser = eqx.tree_at(lambda d: d.network, state.denoiser, network)

        def one(key: Array, draw: Array, population: Array, drop: Array, jitter: Array) -> Array:
            condition = data.conditions.at(draw, population)
            features = condition.features
            seen = jnp.where(data.names, jnp.where(drop, 0.0, features), features + JITTER * jitter)
            own, program = deconvolution_loss(
                key, denoiser, pick(data.points, population), condition._replace(features=seen)
            )
            return own - program

        return jnp.mean(jax.vmap(one)(keys, draws, chosen, dropped, jitter))

    value, gradient = eqx.filter_value_and_grad(loss)(state.denoiser.network)
    updates, optimiser = _optimiser(recipe).update(gradient, state.optimiser)
    network = eqx.apply_updates(state.denoiser.network, updates)
    # A short memory at first, or the average would hold the start for hundreds of steps.
    keep = jnp.minimum(recipe.averaging, (1.0 + state.step) / (10.0 + state.step))
    average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.average.network, network)
    replaced = eqx.tree_at(lambda d: d.network, state.denoiser, network)
    averaged = eqx.tree_at(lambda d: d.network, state.average, average)
    return state._replace(
        denoiser=replaced, average=averaged, optimiser=optimiser, step=state.step + 1
    ), value


def held_out_loss(key: Array, denoiser: ResidualDenoiser, data: TrainingData) -> Array:
    """Mean loss over populations, draws of the program, levels and noise, less that of the program's own denoiser."""
    num_draws, num_points = data.conditions.mean.shape[:2]
    repeats = max(1, _EVALUATIONS // num_points)

    def one(key: Array) -> Array:
        keys = jax.random.split(key, num_points + 1)
        draws = jax.random.randint(keys[-1], (num_points,), 0, num_draws)

        def at(key: Array, draw: Array, population: Array) -> Array:
            own, program = deconvolution_loss(
                key, denoiser, pick(data.points, population), data.conditions.at(draw, population)
            )
            return own - program

        return jnp.mean(jax.vmap(at)(keys[:-1], draws, jnp.arange(num_points)))

    return jnp.mean(jax.lax.map(one, jax.random.split(key, repeats)))


@partial(jax.jit, static_argnames="recipe")
def run_block(
    key: Array, state: State, training: TrainingData, held_out: TrainingData, recipe: Recipe
) -> tuple[State, Array]:
    """`BLOCK` steps and one look at the held-out batches; keys depend on the step alone, so that a run can be resumed."""

    def body(state: State, _: None) -> tuple[State, Array]:
        return step(jax.random.fold_in(key, state.step), state, training, recipe)

    state, losses = jax.lax.scan(body, state, None, length=BLOCK)
    # A key that no step has: the same noise at every look.
    loss = held_out_loss(jax.random.fold_in(key, recipe.num_steps), state.average, held_out)
    better = loss < state.best_loss
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), state.average, state.best)
    return state._replace(
        best=best,
        best_loss=jnp.where(better, loss, state.best_loss),
        stale=jnp.where(better, 0, state.stale + 1),
    ), jnp.stack([losses.mean(), loss])


class Trained(NamedTuple):
    """A trained denoiser and its course: losses less the program's, one row (training, held out) a block."""

    denoiser: ResidualDenoiser
    course: np.ndarray  # (blocks, 2)


def train(
    key: Array,
    denoiser: ResidualDenoiser,
    training: TrainingData,
    held_out: TrainingData,
    recipe: Recipe,
    *,
    resume: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train until `held_out` has not gained for `patience` looks; returns the best average of the weights.

    `resume` names a file that keeps the state after every block: a training that was killed goes on from there, to the
    same result. It is removed at the end.

    Raises:
        FloatingPointError: the loss is not finite any more.
        ValueError: `resume` is not the state of this training.
    """
    state, course = init(denoiser, recipe), np.zeros((0, 2))
    identity = json.dumps([*recipe, zlib.crc32(np.asarray(training.points.observed).tobytes())])
    if resume is not None and resume.exists():
        state, course = _load(resume, state, identity)
    while int(state.step) < recipe.num_steps and int(state.stale) < recipe.patience:
        state, losses = run_block(key, state, training, held_out, recipe)
        course = np.concatenate([course, np.asarray(losses)[None]])
        if not np.isfinite(course[-1]).all():
            raise FloatingPointError(
                f"the score-matching loss is not finite after {int(state.step)} steps: lower the learning rate (now "
                f"{recipe.learning_rate}) or look for populations of one or two cells"
            )
        if resume is not None:
            _save(resume, state, course, identity)
        if on_progress:
            on_progress(BLOCK)
    if resume is not None:
        resume.unlink(missing_ok=True)
    return Trained(state.best, course)


def _save(path: Path, state: State, course: np.ndarray, identity: str) -> None:
    leaves = {f"state.{i:04d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    unfinished = path.with_name(f".{path.name}.unfinished")
    save_file(leaves | {"course": course}, unfinished, {"identity": identity})
    os.replace(unfinished, path)


def _load(path: Path, like: State, identity: str) -> tuple[State, np.ndarray]:
    leaves, structure = jax.tree.flatten(like)
    try:
        with safe_open(path, "numpy") as file:
            found = (file.metadata() or {}).get("identity")
            stored = [file.get_tensor(f"state.{i:04d}") for i in range(len(leaves))]
            course = file.get_tensor("course")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is not the state of a training ({error}); remove it") from None
    if found != identity:
        raise ValueError(f"{path} is the state of another training; remove it or name another file")
    return structure.unflatten([jnp.asarray(x) for x in stored]), course
