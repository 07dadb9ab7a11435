"""Running a training over a data stream: one compiled step, saved states, and going on after a kill to the same weights."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hilbertcell.data.workers import ahead
from hilbertcell.inference.perturbdiff.cell_sets import CellSets
from hilbertcell.models.perturbdiff import CovariateEncoder, Denoiser, Recipe, TrainState, training

Networks = tuple[Denoiser, CovariateEncoder]
_LOOK = 50  # steps between two looks at the losses; in between nothing waits for the device


class Saving(NamedTuple):
    """Where states are kept, how often, and what tells this training from others."""

    path: Path
    every: int
    fingerprint: str


class Trained(NamedTuple):
    """Networks at the end, the average of their weights, and the loss of every step (squared error, energy)."""

    networks: Networks
    average: Networks
    losses: np.ndarray  # (steps, 2)


def train(
    networks: Networks,
    sets: CellSets,
    recipe: Recipe,
    seed: int,
    *,
    saving: Saving | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Trained:
    """Train `networks` for `recipe.max_steps` steps.

    Draws of step i depend on `seed` and i alone. With `saving` the state is kept every so often, whole or not at
    all; a training that finds such a file goes on from it, and removes it at the end.

    Raises:
        FloatingPointError: the loss is not finite any more; the message names a step.
        ValueError: the saved state is that of another training.
    """
    key = jax.random.key(seed)
    state, losses = training.init(networks, recipe), np.zeros((0, 2), np.float32)
    if saving is not None and saving.path.exists():
        state, losses = _load(saving, state)
    start = len(losses)
    recent: list[Array] = []
    batches = ((i, sets.step(i)) for i in range(start, recipe.max_steps))
    for i, batch in ahead(batches):
        arrays = jax.tree.map(jnp.asarray, batch)
        state, info = training.step(state, arrays, jax.random.fold_in(key, i), recipe)
        recent.append(jnp.stack([term.mean() for term in info.terms]))
        done = i + 1
        if done % sets.steps_per_epoch == 0:  # published: an average after each epoch, too
            state = training.update_average(state, recipe)
        save = saving is not None and done % saving.every == 0 and done < recipe.max_steps
        if save or done == recipe.max_steps or len(recent) == _LOOK:
            losses = np.concatenate([losses, np.asarray(jnp.stack(recent))])
            _check(losses, recipe)
            if on_progress:
                on_progress(len(recent))
            recent = []
        if save:
            assert saving is not None
            _save(saving, state, losses)
    if saving is not None:
        saving.path.unlink(missing_ok=True)
    return Trained(state.networks, state.average, losses)


def _check(losses: np.ndarray, recipe: Recipe) -> None:
    if not np.isfinite(losses).all():
        step = int(np.argmin(np.isfinite(losses).all(axis=1)))
        raise FloatingPointError(
            f"the loss is not finite from step {step} on: lower learning_rate (now {recipe.learning_rate:g}) or look "
            "for cells of extreme values"
        )


def _save(saving: Saving, state: TrainState, losses: np.ndarray) -> None:
    leaves = {f"state.{i:05d}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
    unfinished = saving.path.with_name(f".{saving.path.name}.unfinished")
    save_file(leaves | {"losses": losses}, unfinished, {"training": json.dumps(saving.fingerprint)})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(unfinished, saving.path)


def _load(saving: Saving, like: TrainState) -> tuple[TrainState, np.ndarray]:
    leaves, structure = jax.tree.flatten(like)
    try:
        with safe_open(saving.path, "numpy") as file:
            found = json.loads((file.metadata() or {}).get("training", "null"))
            if found != saving.fingerprint:
                raise ValueError(
                    f"{saving.path} is the state of another training; remove it to begin this one, or name another output"
                )
            stored = [file.get_tensor(f"state.{i:05d}") for i in range(len(leaves))]
            losses = file.get_tensor("losses")
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"{saving.path} is not the state of a training ({error}); remove it to begin again"
        ) from None
    return structure.unflatten([jnp.asarray(leaf) for leaf in stored]), losses
