"""Training as `init` and `step`: the published optimiser, learning rate, clipping and weight average.

AdamW with one rule that is easy to miss: a parameter that the batch's loss does not reach is left alone altogether
(no decay, no momentum, no count), as the published framework does with missing gradients. Covariates are dropped for
whole batches, so the class map and the covariate encoder are updated in half of the steps and the null class in the
other half, each counting its own steps; what is never reached keeps its first value.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from hilbertcell.models.perturbdiff.covariates import CovariateEncoder
from hilbertcell.models.perturbdiff.denoiser import Denoiser
from hilbertcell.models.perturbdiff.objective import Batch, Draws, Dropout, LossTerms, denoising_loss, draw
from hilbertcell.models.perturbdiff.schedule import linear_schedule
from hilbertcell.models.perturbdiff.state_dict import named_arrays, with_arrays

Networks = tuple[Denoiser, CovariateEncoder]


@dataclass(frozen=True)
class Recipe:
    """Settings of a training; defaults are the published recipe for PBMC from scratch."""

    max_steps: int = 200_000
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.98)
    epsilon: float = 1e-8
    weight_decay: float = 0.01
    clip_norm: float = 1.0
    average_decay: float = 0.99
    average_every: int = 10
    energy_weight: float = 1.0
    num_train_steps: int = 1000
    dropout: Dropout = field(default_factory=Dropout)
    compute_dtype: str = "float32"


class TrainState(NamedTuple):
    """All that a resumed training needs."""

    networks: Networks
    optimiser: optax.OptState
    average: Networks  # what to sample with
    num_averaged: Array  # int
    step: Array  # int, optimiser steps done


class TrainInfo(NamedTuple):
    """What a log wants to see of one step."""

    loss: Array
    terms: LossTerms  # per set
    gradient_norm: Array  # before clipping
    learning_rate: Array


def learning_rate_ratio(step: Array, max_steps: int, warmup: int = 200, plateau: float = 0.1) -> Array:
    """Multiplier of the learning rate at optimiser step 0, 1, ...

    Linear from 0 (the first step moves nothing) over `warmup` steps, 1 for a share `plateau` of `max_steps`, then a
    half cosine towards 0 that is cut off at 0.1, not rescaled to end there.
    """
    flat_until = warmup + plateau * max_steps
    progress = (step - flat_until) / (max_steps - flat_until)
    cosine = jnp.maximum(0.1, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)))
    return jnp.where(step < warmup, step / warmup, jnp.where(step < flat_until, 1.0, cosine))


def init(networks: Networks, recipe: Recipe) -> TrainState:
    """Start of a training of `networks`, whose arrays are copied.

    Raises:
        ValueError: if the recipe has fewer steps than its learning rate needs to warm up.
    """
    if recipe.max_steps <= 223:
        raise ValueError(
            f"max_steps = {recipe.max_steps}: the learning rate warms up for 200 steps, take more than 223"
        )
    # Copies, because a step consumes (donates) the state it is given.
    networks, average = (jax.tree.map(jnp.copy, networks) for _ in range(2))
    state = _optimiser(networks, recipe).init(_trainable(networks))
    return TrainState(networks, state, average, jnp.zeros((), int), jnp.zeros((), int))


@partial(jax.jit, static_argnames="recipe", donate_argnames="state")
def step(state: TrainState, batch: Batch, key: Array, recipe: Recipe) -> tuple[TrainState, TrainInfo]:
    """One optimiser step on fresh draws; consumes `state`."""
    draws = draw(key, batch.x0.shape, recipe.num_train_steps, recipe.dropout)
    (loss, terms), gradients = loss_and_gradients(state.networks, batch, draws, recipe)
    reached = _reached(state.networks, batch, draws)
    parameters = _trainable(state.networks)
    updates, optimiser = _optimiser(state.networks, recipe).update(
        gradients, state.optimiser, parameters, reached=reached
    )
    rate = (recipe.learning_rate * learning_rate_ratio(state.step, recipe.max_steps)).astype(jnp.float32)
    networks = with_arrays(*state.networks, {n: p - rate * updates[n] for n, p in parameters.items()})
    state = state._replace(networks=networks, optimiser=optimiser, step=state.step + 1)
    average, num_averaged = jax.lax.cond(
        (state.step - 1) % recipe.average_every == 0,
        lambda average, number: _average(average, number, networks, recipe.average_decay),
        lambda *old: old,
        state.average,
        state.num_averaged,
    )
    state = state._replace(average=average, num_averaged=num_averaged)
    norm = jnp.sqrt(sum(jnp.square(g).sum() for g in gradients.values()))
    return state, TrainInfo(loss, terms, norm, rate)


def update_average(state: TrainState, recipe: Recipe) -> TrainState:
    """Take the weights into their average: the first time a copy, then `average_decay`.

    `step` does so after optimiser steps 1, 11, 21, ...; the published training also does after every epoch, which
    is for the loop that knows epochs.
    """
    average, number = _average(state.average, state.num_averaged, state.networks, recipe.average_decay)
    return state._replace(average=average, num_averaged=number)


def loss_and_gradients(
    networks: Networks, batch: Batch, draws: Draws, recipe: Recipe
) -> tuple[tuple[Array, LossTerms], dict[str, Array]]:
    """The loss with its terms, and its gradient by official parameter name (zero where it does not reach)."""
    schedule = linear_schedule(recipe.num_train_steps)

    def loss(networks: Networks) -> tuple[Array, LossTerms]:
        return denoising_loss(*networks, batch, draws, schedule, recipe.energy_weight, recipe.compute_dtype)

    value, gradients = eqx.filter_value_and_grad(loss, has_aux=True)(networks)
    return value, named_arrays(*gradients)


def parameter_group(name: str, depth: int) -> str:
    """Which batches reach a parameter: "always", "never", "condition", "null", or "source NAME"."""
    never = r"model\.(gene_embedding\.(gene_embedding|layer_norm)|control_final_layer)\..*"
    never += rf"|model\.blocks\.{depth - 1}\.block\.control_mlp\..*|cov_encoder\.\w+\.0\.weight"
    if re.fullmatch(never, name):
        return "never"
    if name == "model.class_embedding.null_emb.weight":
        return "null"
    if name.startswith(("cov_encoder.", "model.class_embedding.emb.")):
        return "condition"
    if match := re.fullmatch(r"model\.x_(?:control_)?embedder\.(.+)\.(?:weight|bias)", name):
        return f"source {match[1]}"
    return "always"


def is_decayed(name: str) -> bool:
    """Weight decay spares biases only; tables, null vectors and query/key scales are decayed, as published."""
    return not name.endswith(".bias")


def _average(average: Networks, number: Array, networks: Networks, decay: float) -> tuple[Networks, Array]:
    """Mean weights with `networks` taken in, and how many were."""
    kept = jnp.where(number == 0, 0.0, decay)

    def mix(old: Array, new: Array) -> Array:
        return kept * old + (1.0 - kept) * new if eqx.is_inexact_array(old) else new

    return jax.tree.map(mix, average, networks), number + 1


def _trainable(networks: Networks) -> dict[str, Array]:
    """Floating-point arrays by official name."""
    return {name: a for name, a in named_arrays(*networks).items() if eqx.is_inexact_array(a)}


def _reached(networks: Networks, batch: Batch, draws: Draws) -> dict[str, Array]:
    """Which groups this batch reaches."""
    reached = {"condition": draws.keep_condition.any(), "null": ~draws.keep_condition.all()}
    for i, source in enumerate(networks[0].sources):
        reached[f"source {source}"] = (jnp.asarray(batch.source) == i).any()
    return reached


def _optimiser(networks: Networks, recipe: Recipe) -> optax.GradientTransformationExtraArgs:
    """Clipping, then AdamW per group of parameters; its updates still lack the learning rate and its sign."""
    depth = len(networks[0].blocks)
    groups = {name: parameter_group(name, depth) for name in _trainable(networks)}

    def decay_mask(parameters: Mapping[str, Array]) -> dict[str, bool]:
        return {name: is_decayed(name) for name in parameters}

    adamw = optax.chain(
        optax.scale_by_adam(*recipe.betas, recipe.epsilon),
        optax.add_decayed_weights(recipe.weight_decay, decay_mask),
    )

    def when_reached(group: str) -> optax.GradientTransformationExtraArgs:
        return optax.conditionally_mask(adamw, lambda _, reached: reached[group], forward_extra_args=True)

    rules = {group: when_reached(group) for group in set(groups.values()) - {"always", "never"}}
    rules |= {"always": adamw, "never": optax.set_to_zero()}
    return optax.chain(optax.clip_by_global_norm(recipe.clip_norm), optax.partition(rules, groups))
