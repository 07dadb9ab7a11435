"""Draws of latent population means from a fitted program: globals from the guide, latents exactly."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from hilbertcell.models.effects import extend_effects, similarity_kernels
from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import (
    Globals,
    Observations,
    PopulationMeans,
    draw_latents,
    draw_response,
)

if TYPE_CHECKING:
    from hilbertcell.data.perturbations import PerturbationTable
    from hilbertcell.inference.fit import Fit
    from hilbertcell.inference.tables import Vocabulary

# Globals of 2,000 features x 100 conditions take 2 MB a draw: blocks of 50 stay near 100 MB.
DRAW_BLOCK = 50


class BatchTargets(NamedTuple):
    """What is known of one batch and what is asked of it; T targets."""

    observations: Observations  # one batch, numpy, (C + J, D)
    condition: np.ndarray  # (T,) index of each target's condition in the extended vocabulary
    context: np.ndarray  # (T,)
    seen: Observations  # mean, noise (T, D), observed (T,): the targets' own cells where they were given


class BatchDraws(NamedTuple):
    """Latent means of one batch, standardised features; S draws."""

    response: np.ndarray  # (S, T, D)
    control: np.ndarray  # (S, T, D) control mean of each target's context
    microenvironment: np.ndarray  # (S, K)


def draw_globals(
    fit: "Fit", names: "Vocabulary", perturbations: "PerturbationTable", num_samples: int, seed: int
) -> Iterator[tuple[slice, Globals]]:
    """Draws of the globals in blocks, effects extended to all conditions of `names`.

    Conditions that training did not see are drawn from their prior given the others; a (perturbation, dose)
    never seen draws its strength from the prior.
    """
    kernels = similarity_kernels(names.structure(perturbations))
    known_kernels = similarity_kernels(fit.names.structure(fit.perturbations))
    # A kernel that training could not tell apart from others had no amplitude there; it stays switched off.
    stacked = jnp.asarray(np.stack([kernels[name] for name in known_kernels]))
    known = np.arange(len(fit.names.conditions))
    level = names.level_index()
    num_known_levels = len(fit.names.levels)
    num_new = len(names.conditions) - len(known)
    guide = fit.guide()
    params = {name: jnp.asarray(value) for name, value in fit.params.items()}

    def one(key: Array, sites: dict[str, Array]) -> Globals:
        key_effect, key_strength = jax.random.split(key)
        program = handlers.substitute(handlers.seed(hidden_factor_program, 0), data=sites)
        drawn = program(*fit.program_args)
        noise = jax.random.normal(key_effect, (num_new, drawn.effect.shape[1]), drawn.effect.dtype)
        effect = extend_effects(stacked, sites["effect_amplitude"], drawn.effect_scale, drawn.effect, known, noise)
        by_level = jnp.abs(jax.random.normal(key_strength, (len(names.levels),), drawn.effect.dtype))
        by_level = by_level.at[level[: len(known)]].set(drawn.strength)
        if num_known_levels == 1:  # without several levels strength is not a site but the unit
            by_level = jnp.ones_like(by_level)
        return drawn._replace(effect=effect, strength=by_level[level])

    key_sites, key_extend = jax.random.split(jax.random.key(seed))
    site_keys, extend_keys = jax.random.split(key_sites, num_samples), jax.random.split(key_extend, num_samples)
    draw_sites = jax.jit(jax.vmap(lambda key: guide.sample(key, params)))
    extend = jax.jit(jax.vmap(one))
    for start in range(0, num_samples, DRAW_BLOCK):
        block = slice(start, min(start + DRAW_BLOCK, num_samples))
        yield block, extend(extend_keys[block], draw_sites(site_keys[block]))


@jax.jit
def _draw_batch(
    keys: Array, globals_: Globals, observations: Observations, condition: Array, context: Array, seen: Observations
) -> tuple[Array, Array, Array]:
    def one(key: Array, globals_: Globals) -> tuple[Array, Array, Array]:
        key_latents, key_response = jax.random.split(key)
        latents = draw_latents(key_latents, globals_, observations)
        response = draw_response(key_response, globals_, latents, condition, context, seen)
        return response, latents.control_mean[context], latents.microenvironment

    return jax.vmap(one)(keys, globals_)


def draw_batch(key: Array, globals_: Globals, targets: BatchTargets) -> BatchDraws:
    """Draws for one batch, one per draw of the globals (leading axis S of every leaf)."""
    keys = jax.random.split(key, globals_.slope.shape[0])
    drawn = _draw_batch(keys, globals_, targets.observations, targets.condition, targets.context, targets.seen)
    return BatchDraws(*(np.asarray(value) for value in drawn))


@jax.jit
def batch_log_density(globals_: Globals, observations: Observations) -> Array:
    """Collapsed log density (S, B) of every batch under draws of the globals (leading axis S)."""
    return jax.vmap(lambda g: PopulationMeans(g, observations).log_prob(observations.mean))(globals_)


@jax.jit
def draw_microenvironments(keys: Array, globals_: Globals, observations: Observations) -> Array:
    """Draws (S, B, K) of `u` of batches given their observed populations."""

    def one(key: Array, globals_: Globals) -> Array:
        batch_keys = jax.random.split(key, observations.mean.shape[0])
        draw = jax.vmap(lambda k, batch: draw_latents(k, globals_, batch).microenvironment)
        return draw(batch_keys, observations)

    return jax.vmap(one)(keys, globals_)


def align(microenvironment: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rotate draws (S, B, K) onto a common orientation; returns aligned draws and rotations (S, K, K).

    Orthogonal Procrustes (Schonemann 1966) to the running mean of the aligned draws, three sweeps from the first
    draw; then principal axes in order of spread between batches, each with positive largest entry.
    """
    num_factors = microenvironment.shape[2]
    rotation = np.tile(np.eye(num_factors), (len(microenvironment), 1, 1))
    if num_factors == 0:
        return microenvironment, rotation
    reference = microenvironment[0]
    for _ in range(3):
        left, _, right = np.linalg.svd(np.einsum("sbk,bl->skl", microenvironment, reference))
        rotation = left @ right
        reference = (microenvironment @ rotation).mean(axis=0)
    axes = np.linalg.svd(reference, full_matrices=True)[2].T
    largest = reference @ axes
    signs = np.sign(largest[np.abs(largest).argmax(axis=0), np.arange(num_factors)])
    rotation = rotation @ (axes * np.where(signs == 0, 1.0, signs))
    return microenvironment @ rotation, rotation
