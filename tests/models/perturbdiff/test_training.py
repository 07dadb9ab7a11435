"""The training step: what is drawn, what is updated and by how much, and that it learns."""

import dataclasses

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models import perturbdiff
from hilbertcell.models.perturbdiff import training
from hilbertcell.models.perturbdiff.state_dict import named_arrays

RECIPE = perturbdiff.Recipe(max_steps=300, learning_rate=0.2, weight_decay=0.5, clip_norm=0.3)
LOSS = eqx.filter_jit(perturbdiff.denoising_loss)
GRADIENTS = eqx.filter_jit(training.loss_and_gradients)
KEYS = list(jax.random.split(jax.random.key(5), 13))


def arrays(networks):
    return {name: np.asarray(a) for name, a in named_arrays(*networks).items()}


@pytest.fixture(scope="module")
def networks(tiny):
    """The tiny networks with one block: the step compiles in half the time."""
    return eqx.tree_at(lambda denoiser: denoiser.blocks, tiny[0], tiny[0].blocks[:1]), tiny[1]


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    cells = rng.gamma(1.0, 0.3, (2, 3, 4, 5)).astype(np.float32)
    labels = [jnp.asarray(rng.integers(0, 2, (3, 4))) for _ in range(3)]
    return perturbdiff.Batch(jnp.asarray(cells[0]), jnp.asarray(cells[1]), *labels)


def test_draws_of_a_batch_are_shared_and_draws_of_sets_are_not():
    shape, dropout = (64, 2, 3), perturbdiff.Dropout(0.5, 0.25, 0.5)
    together = [perturbdiff.draw(key, shape, 1000, dropout) for key in KEYS[:6]]
    for draws in together:
        assert all(len(np.unique(kept)) == 1 for kept in draws[2:])
        assert len(np.unique(draws.t)) > 32  # a step of its own for every set
    per_set = perturbdiff.draw(KEYS[0], (4000, 1, 1), 1000, dataclasses.replace(dropout, level="set"))
    for kept, probability in zip(per_set[2:], (0.5, 0.75, 0.5), strict=True):
        error = 4 * np.sqrt(probability * (1 - probability) / 4000)
        assert abs(np.mean(kept) - probability) < error
    t = np.asarray(per_set.t)
    assert abs(t.mean() - 499.5) < 4 * 1000 / np.sqrt(12 * 4000)
    assert t.min() >= 0
    assert t.max() <= 999


def test_certain_drops_are_certain(networks, batch):
    draws = perturbdiff.draw(KEYS[0], batch.x0.shape, 1000, perturbdiff.Dropout(1.0, 1.0, 1.0))
    assert not any(np.any(kept) for kept in draws[2:])
    schedule = perturbdiff.linear_schedule()
    loss, _ = LOSS(*networks, batch, draws, schedule)
    elsewhere = batch._replace(control=batch.control + 9, cell_type=1 - batch.cell_type)
    np.testing.assert_array_equal(LOSS(*networks, elsewhere, draws, schedule)[0], loss)


def test_self_conditioning_feeds_the_first_answer_back(networks, batch):
    draws = perturbdiff.draw(KEYS[0], batch.x0.shape, 1000, perturbdiff.Dropout(0.0, 0.0, 0.0))
    schedule = perturbdiff.linear_schedule()
    x_t = jnp.asarray(
        perturbdiff.diffuse(np.asarray(batch.x0), np.asarray(draws.noise), np.asarray(draws.t), schedule)
    )
    covariates = networks[1](batch.perturbation, batch.cell_type, batch.batch)
    first = networks[0](x_t, jnp.zeros_like(x_t), batch.control, draws.t, covariates)
    second = networks[0](x_t, first, batch.control, draws.t, covariates)
    one_set = draws._replace(self_condition=jnp.array([True, False, True]))
    expected = jnp.stack([second[0], first[1], second[2]])
    _, terms = LOSS(*networks, batch, one_set, schedule)
    np.testing.assert_allclose(terms.squared_error, perturbdiff.squared_error(batch.x0, expected), rtol=1e-4)
    np.testing.assert_allclose(terms.energy, perturbdiff.energy_loss(batch.x0, expected), rtol=1e-3)


def adamw_with_missing_gradients(networks, batch, recipe, num_steps):
    """The published rule in numpy: every parameter has its own moments and count, and may be skipped."""
    depth = len(networks[0].blocks)
    parameters = {n: a.astype(np.float64) for n, a in arrays(networks).items()}
    first = {name: 0.0 for name in parameters}
    second, count, average = dict(first), dict(first), None
    (b1, b2), history = recipe.betas, []
    for i in range(num_steps):
        draws = perturbdiff.draw(KEYS[i], batch.x0.shape, recipe.num_train_steps, recipe.dropout)
        current = training.with_arrays(
            *networks, {n: jnp.asarray(a, jnp.float32) for n, a in parameters.items()}
        )
        _, gradients = GRADIENTS(current, batch, draws, recipe)
        gradients = {name: np.asarray(g, np.float64) for name, g in gradients.items()}
        norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
        conditional = bool(draws.keep_condition[0])
        skipped = {"never", "null" if conditional else "condition"}
        rate = recipe.learning_rate * min(1.0, i / 200)
        for name, g in gradients.items():
            if training.parameter_group(name, depth) in skipped:
                continue
            g = g * min(1.0, recipe.clip_norm / norm)
            count[name] += 1
            first[name] = b1 * first[name] + (1 - b1) * g
            second[name] = b2 * second[name] + (1 - b2) * g**2
            if not name.endswith(".bias"):
                parameters[name] = parameters[name] * (1 - rate * recipe.weight_decay)
            scale = np.sqrt(second[name] / (1 - b2 ** count[name])) + recipe.epsilon
            parameters[name] = parameters[name] - rate * first[name] / (1 - b1 ** count[name]) / scale
        if i % recipe.average_every == 0:
            average = dict(parameters) if average is None else {
                n: 0.99 * average[n] + 0.01 * parameters[n] for n in parameters
            }  # fmt: skip
        history.append(conditional)
    return parameters, average, history


@pytest.fixture(scope="module")
def trained(networks, batch):
    """States after each of the first steps (as named arrays), the last state, and what the steps reported."""
    state, infos, history = training.init(networks, RECIPE), [], []
    for key in KEYS:
        state, info = training.step(state, batch, key, RECIPE)
        infos.append(info)
        history.append(arrays(state.networks))
    return history, state, infos


def test_steps_follow_the_published_rule(networks, batch, trained):
    history, state, infos = trained
    np.testing.assert_allclose(
        [info.learning_rate for info in infos], 0.2 * np.arange(len(KEYS)) / 200, rtol=1e-6
    )
    expected, average, conditional = adamw_with_missing_gradients(networks, batch, RECIPE, len(KEYS))
    assert 0 < sum(conditional) < len(KEYS)  # both kinds of batches occurred
    assert max(info.gradient_norm for info in infos) > RECIPE.clip_norm
    start = arrays(networks)
    assert all(np.array_equal(a, start[n]) for n, a in history[0].items())  # the first rate is zero
    for name, array in history[-1].items():
        moved = np.linalg.norm(expected[name] - start[name])
        assert np.linalg.norm(array - expected[name]) <= 2e-3 * moved, name
    assert int(state.num_averaged) == 2
    for name, array in arrays(state.average).items():
        np.testing.assert_allclose(array, average[name], rtol=1e-4, atol=1e-6, err_msg=name)


def test_what_no_loss_reaches_keeps_its_value(networks, trained):
    kept = {name for name, a in trained[0][-1].items() if np.array_equal(a, arrays(networks)[name])}
    never = {name for name in kept if training.parameter_group(name, depth=1) == "never"}
    assert kept == never
    assert {name.split(".")[1] for name in never} == {
        "gene_embedding", "control_final_layer", "blocks", "celltype_encoder",
    }  # fmt: skip


def test_the_same_keys_give_the_same_weights(networks, batch, trained):
    state = training.init(networks, RECIPE)
    for key in KEYS[:4]:
        state, _ = training.step(state, batch, key, RECIPE)
    for name, array in arrays(state.networks).items():
        np.testing.assert_array_equal(array, trained[0][3][name], err_msg=name)


def test_steps_reduce_the_loss(networks, batch):
    """The same draws before and after, so that only the weights differ."""
    state = training.init(networks, RECIPE)
    for i in range(200):
        state, _ = training.step(state, batch, jax.random.fold_in(KEYS[0], i), RECIPE)
    draws = perturbdiff.draw(KEYS[1], batch.x0.shape, 1000, RECIPE.dropout)
    schedule = perturbdiff.linear_schedule()
    before, after = (float(LOSS(*pair, batch, draws, schedule)[0]) for pair in (networks, state.networks))
    assert after < 0.3 * before


def test_only_the_sources_of_the_batch_are_updated(batch):
    def new(key):
        return (
            perturbdiff.init_denoiser(
                key, 5, hidden=8, depth=1, num_heads=2, gene_features=0, sources=("a", "b")
            ),
            perturbdiff.init_covariate_encoder(key, 5, perturbations=2, cell_types=2, batches=2, hidden=4),
        )

    rng = np.random.default_rng(1)
    shapes = jax.eval_shape(new, KEYS[0])
    networks = jax.tree.map(lambda a: jnp.asarray(rng.normal(0.0, 0.5, a.shape), a.dtype), shapes)
    state = training.init(networks, RECIPE)
    for key in KEYS[:2]:  # the first rate is zero
        state, _ = training.step(state, batch._replace(source=jnp.array([1, 1, 1])), key, RECIPE)
    kept = {name for name, a in arrays(state.networks).items() if np.array_equal(a, arrays(networks)[name])}
    assert {"model.x_embedder.a.weight", "model.x_control_embedder.a.bias"} <= kept
    assert not {"model.x_embedder.b.weight", "model.x_control_embedder.b.weight"} & kept


def test_a_recipe_too_short_to_warm_up(networks):
    with pytest.raises(ValueError, match="max_steps = 200: the learning rate warms up for 200 steps"):
        training.init(networks, perturbdiff.Recipe(max_steps=200))
