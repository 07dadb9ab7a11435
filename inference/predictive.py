"""Draws of latent population means from a fitted program: globals from the guide, latents exactly."""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro import handlers

from hilbertcell.models.dose_curves import dose_curve
from hilbertcell.models.effects import extend_effects, similarity_kernels
from hilbertcell.models.hidden_factors import hidden_factor_program
from hilbertcell.models.microenvironment import (
    Globals,
    Observations,
    PopulationMeans,
    draw_latents,
    draw_response,
    extend_modulation,
    response_mean,
)

if TYPE_CHECKING:
    from hilbertcell.data.perturbations import PerturbationTable
    from hilbertcell.inference.fit import Fit
    from hilbertcell.inference.tables import Vocabulary

# Globals of 2,000 features x 100 conditions take 2 MB a draw: blocks of 50 stay near 100 MB.
DRAW_BLOCK = 50

# Without the optimiser programs compile twice as fast and run five times slower: for calls on fewer numbers than
# this, ten of which take a second, that is a gain.
QUICK_COMPILE = {"xla_backend_optimization_level": 0}
_SMALL = 500_000


def compiled[**P, R](function: Callable[P, R], *static: str) -> Callable[P, R]:
    """`jax.jit` of a function of arrays that is called about ten times, optimised where the arrays are large.

    `static` names the arguments that are not arrays.
    """
    quick = jax.jit(function, static_argnames=static, compiler_options=QUICK_COMPILE)
    full = jax.jit(function, static_argnames=static)

    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        size = sum(np.size(leaf) for leaf in jax.tree.leaves((args, options)))
        return (quick if size < _SMALL else full)(*args, **options)

    return call


class BatchTargets(NamedTuple):
    """What is known of one batch and what is asked of it; T targets."""

    observations: Observations  # one batch, numpy, (C + J, D)
    condition: np.ndarray  # (T,) index of each target's condition in the extended vocabulary
    context: np.ndarray  # (T,)
    seen: Observations  # mean, noise (T, D), observed (T,): the targets' own cells where they were given
    identity: np.ndarray  # (T,) a target's draws depend on it and not on what else is asked


class BatchDraws(NamedTuple):
    """Latent means of one batch, standardised features; S draws."""

    response: np.ndarray  # (S, T, D)
    control: np.ndarray  # (S, T, D) control mean of each target's context
    microenvironment: np.ndarray  # (S, K)


def globals_sampler(fit: "Fit") -> Callable[[Array], tuple[dict[str, Array], Globals]]:
    """Compiled map from keys (S,) to draws of the program's sites and of the globals of training.

    A variational fit draws from its guide; one by NUTS picks among its draws, with replacement.
    """
    args = fit.program_args
    if fit.posterior:
        draws = {name: jnp.asarray(x.reshape(-1, *x.shape[2:])) for name, x in fit.posterior.items()}
        number = len(draws["slope"])

        def sample(key: Array) -> dict[str, Array]:
            chosen = jax.random.randint(key, (), 0, number)
            return {name: values[chosen] for name, values in draws.items()}
    else:
        guide = fit.guide()
        params = {name: jnp.asarray(value) for name, value in fit.params.items()}

        def sample(key: Array) -> dict[str, Array]:
            return guide.sample(key, params)

    def one(key: Array) -> tuple[dict[str, Array], Globals]:
        sites = sample(key)
        return sites, handlers.substitute(handlers.seed(hidden_factor_program, 0), data=sites)(*args)

    size = DRAW_BLOCK * fit.feature_map.num_features * len(fit.names.conditions)
    return jax.jit(jax.vmap(one), compiler_options={} if size > _SMALL else QUICK_COMPILE)


def draw_globals(
    fit: "Fit", names: "Vocabulary", perturbations: "PerturbationTable", num_samples: int, seed: int
) -> Iterator[tuple[slice, Globals]]:
    """Draws of the globals in blocks, extended to all conditions of `names`.

    Conditions that training did not see are drawn from their prior given the others; the strength and the own
    loadings of a (perturbation, dose) never seen are drawn given those of the perturbation's doses that were.
    """
    num_known, num_new = len(fit.names.conditions), len(names.conditions) - len(fit.names.conditions)
    key_sites, key_extend = jax.random.split(jax.random.key(seed))
    site_keys, extend_keys = (
        jax.random.split(key_sites, num_samples),
        jax.random.split(key_extend, num_samples),
    )
    if num_new:
        kernels = similarity_kernels(names.structure(perturbations))
        # A kernel that training could not tell apart from others had no amplitude there; it stays switched off.
        switched_on = similarity_kernels(fit.names.structure(fit.perturbations))
        stacked = jnp.asarray(np.stack([kernels[name] for name in switched_on]))
        level, curve = names.level_index(), dose_curve(names.levels, len(fit.names.levels))
        first = np.unique(level[:num_known], return_index=True)[1]  # a condition of each level seen

        def extend(key: Array, amplitudes: Array, drawn: Globals) -> Globals:
            key_effect, key_strength, key_modulation = jax.random.split(key, 3)
            noise = jax.random.normal(key_effect, (num_new, drawn.effect.shape[1]), drawn.effect.dtype)
            effect = extend_effects(
                stacked, amplitudes, drawn.effect_scale, drawn.effect, np.arange(num_known), noise
            )
            if len(fit.names.levels) == 1:  # without several levels strength is no unknown but the unit
                by_level = jnp.ones(len(names.levels), drawn.effect.dtype)
            else:  # half normal: a standard normal without its sign
                white = jax.random.normal(key_strength, (len(curve.weights),), drawn.effect.dtype)
                by_level = jnp.abs(curve.extend(drawn.strength[first], white))
            modulation = extend_modulation(key_modulation, drawn, level, first, curve)
            return drawn._replace(effect=effect, strength=by_level[level], modulation=modulation)

        extend_all = compiled(jax.vmap(extend))
    for start in range(0, num_samples, DRAW_BLOCK):
        block = slice(start, min(start + DRAW_BLOCK, num_samples))
        sites, drawn = fit.sample_globals(site_keys[block])
        if num_new:
            drawn = extend_all(extend_keys[block], sites["effect_amplitude"], drawn)
        yield block, drawn


@compiled
def _draw_batch(
    keys: Array,
    globals_: Globals,
    observations: Observations,
    condition: Array,
    context: Array,
    seen: Observations,
    identity: Array,
) -> tuple[Array, Array, Array]:
    seen = jax.tree.map(lambda leaf: leaf[:, None], seen)

    def one(key: Array, globals_: Globals) -> tuple[Array, Array, Array]:
        key_latents, key_response = jax.random.split(key)
        latents = draw_latents(key_latents, globals_, observations)

        def target(identity: Array, condition: Array, context: Array, seen: Observations) -> Array:
            key = jax.random.fold_in(key_response, identity)
            return draw_response(key, globals_, latents, condition[None], context[None], seen)[0]

        response = jax.vmap(target)(identity, condition, context, seen)
        return response, latents.control_mean[context], latents.microenvironment

    return jax.lax.map(lambda draw: one(*draw), (keys, globals_))  # what one draw needs stays in the cache


def draw_batch(keys: Array, globals_: Globals, targets: BatchTargets) -> BatchDraws:
    """Draws for one batch, one per key and draw of the globals (leading axis S of every leaf)."""
    drawn = _draw_batch(
        keys,
        globals_,
        targets.observations,
        targets.condition,
        targets.context,
        targets.seen,
        targets.identity,
    )
    return BatchDraws(*(np.asarray(value) for value in drawn))


@compiled
def batch_log_density(globals_: Globals, observations: Observations) -> Array:
    """Collapsed log density (S, B) of every batch under draws of the globals (leading axis S)."""
    return jax.lax.map(lambda g: PopulationMeans(g, observations).log_prob(observations.mean), globals_)


@compiled
def draw_batches(
    keys: Array, globals_: Globals, observations: Observations, condition: Array, context: Array, gene: Array
) -> tuple[Array, Array]:
    """Draws of `u` (S, B, K) of batches given their observed populations, and of responses under it.

    The responses (S, B, M, L), standardised, are the expected shifts of the given (condition, context), each (M,), in
    its features `gene` (M, L): without what is particular to one population.
    """

    def one(key: Array, globals_: Globals) -> tuple[Array, Array]:
        def batch(own: tuple[Array, Observations]) -> tuple[Array, Array]:
            latents = draw_latents(own[0], globals_, own[1])
            mean = response_mean(globals_, latents, condition, context)
            response = jnp.take_along_axis(mean - latents.control_mean[context], gene, axis=1)
            return latents.microenvironment, response

        return jax.lax.map(batch, (jax.random.split(key, observations.mean.shape[0]), observations))

    return jax.lax.map(lambda draw: one(*draw), (keys, globals_))


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
