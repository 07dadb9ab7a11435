"""What a denoiser is told of a population: draws of the program in coordinates, and labels, as one row of features.

The network sees *drawn* latents, never estimates: for a training batch they are drawn given all of its populations, the
perturbed ones included. That is no leak but the posterior that the ELBO asks for: with `u` from p(u | v_hat, controls)
the pairs (u, v_hat) have the joint law of the program, and what the network learns is p(v | u). Latents drawn given the
controls alone would be independent of v given these, and a law learned on them would count their spread twice. At
prediction they are drawn from p(u | what was observed of the batch), and the law of v is the mixture. Given `u`, `d` and
`m_ctrl` the populations of a batch are independent, so several of them need no special case.

The microenvironment is rotated to a common orientation by its loadings: it is identified up to rotation only, and draws
of different chains may differ in it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.inference.predictive import compiled
from hilbertcell.models.coordinates import CoordinateMap, ResidualBasis, given_draws, residual_basis
from hilbertcell.models.denoisers import Condition
from hilbertcell.models.microenvironment import Globals, Latents, Observations, draw_latents

if TYPE_CHECKING:
    from hilbertcell.data.perturbations import PerturbationTable
    from hilbertcell.inference.tables import Vocabulary

# Leading coordinates of own baseline, batch effect and mean response that a network sees: signal is ordered, and every
# further input is one more that a few dozen batches must not be fitted by.
NUM_LEADING = 8


class Description(NamedTuple):
    """How rows of features are made; arrays, so that it can be stored."""

    reference: Array  # (2 D, K) loadings that microenvironments are turned to
    center: Array  # (F,) of the features of the training populations
    scale: Array  # (F,)


class ProgramDraws(NamedTuple):
    """Draws of the program for S draws, B batches and T populations each."""

    mean: Array  # (S, B, T, Q)
    basis: ResidualBasis  # (S, C, ...)
    strength: Array  # (S, B, T)
    features: Array  # (S, B, T, F)


def reference_loadings(globals_: Globals) -> Array:
    """Loadings (2 D, K) on baseline and response, what a microenvironment does."""
    return jnp.concatenate([globals_.baseline_loading, globals_.response_loading])


def label_features(
    names: "Vocabulary", perturbations: "PerturbationTable", known: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Features (E, F) of conditions by their labels, and which columns (F,) say what the perturbation is called.

    Context, the single perturbations among `known` that make it up (a combination is their set), log dose, and the
    perturbation features where there are any: an unseen perturbation has these alone.
    """
    structure = names.structure(perturbations)
    context = np.eye(len(names.contexts))[structure.context]
    place = {name: i for i, name in enumerate(perturbations.singles)}
    members = np.stack(
        [structure.components[:, place[name]] if name in place else np.zeros(len(context)) for name in known],
        axis=1,
    )
    dose = np.nan_to_num(np.log10(structure.dose))[:, None]
    given = np.zeros((len(context), 0)) if structure.features is None else structure.features
    named = np.repeat([False, True, False], [context.shape[1], members.shape[1], 1 + given.shape[1]])
    return np.hstack([context, members, dose, given]), named


def describe(
    globals_: Globals,
    basis: ResidualBasis,
    mapping: CoordinateMap,
    description: Description,
    latents: Latents,
    condition: Array,
    context: Array,
    labels: Array,
) -> Condition:
    """Conditions (T, ...) of targets of one batch: the program in coordinates, and the row of features.

    `labels` (T, F') are those of `label_features`. The row: u, then leading coordinates of own baseline, batch effect
    and mean response, strength and log size of S, labels.
    """
    num_targets, u = len(condition), latents.microenvironment
    if len(u):  # orthogonal Procrustes (Schonemann 1966)
        left, _, right = jnp.linalg.svd(reference_loadings(globals_).T @ description.reference)
        u = u @ (left @ right)
    own = (latents.control_mean[context] - globals_.alpha[context]) @ mapping.directions[:, :NUM_LEADING]
    shared = latents.batch_effect @ mapping.directions[:, :NUM_LEADING]
    plain = given_draws(
        globals_, basis, mapping, latents, condition, context, jnp.zeros((num_targets, 0), u.dtype)
    )
    response = (plain.mean - mapping(latents.control_mean[context]))[:, :NUM_LEADING]
    strength = globals_.strength[condition][:, None]
    width = 0.5 * jnp.log(basis.values[context].mean(-1, keepdims=True))
    row = jnp.concatenate(
        [
            jnp.tile(u, (num_targets, 1)),
            own,
            jnp.tile(shared, (num_targets, 1)),
            response,
            strength,
            width,
            labels,
        ],
        axis=1,
    )
    return plain._replace(features=(row - description.center) / description.scale)


@compiled
def program_draws(
    keys: Array,
    globals_: Globals,
    observations: Observations,
    mapping: CoordinateMap,
    description: Description,
    labels: Array,
) -> ProgramDraws:
    """Draws for every slot of a table of batches, given all that is marked as observed there.

    `keys` (S,) and `globals_` (S, ...); `observations` (B, ...); `labels` (E, F') features of all conditions.
    """

    def one(key: Array, globals_: Globals) -> ProgramDraws:
        basis = residual_basis(globals_, mapping)

        def batch(own: tuple[Array, Observations]) -> Condition:
            key, observed = own
            latents = draw_latents(key, globals_, observed)
            rows = labels[observed.condition]
            return describe(
                globals_, basis, mapping, description, latents, observed.condition, observed.context, rows
            )

        batch_keys = jax.random.split(key, observations.mean.shape[0])
        drawn = jax.lax.map(batch, (batch_keys, observations))
        return ProgramDraws(drawn.mean, basis, globals_.strength[observations.condition], drawn.features)

    return jax.lax.map(lambda draw: one(*draw), (keys, globals_))
