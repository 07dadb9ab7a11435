"""Training of the residual network: what it learns, when it keeps the program, that it resumes to the same result."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.inference.denoiser_training import BLOCK, Recipe, TrainingData, train
from hilbertcell.inference.samplers import split_sampler
from hilbertcell.inference.score_matching import Conditions, noisy_points
from hilbertcell.models.denoisers import ResidualDenoiser, init_network

GAP = 0.6  # between the two modes of a population's first coordinate
LAW = np.diag([GAP**2 / 4 + 0.05**2, 0.1**2])  # its covariance, all that the program knows
RECIPE = Recipe(num_steps=6 * BLOCK, batch_size=128, learning_rate=3e-3)
SMALL = Recipe(
    num_steps=3 * BLOCK, batch_size=16, learning_rate=3e-3, patience=2
)  # with 100 points: compiled once


def material(rng: np.random.Generator, num: int, latent: np.ndarray) -> TrainingData:
    """Populations of 200 to 1,000 cells around latent means (num, 2), one draw of a program that is N(0, LAW)."""
    n = rng.uniform(200, 1000, num)
    observed = latent + rng.standard_normal((num, 2)) / np.sqrt(n)[:, None]
    points = noisy_points(observed, np.tile(np.eye(2), (num, 1, 1)), n)
    values, vectors = np.linalg.eigh(LAW)
    conditions = Conditions(
        np.zeros((1, num, 2)), vectors[None, None], values[None, None], np.ones((1, num)),
        np.zeros(num), np.zeros((1, num, 1)),
    )  # fmt: skip
    cast = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (points, conditions))
    conditions = cast[1]._replace(context=jnp.zeros(num, int))
    return TrainingData(cast[0], conditions, jnp.zeros(1, bool))


def two_modes(rng: np.random.Generator, num: int) -> np.ndarray:
    side = rng.choice([-0.5, 0.5], num) * GAP
    return np.column_stack([side + 0.05 * rng.standard_normal(num), 0.1 * rng.standard_normal(num)])


def new_denoiser() -> ResidualDenoiser:
    network = init_network(jax.random.key(0), 2, 1, width=32, depth=1)
    return ResidualDenoiser(network, jnp.asarray(0.03, jnp.float32))


@pytest.mark.slow
def test_two_modes_are_learned_from_noisy_populations():
    rng = np.random.default_rng(0)
    training, held_out = (material(rng, num, two_modes(rng, num)) for num in (1500, 500))
    trained = train(jax.random.key(1), new_denoiser(), training, held_out, RECIPE)
    condition = held_out.conditions.at(jnp.asarray(0), jnp.asarray(0))
    keys = jax.random.split(jax.random.key(2), 2000)
    drawn = np.asarray(jax.vmap(lambda key: split_sampler(key, trained.denoiser, condition, 0.0))(keys))
    between = np.abs(drawn[:, 0]) < GAP / 4  # a third of the program's draws, 1e-3 of the law's
    assert between.mean() < 0.10
    assert np.abs(np.abs(drawn[:, 0]).mean() - GAP / 2) < 0.03
    assert abs(drawn[:, 1].std() / 0.1 - 1) < 0.1  # what was Gaussian stays as it was
    assert trained.course[-1, 1] < 0


def test_network_that_gains_nothing_on_held_out_batches_stays_the_program():
    rng = np.random.default_rng(1)
    shifted = rng.standard_normal((100, 2)) * np.sqrt(np.diag(LAW)) + 0.5
    training, held_out = material(rng, 100, shifted), material(rng, 100, -shifted)
    trained = train(jax.random.key(1), new_denoiser(), training, held_out, SMALL)
    assert len(trained.course) == 2
    assert np.all(np.asarray(trained.denoiser.network.exit.weight) == 0)


def test_interrupted_training_resumes_to_the_same_bits(tmp_path):
    rng = np.random.default_rng(2)
    training, held_out = (material(rng, num, two_modes(rng, num)) for num in (100, 100))
    whole = train(jax.random.key(3), new_denoiser(), training, held_out, SMALL)
    done = []

    def interrupt(steps: int) -> None:
        done.append(steps)
        if len(done) == 2:
            raise KeyboardInterrupt

    kept = tmp_path / "training.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(
            jax.random.key(3), new_denoiser(), training, held_out, SMALL, resume=kept, on_progress=interrupt
        )
    resumed = train(jax.random.key(3), new_denoiser(), training, held_out, SMALL, resume=kept)
    assert not kept.exists()
    assert np.array_equal(whole.course, resumed.course)
    for a, b in zip(jax.tree.leaves(whole.denoiser), jax.tree.leaves(resumed.denoiser), strict=True):
        assert np.array_equal(a, b)


def test_state_of_another_training_is_refused(tmp_path):
    rng = np.random.default_rng(2)
    data = material(rng, 100, two_modes(rng, 100))
    kept = tmp_path / "training.safetensors"

    def interrupt(steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(jax.random.key(0), new_denoiser(), data, data, SMALL, resume=kept, on_progress=interrupt)
    with pytest.raises(ValueError, match="another training"):
        train(jax.random.key(0), new_denoiser(), data, data, SMALL._replace(learning_rate=1e-4), resume=kept)
    other = material(rng, 100, two_modes(rng, 100))
    with pytest.raises(ValueError, match="another training"):
        train(jax.random.key(0), new_denoiser(), other, data, SMALL, resume=kept)
    kept.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="remove it"):
        train(jax.random.key(0), new_denoiser(), data, data, SMALL, resume=kept)


def test_loss_that_is_not_finite_is_an_error():
    rng = np.random.default_rng(2)
    data = material(rng, 100, two_modes(rng, 100))
    broken = data._replace(points=data.points._replace(observed=data.points.observed.at[0].set(jnp.nan)))
    with pytest.raises(FloatingPointError, match="learning rate"):
        train(jax.random.key(0), new_denoiser(), broken, data, SMALL)
