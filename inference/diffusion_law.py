"""The trained response law: a diffusion of populations in coordinates around the hidden-factor program.

Draws of the globals come from the fit, batch latents exactly; given both, populations are drawn by the trained denoiser
in signal-ordered coordinates and completed by the program in the rest (`models.coordinates`). Populations of which cells
were given are drawn by the program alone, in closed form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.data.moments import Moments
from hilbertcell.inference.denoiser_training import Recipe, TrainingData, train
from hilbertcell.inference.diffusion_conditions import (
    Description,
    describe,
    label_features,
    program_draws,
    reference_loadings,
)
from hilbertcell.inference.predictive import BatchDraws, BatchTargets, compiled, draw_globals
from hilbertcell.inference.samplers import Sampler, split_sampler
from hilbertcell.inference.score_matching import Conditions, NoisyPoints, noisy_points
from hilbertcell.inference.tables import program_table, shrunken_covariance
from hilbertcell.models.coordinates import CoordinateMap, complete, coordinate_map, residual_basis
from hilbertcell.models.denoisers import ResidualDenoiser, init_network
from hilbertcell.models.microenvironment import Globals, Observations, draw_latents, draw_response

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

NUM_DRAWS = 32  # of the program behind the training of a network: enough that it cannot learn single draws
_HELD_OUT = 0.2  # share of the batches on which training is stopped
_WIDTH, _DEPTH = 64, 2  # of the network: a few hundred populations feed it
LEADING = (
    8  # coordinates it sees and moves: with more, it learns the sampling error of those that are Gaussian
)
RECIPE = Recipe()
_CONSTANT = 1e-8  # sd below which a feature says nothing


@dataclass(frozen=True, eq=False)
class DiffusionLaw:
    """A denoiser with what it takes to tell it about a population, and the course of its training."""

    denoiser: ResidualDenoiser
    description: Description
    course: np.ndarray  # (blocks, 2) losses less the program's: training, held-out batches

    @property
    def is_program(self) -> bool:
        """Whether training kept the program as it was: nothing held up on the held-out batches."""
        return not np.any(np.asarray(self.denoiser.network.exit.weight))

    @property
    def sample_stats(self) -> dict[str, tuple[tuple[str, ...], Any]]:
        """Variables for draws: the course of training (block, part), denoiser evaluations behind one draw ()."""
        return {
            "law_loss": (("block", "part"), self.course),  # parts: training, held-out batches
            "denoiser_evaluations": ((), split_sampler.num_steps),
        }

    def draw_batch(
        self,
        mapping: CoordinateMap,
        keys: Array,
        globals_: Globals,
        targets: BatchTargets,
        labels: np.ndarray,
        sampler: Sampler = split_sampler,
    ) -> BatchDraws:
        """Draws for one batch, as `predictive.draw_batch`; `labels` (E, F') are those of all conditions of `globals_`.

        Targets of which cells were given are drawn by the program, given these.
        """
        rows = labels[targets.condition]
        drawn = _draw(
            keys, globals_, targets, rows, mapping, self.description, self.denoiser, sampler=sampler
        )
        return BatchDraws(*(np.asarray(value) for value in drawn))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, ready for safetensors; weights by their path, `denoiser.network.blocks.0.inner.weight`."""
        leaves = jax.tree.leaves_with_path(self.denoiser)
        weights = {f"denoiser.{_dotted(path)}": np.asarray(leaf) for path, leaf in leaves}
        description = {f"description.{name}": np.asarray(x) for name, x in self.description._asdict().items()}
        return {**weights, **description, "course": self.course}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray], num_coordinates: int) -> "DiffusionLaw":
        """Inverse of `to_arrays`."""
        description = Description(*(arrays[f"description.{name}"] for name in Description._fields))
        like = jax.eval_shape(
            lambda: _new_denoiser(jax.random.key(0), num_coordinates, description, jnp.zeros(()))
        )
        denoiser = jax.tree.map_with_path(
            lambda path, _: jnp.asarray(arrays[f"denoiser.{_dotted(path)}"]), like
        )
        return cls(denoiser, description, arrays["course"])


def _dotted(path: tuple[Any, ...]) -> str:
    """A path in the tree of the denoiser as the `state_dict` of its torch twin has it."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _new_denoiser(
    key: Array, num_coordinates: int, description: Description, sigma_min: Array
) -> ResidualDenoiser:
    leading = min(num_coordinates, LEADING)
    network = init_network(key, leading, len(description.center), width=_WIDTH, depth=_DEPTH)
    return ResidualDenoiser(network, sigma_min)


def mapping_of(fit: "Fit") -> CoordinateMap:
    """From the standardised features of a fit to its coordinates; call it where float64 is enabled."""
    return coordinate_map(fit.coordinates, fit.unit.center, fit.unit.scale)


def labels_of(fit: "Fit") -> tuple[np.ndarray, np.ndarray]:
    """`label_features` of the conditions of training."""
    return label_features(fit.names, fit.perturbations, fit.perturbations.singles)


class Seen(NamedTuple):
    """Perturbed populations of some batches as material for score matching, single precision."""

    batch: np.ndarray  # (P,) name of each population's batch
    points: NoisyPoints
    conditions: Conditions

    def select(self, mask: np.ndarray) -> "Seen":
        """The populations of a mask (P,)."""
        place, drawn = np.flatnonzero(mask), self.conditions
        conditions = drawn._replace(
            mean=drawn.mean[:, place],
            strength=drawn.strength[:, place],
            context=drawn.context[place],
            features=drawn.features[:, place],
        )
        return Seen(self.batch[place], NoisyPoints(*(leaf[place] for leaf in self.points)), conditions)


def train_law(
    fit: "Fit",
    *,
    seed: int = 0,
    recipe: Recipe = RECIPE,
    resume: Path | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> DiffusionLaw:
    """Train the residual network of a fit on its perturbed training populations.

    A fifth of the batches, at least one, is kept for early stopping; without a gain there the law is the program.
    `resume` and `on_progress` as for `denoiser_training.train`.
    """
    key = jax.random.key(seed)
    seen, description = see_populations(fit, fit.moments, seed)
    _, named = labels_of(fit)
    names = jnp.concatenate([jnp.zeros(len(description.center) - len(named), bool), jnp.asarray(named)])
    held_out = held_out_batches(seen.batch, _HELD_OUT, seed)
    training, stopping = (TrainingData(*seen.select(mask)[1:], names) for mask in (~held_out, held_out))
    denoiser = _new_denoiser(key, seen.points.observed.shape[1], description, jnp.min(seen.points.level))
    trained = train(
        jax.random.fold_in(key, 1),
        denoiser,
        training,
        stopping,
        recipe,
        resume=resume,
        on_progress=on_progress,
    )
    return DiffusionLaw(trained.denoiser, description, trained.course)


def held_out_batches(batches: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(P,) bool: populations of a random `share` of the batches, at least one and not all of them."""
    names = np.unique(batches)
    number = min(max(1, round(share * len(names))), len(names) - 1)
    return np.isin(batches, np.random.default_rng(seed).choice(names, number, replace=False))


def see_populations(
    fit: "Fit", moments: Moments, seed: int, description: Description | None = None
) -> tuple[Seen, Description]:
    """The perturbed populations of `moments`, with draws of the program given all that `moments` holds of their batches.

    `moments` are those of training or of other batches with contexts and conditions of the fit. Without a `description`
    the features are standardised on these populations, all but those that name the perturbation: these are 0 where it is
    an unseen one.
    """
    within = shrunken_covariance(moments, fit.prior, fit.names.contexts)
    table = program_table(moments.labels, moments.mean, within.noise_variance, fit.names, fit.unit)
    num_contexts = len(fit.names.contexts)
    place = table.observations.observed[:, num_contexts:]
    rows = table.rows[:, num_contexts:][place]
    labels, named = labels_of(fit)
    blocks, made = [], description
    with jax.enable_x64(True):
        mapping, observations = mapping_of(fit), jax.tree.map(jnp.asarray, table.observations)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), 2), NUM_DRAWS)
        for block, globals_ in draw_globals(fit, fit.names, fit.perturbations, NUM_DRAWS, seed):
            if made is None:  # features as they are, microenvironments turned to the first draw
                first = jax.tree.map(lambda leaf: leaf[0], globals_)
                made = Description(reference_loadings(first), jnp.zeros(()), jnp.ones(()))
            blocks.append(
                jax.device_get(program_draws(keys[block], globals_, observations, mapping, made, labels))
            )
        points = noisy_points(
            fit.coordinates.project(moments.mean[rows]),
            within.select(rows).project(fit.coordinates.A),
            within.n[rows],
        )
    assert made is not None
    drawn = jax.tree.map(lambda *leaves: np.concatenate(leaves), *blocks)
    features = drawn.features[:, place]
    if description is None:
        center, scale = features.mean((0, 1)), features.std((0, 1))
        scale = np.where(scale > _CONSTANT, scale, 1.0)
        center[len(center) - len(named) :][named], scale[len(scale) - len(named) :][named] = 0.0, 1.0
        description = Description(np.asarray(made.reference), center, scale)
        features = (features - center) / scale
    conditions = Conditions(
        drawn.mean[:, place], drawn.basis.vectors, drawn.basis.values, drawn.strength[:, place],
        jnp.asarray(table.observations.context[place]), features,
    )  # fmt: skip
    points, conditions = jax.tree.map(_single, (points, conditions))
    return Seen(moments.labels["batch"].to_numpy()[rows], points, conditions), description


def _single(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def _draw_targets(
    keys: Array,
    globals_: Globals,
    targets: BatchTargets,
    labels: Array,
    mapping: CoordinateMap,
    description: Description,
    denoiser: ResidualDenoiser,
    sampler: Sampler,
) -> tuple[Array, Array, Array]:
    observations, condition, context, seen, identity = targets

    def one(key: Array, globals_: Globals) -> tuple[Array, Array, Array]:
        key_latents, key_response = jax.random.split(key)
        latents = draw_latents(key_latents, globals_, observations)
        target_keys = jax.vmap(partial(jax.random.fold_in, key_response))(identity)

        def program(key: Array, condition: Array, context: Array, seen: Observations) -> Array:
            seen = jax.tree.map(lambda leaf: leaf[None], seen)
            return draw_response(key, globals_, latents, condition[None], context[None], seen)[0]

        m = jax.vmap(program)(target_keys, condition, context, seen)
        basis = residual_basis(globals_, mapping)
        given = describe(globals_, basis, mapping, description, latents, condition, context, labels)
        # Deviations from the program's mean: single precision would lose them beside it.
        around = given._replace(mean=jnp.zeros_like(given.mean))
        around = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), around)
        own = jax.vmap(lambda key: jax.random.fold_in(key, 1))(target_keys)
        v = given.mean + jax.vmap(sampler, (0, None, 0, None))(own, denoiser, around, 0.0)
        completed = complete(m, v, globals_, basis, mapping, context)
        response = jnp.where(seen.observed[:, None], m, completed)
        return response, latents.control_mean[context], latents.microenvironment

    return jax.lax.map(lambda draw: one(*draw), (keys, globals_))


_draw = compiled(_draw_targets, "sampler")
