"""Does a group-aware prior of the response network help its worst group? `python scripts/group_prior.py`.

Rudner et al. (2024, Mind the GAP) take as minus the log prior of the weights, times a factor, a loss on a small set with
group labels: groups weighted by a softmax of their losses, so that the worst counts most, at weights that were moved by
`RADIUS` in the direction in which that loss rises fastest. A factor of 0 is training as it is.

Two places: a world made for the idea, in which one population of twenty follows another law and the features say which
(energy score of each group over that of the truth); and real donors, each left out in turn, where groups are contexts (does
training keep anything of the network at all?). Prints the tables of docs/models/hilbert_diffusion.md.
"""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import anndata
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from hilbertcell.analyses.diffusion_benchmark import draw
from hilbertcell.analyses.law_scores import energy_score
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.splits import leave_one_batch_out
from hilbertcell.inference.denoiser_training import JITTER, Recipe, TrainingData, held_out_loss
from hilbertcell.inference.diffusion_law import LEADING, held_out_batches, labels_of, see_populations
from hilbertcell.inference.fit import fit
from hilbertcell.inference.samplers import split_sampler
from hilbertcell.inference.score_matching import Conditions, deconvolution_loss, noisy_points, pick
from hilbertcell.inference.settings import Settings
from hilbertcell.models.denoisers import ResidualDenoiser, init_network

FACTORS = (0.0, 0.1, 0.3, 1.0)
RADIUS = 0.05  # of the move uphill, in the norm of all weights
SEEDS = 3
RECIPE = Recipe(num_steps=2_000)
LOOK = 100  # steps between two looks at populations that stop the training
COORDINATES, GAP, MINORITY = 16, 1.2, 0.05
SHARES = (0.5, 0.9)  # of the upper mode, in the majority and in the minority
TRAINING, LABELLED, STOPPING, SCORED, DRAWS = 2_000, 40, 400, 60, 200


class Groups(NamedTuple):
    """The labelled set; the group of each of its populations."""

    data: TrainingData
    group: Array  # (N,) int
    number: int


def mean_losses(key: Array, denoiser: ResidualDenoiser, data: TrainingData, chosen: Array) -> Array:
    """Losses (N,) less the program's, of the chosen populations (N,), each under one draw of the program."""

    def one(key: Array, population: Array) -> Array:
        key_draw, key_jitter, key_loss = jax.random.split(key, 3)
        number = data.conditions.mean.shape[0]
        condition = data.conditions.at(jax.random.randint(key_draw, (), 0, number), population)
        noise = jnp.where(data.names, 0.0, JITTER * jax.random.normal(key_jitter, data.names.shape))
        condition = condition._replace(features=condition.features + noise)
        own, program = deconvolution_loss(key_loss, denoiser, pick(data.points, population), condition)
        return own - program

    return jax.vmap(one)(jax.random.split(key, len(chosen)), chosen)


def prior(key: Array, network: eqx.Module, denoiser: ResidualDenoiser, groups: Groups) -> Array:
    """Minus the log prior of the weights of `network`."""
    member = jax.nn.one_hot(groups.group, groups.number)

    def loss(network: eqx.Module) -> Array:
        here = eqx.tree_at(lambda d: d.network, denoiser, network)
        every = mean_losses(key, here, groups.data, jnp.arange(len(groups.group)))
        own = every @ member / member.sum(0)
        return jax.nn.softmax(jax.lax.stop_gradient(own)) @ own

    uphill = jax.lax.stop_gradient(jax.grad(loss)(network))
    length = RADIUS / (optax.tree.norm(uphill) + 1e-12)
    return loss(jax.tree.map(lambda w, g: w + length * g, network, uphill))


def optimiser() -> optax.GradientTransformation:
    """Of `denoiser_training`."""
    schedule = optax.cosine_decay_schedule(RECIPE.learning_rate, RECIPE.num_steps, 0.01)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))


@partial(jax.jit, static_argnames=("factor", "number"))
def some_steps(key, start, denoiser, average, state, data, labelled, group, number, factor):
    """`LOOK` steps from step `start`; `average` is the mean of the weights that is kept."""

    def step(carry, place):
        network, average, state = carry
        keys = jax.random.split(jax.random.fold_in(key, place), 3)
        chosen = jax.random.randint(keys[0], (RECIPE.batch_size,), 0, len(data.points.level))

        def loss(network: eqx.Module) -> Array:
            here = eqx.tree_at(lambda d: d.network, denoiser, network)
            value = mean_losses(keys[1], here, data, chosen).mean()
            if factor:
                value += factor * prior(keys[2], network, denoiser, Groups(labelled, group, number))
            return value

        updates, state = optimiser().update(jax.grad(loss)(network), state)
        network = eqx.apply_updates(network, updates)
        keep = jnp.minimum(RECIPE.averaging, (1.0 + place) / (10.0 + place))
        average = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, average, network)
        return (network, average, state), None

    carry, _ = jax.lax.scan(step, (denoiser.network, average, state), start + jnp.arange(LOOK))
    return carry


def train(
    key: Array,
    denoiser: ResidualDenoiser,
    data: TrainingData,
    groups: Groups,
    stopping: TrainingData,
    factor: float,
) -> tuple[ResidualDenoiser, bool]:
    """The best denoiser by its loss on `stopping`, and whether anything is better there than the program."""
    best, best_loss, stale = denoiser, 0.0, 0
    network = average = denoiser.network
    state = optimiser().init(network)
    for start in range(0, RECIPE.num_steps, LOOK):
        at = eqx.tree_at(lambda d: d.network, denoiser, network)
        network, average, state = some_steps(
            key, start, at, average, state, data, groups.data, groups.group, groups.number, factor
        )
        found = eqx.tree_at(lambda d: d.network, denoiser, average)
        loss = float(jax.jit(held_out_loss)(jax.random.fold_in(key, RECIPE.num_steps), found, stopping))
        best, best_loss, stale = (found, loss, 0) if loss < best_loss else (best, best_loss, stale + 1)
        if stale == RECIPE.patience:
            break
    return best, best_loss < 0.0


def spectrum() -> np.ndarray:
    """Variances of the coordinates within a mode."""
    return np.geomspace(0.05, 0.002, COORDINATES)


def latent_means(rng: np.random.Generator, group: np.ndarray) -> np.ndarray:
    """(N, D): two modes in the first coordinate, their shares those of the group."""
    v = np.sqrt(spectrum()) * rng.standard_normal((len(group), COORDINATES))
    share = np.array(SHARES)[group]
    v[:, 0] += GAP * ((rng.random(len(group)) < share) - 0.5)
    return v


def material(rng: np.random.Generator, group: np.ndarray) -> tuple[TrainingData, np.ndarray]:
    """Populations of 20 to 1,000 cells as a training sees them, features first the group; their latent means."""
    num = len(group)
    n = np.exp(rng.uniform(np.log(20), np.log(1000), num))
    latent = latent_means(rng, group)
    observed = latent + rng.standard_normal(latent.shape) / np.sqrt(n)[:, None]
    values = spectrum()
    values[0] += GAP**2 / 4
    eye = np.eye(COORDINATES)
    points = noisy_points(observed, np.broadcast_to(eye, (num, *eye.shape)), n)
    features = np.concatenate([2.0 * group[:, None] - 1.0, rng.standard_normal((num, 7))], axis=1)
    conditions = Conditions(
        np.zeros((1, num, COORDINATES)), eye[None, None], values[None, None], np.ones((1, num)),
        np.zeros(num), features[None],
    )  # fmt: skip
    points, conditions = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (points, conditions))
    return TrainingData(points, conditions._replace(context=jnp.zeros(num, int)), jnp.zeros(8, bool)), latent


def joined(first: TrainingData, second: TrainingData) -> TrainingData:
    """Both; the labelled set belongs to the training set of every factor."""
    points = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), first.points, second.points)
    a, b = first.conditions, second.conditions
    both = {
        name: jnp.concatenate([getattr(a, name), getattr(b, name)], axis=1)
        for name in ("mean", "strength", "features")
    }
    return TrainingData(
        points, a._replace(**both, context=jnp.concatenate([a.context, b.context])), first.names
    )


def made_world(seed: int) -> None:
    """Energy score of each group over that of the truth."""
    rng, key = np.random.default_rng(seed), jax.random.key(seed)
    drawn = [(rng.random(num) < MINORITY).astype(int) for num in (TRAINING, STOPPING)]
    label = np.repeat([0, 1], LABELLED)
    (data, _), (stopping, _), (labelled, _) = (material(rng, group) for group in (*drawn, label))
    scored, latent = material(rng, np.repeat([0, 1], SCORED))
    conditions = jax.vmap(lambda j: scored.conditions.at(jnp.asarray(0), j))(jnp.arange(2 * SCORED))
    data, groups = joined(data, labelled), Groups(labelled, jnp.asarray(label), 2)
    network = init_network(key, LEADING, 8, width=64, depth=2)
    start = ResidualDenoiser(network, jnp.min(data.points.level))

    def score(draws: np.ndarray) -> np.ndarray:
        values = [energy_score(draws[:, t], latent[t]) for t in range(2 * SCORED)]
        return np.array(values).reshape(2, SCORED).mean(1)

    best = score(np.stack([latent_means(rng, np.repeat([0, 1], SCORED)) for _ in range(DRAWS)]))
    rows = {"program": start} | {
        f"factor {f:g}": train(key, start, data, groups, stopping, f)[0] for f in FACTORS
    }
    for name, denoiser in rows.items():
        found = score(np.asarray(draw(key, denoiser, conditions, split_sampler, DRAWS), np.float64)) / best
        print(f"| {seed} | {name} | {found[0]:.3f} | {found[1]:.3f} |", flush=True)


def real_donors() -> None:
    """Folds in which training kept the network, by factor."""
    folder = Path(os.environ.get("HILBERTCELL_DATA", "../shared/data"))
    cells = anndata.read_h5ad(folder / "bodenmiller_bcrxl_cytof.h5ad")
    screen = read_populations(
        cells[cells.obs["cell_type"] != "Other"], perturbation="perturbation", control="control",
        context="cell_type", batch="donor", scale="other",
    )  # fmt: skip
    kept = dict.fromkeys(FACTORS, 0)
    folds = leave_one_batch_out(screen.labels)
    for split in folds:
        fitted = fit(screen, holdout=split, seed=0, settings=Settings(num_random_features=0))
        seen, description = see_populations(fitted, fitted.moments, 0)
        out = held_out_batches(seen.batch, 0.2, 0)
        _, named = labels_of(fitted)
        names = jnp.concatenate([jnp.zeros(len(description.center) - len(named), bool), jnp.asarray(named)])
        data, stopping = (TrainingData(*seen.select(mask)[1:], names) for mask in (~out, out))
        one = ~out & (
            seen.batch == seen.batch[~out][0]
        )  # one donor is the labelled set: a population of each context
        labelled = TrainingData(*seen.select(one)[1:], names)
        group = np.unique(np.asarray(labelled.conditions.context), return_inverse=True)[1]
        groups = Groups(labelled, jnp.asarray(group), int(group.max()) + 1)
        network = init_network(
            jax.random.key(0),
            min(LEADING, seen.points.observed.shape[1]),
            len(description.center),
            width=64,
            depth=2,
        )
        start = ResidualDenoiser(network, jnp.min(seen.points.level))
        for factor in FACTORS:
            kept[factor] += train(jax.random.key(1), start, data, groups, stopping, factor)[1]
    for factor, number in kept.items():
        print(f"| {factor:g} | {number} of {len(folds)} |")


if __name__ == "__main__":
    print("| seed | law | majority | minority |\n|---|---|---|---|")
    for seed in range(SEEDS):
        made_world(seed)
    print("\n| factor | folds in which the network was kept |\n|---|---|")
    real_donors()
