"""Similarity of conditions, and what a condition that was never seen inherits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import multivariate_normal

from hilbertcell.models.effects import (
    ConditionEffects,
    Conditions,
    extend_effects,
    kernel_cholesky,
    similarity_kernels,
)

NAN = np.nan


def conditions(context, components, dose=None, features=None):
    components = np.asarray(components, float)
    dose = np.full(len(components), NAN) if dose is None else np.asarray(dose, float)
    return Conditions(np.asarray(context), components, dose, features)


A, B, AB = [1, 0], [0, 1], [1, 1]


@pytest.mark.parametrize(
    ("structure", "names"),
    [
        (conditions([0], [A]), {"perturbation"}),
        (conditions([0, 1], [A, A]), {"perturbation", "interaction"}),
        (conditions([0, 0], [A, B]), {"perturbation"}),
        (conditions([0, 1, 0], [A, A, B]), {"perturbation", "interaction", "context"}),
        (conditions([0, 0, 0], [A, B, AB]), {"perturbation", "combination"}),
        (
            conditions([0, 0, 0, 1, 1, 1], [A, B, AB, A, B, AB]),
            {"perturbation", "interaction", "context", "combination", "combination in context"},
        ),
        (conditions([0, 0], [A, A], dose=[1.0, 10.0]), {"perturbation", "dose"}),
        (conditions([0, 0], [A, B], features=np.eye(2)), {"perturbation", "features"}),
    ],
)
def test_only_kernels_that_the_conditions_can_tell_apart(structure, names):
    kernels = similarity_kernels(structure)
    assert set(kernels) == names
    for kernel in kernels.values():
        assert np.linalg.eigvalsh(kernel).min() > -1e-12


def test_what_a_combination_adds_differs_between_contexts_and_single_perturbations_add_nothing():
    kernels = similarity_kernels(conditions([0, 0, 0, 1], [A, B, AB, AB]))
    np.testing.assert_array_equal(kernels["combination"], np.kron(np.diag([0, 1]), np.ones((2, 2))))
    np.testing.assert_array_equal(kernels["combination in context"], np.diag([0.0, 0.0, 1.0, 1.0]))


def test_a_combination_adds_its_components_and_doses_near_each_other_agree():
    kernels = similarity_kernels(conditions([0, 0, 0], [A, B, AB]))
    np.testing.assert_array_equal(kernels["perturbation"][2], [1, 1, 2])
    by_dose = similarity_kernels(conditions([0, 0, 0], [A, A, A], dose=[1.0, 10.0, 1000.0]))["dose"]
    assert by_dose[0, 1] == pytest.approx(np.exp(-0.5))
    assert by_dose[0, 2] == pytest.approx(np.exp(-4.5))


def test_condition_effects_are_the_multivariate_normal():
    with jax.enable_x64(True):
        kernels = jnp.asarray(np.stack(list(similarity_kernels(conditions([0, 1, 0], [A, A, B])).values())))
        chol = kernel_cholesky(kernels, jnp.array([1.0, 0.5, 0.8]))
        law = ConditionEffects(jnp.array([0.5, 2.0]), chol)
        value = np.random.default_rng(0).standard_normal((2, 3))
        for g, scale in enumerate([0.5, 2.0]):
            expected = multivariate_normal(np.zeros(3), scale**2 * np.asarray(chol @ chol.T)).logpdf(value[g])
            assert float(law.log_prob(jnp.asarray(value))[g]) == pytest.approx(expected, rel=1e-10)
        draws = np.asarray(law.sample(jax.random.key(0), (40_000,)))[:, 1]
        expected = 4.0 * np.asarray(chol @ chol.T)
        sd = np.sqrt(np.diag(expected))
        assert np.abs((np.cov(draws.T) - expected) / np.outer(sd, sd)).max() < 4.5 * np.sqrt(2 / 40_000)


def test_an_unseen_condition_follows_by_gaussian_conditioning():
    structure = conditions([0, 0, 1, 1], [A, B, A, B])
    kernels = np.stack(list(similarity_kernels(structure).values()))
    amplitudes, scale = np.array([1.0, 0.4, 0.7]), np.array([2.0])
    with jax.enable_x64(True):
        known = np.array([0, 1, 2])
        effect = np.array([[1.0], [-2.0], [0.5]])
        noise = np.random.default_rng(0).standard_normal((50_000, 1, 1))
        draw = jax.vmap(lambda n: extend_effects(kernels, jnp.asarray(amplitudes), scale, effect, known, n))
        draws = np.asarray(draw(jnp.asarray(noise)))
    np.testing.assert_allclose(draws[:, :3], np.broadcast_to(effect, (50_000, 3, 1)))
    full = np.tensordot(amplitudes**2, kernels, 1)
    gain = full[3, :3] @ np.linalg.inv(full[:3, :3])
    sd = 2.0 * np.sqrt(full[3, 3] - gain @ full[:3, 3])
    assert abs(draws[:, 3, 0].mean() - (gain @ effect)[0]) < 4 * sd / np.sqrt(50_000)
    assert abs(draws[:, 3, 0].std() / sd - 1) < 4 / np.sqrt(2 * 50_000)
