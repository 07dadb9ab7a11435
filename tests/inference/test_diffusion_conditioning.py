"""Conditioning of populations: closed forms on the program, and on mixtures of Gaussians, whose posterior is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, norm

from hilbertcell.inference.diffusion_conditioning import (
    Observation,
    condition_gaussian,
    observe_cells,
    reweight_latents,
    start_at_cells,
    twisted_smc,
)
from hilbertcell.inference.samplers import Ancestral, EulerMaruyama, Sampler, asinh_grid, split_sampler
from hilbertcell.models.denoisers import Condition, ResidualDenoiser, gaussian_denoiser, init_network
from hilbertcell.models.forward_processes import HeavyTailed
from tests.mixture_law import MixtureDenoiser, bimodal, mixture

D = 3
FEW = Sampler(Ancestral(), 8, asinh_grid)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def make(values: tuple[float, ...] = (2.0, 0.3, 0.01)) -> Condition:
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((D, D)))[0]
    return Condition(
        *map(jnp.asarray, (100.0 + rng.standard_normal(D), vectors, np.array(values), np.zeros(0)))
    )


def covariance(condition: Condition) -> np.ndarray:
    return np.asarray((condition.vectors * condition.values) @ condition.vectors.T)


def seen(kind: str) -> Observation:
    """Cells, a subset of genes, or one functional of a population of `make`."""
    rng = np.random.default_rng(1)
    matrix = {"cells": np.eye(D), "genes": np.eye(D)[[2, 0]], "functional": rng.standard_normal((1, D))}[kind]
    root = rng.standard_normal((len(matrix), len(matrix)))
    noise = 0.2 * root @ root.T + 0.05 * np.eye(len(matrix))
    value = matrix @ (np.asarray(make().mean) + np.array([1.0, -0.5, 0.8]))
    return Observation(*map(jnp.asarray, (value, matrix, noise)))


def exact(
    mean: np.ndarray, spread: np.ndarray, observation: Observation
) -> tuple[np.ndarray, np.ndarray, float]:
    """Posterior mean, covariance and log evidence of N(mean, spread), by the textbook formula."""
    y, matrix, noise = map(np.asarray, observation)
    total = matrix @ spread @ matrix.T + noise
    gain = spread @ matrix.T @ np.linalg.inv(total)
    evidence = multivariate_normal(matrix @ mean, total).logpdf(y)
    return mean + gain @ (y - matrix @ mean), spread - gain @ matrix @ spread, float(evidence)


def check_draws(draws: np.ndarray, mean: np.ndarray, spread: np.ndarray, num_independent: float) -> None:
    """Mean and covariance within 4.5 standard errors of so many independent draws."""
    sd = np.sqrt(np.diag(spread))
    assert np.abs((draws.mean(0) - mean) / sd).max() < 4.5 / np.sqrt(num_independent)
    assert np.abs((np.cov(draws.T) - spread) / np.outer(sd, sd)).max() < 4.5 * np.sqrt(2 / num_independent)


KINDS = ["cells", "genes", "functional"]
ONE_QUICK = ["cells", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [(2.0, 0.3, 0.01), (2.0, 0.3, 0.0)])
def test_the_program_is_conditioned_in_closed_form(kind, values):
    condition, observation = make(values), seen(kind)
    updated, evidence = jax.jit(condition_gaussian)(condition, observation)
    mean, spread, log_evidence = exact(np.asarray(condition.mean), covariance(condition), observation)
    np.testing.assert_allclose(updated.mean, mean, rtol=1e-10)
    np.testing.assert_allclose(covariance(updated), spread, atol=1e-10)
    assert float(evidence) == pytest.approx(log_evidence, rel=1e-10)
    assert (updated.values >= 0).all()


def test_several_conditions_of_a_batch_are_one_observation_of_their_joint_program():
    """Two populations that share a batch effect: cells of the first move the second."""
    shared = np.diag([0.5, 0.2])
    own = np.diag([0.3, 0.1])
    spread = np.block([[shared + own, shared], [shared, shared + own]])
    values, vectors = np.linalg.eigh(spread)
    condition = Condition(*map(jnp.asarray, (np.arange(4.0), vectors, values, np.zeros(0))))
    v_hat, noise = np.array([1.0, 2.0]), 0.05 * np.eye(2)
    observation = Observation(*map(jnp.asarray, (v_hat, np.eye(4)[:2], noise)))
    updated, _ = condition_gaussian(condition, observation)
    gain = shared @ np.linalg.inv(shared + own + noise)
    np.testing.assert_allclose(updated.mean[2:], [2.0, 3.0] + gain @ (v_hat - [0.0, 1.0]), rtol=1e-10)
    np.testing.assert_allclose(covariance(updated)[2:, 2:], shared + own - gain @ shared, atol=1e-12)


@pytest.mark.parametrize("rule", [Ancestral(), pytest.param(EulerMaruyama(), marks=pytest.mark.slow)])
def test_the_reverse_process_from_the_cells_draws_the_posterior_of_the_program(rule):
    condition, sigma, num_draws = make((2.0, 0.3, 0.1)), 0.6, 10_000
    noise = np.diag([0.36, 0.2, 0.1])  # at most sigma^2: what is missing is topped up and lost
    v_hat = np.asarray(condition.mean) + np.array([1.0, -0.5, 0.8])
    sampler = FEW if isinstance(rule, Ancestral) else Sampler(rule, 400, asinh_grid)
    one = lambda key: start_at_cells(key, gaussian_denoiser, condition, v_hat, noise, sigma, sampler)
    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), num_draws)))
    spread = covariance(condition)
    shrunk = spread @ np.linalg.inv(spread + sigma**2 * np.eye(D))
    mean = np.asarray(condition.mean) + shrunk @ (v_hat - np.asarray(condition.mean))
    expected = spread - shrunk @ spread + shrunk @ (sigma**2 * np.eye(D) - noise) @ shrunk.T
    check_draws(draws, mean, expected, num_draws)


def posterior_of(
    law: MixtureDenoiser, observation: Observation
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Weights, means, covariances and log evidence of a mixture given an observation."""
    each = [
        exact(np.asarray(m), np.asarray(c), observation)
        for m, c in zip(law.means, law.covariances, strict=True)
    ]
    logits = np.log(np.asarray(law.weights)) + np.array([e[2] for e in each])
    evidence = logsumexp(logits)
    return np.exp(logits - evidence), np.array([e[0] for e in each]), np.array([e[1] for e in each]), evidence


def test_the_reverse_process_from_the_cells_draws_the_posterior_of_a_bimodal_law():
    law, sigma, num_draws = bimodal(), 0.8, 6_000
    v_hat = np.array([-0.3, 0.1])
    noise = sigma**2 * np.eye(2)
    sampler = Sampler(Ancestral(), 64, asinh_grid)
    one = lambda key: start_at_cells(key, law, law.condition(), v_hat, noise, sigma, sampler)
    draws = np.asarray(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(1), num_draws)))
    weights, means, covariances, _ = posterior_of(law, observe_cells(jnp.asarray(v_hat), jnp.asarray(noise)))
    assert 0.2 < weights[0] < 0.8  # the cells leave it open who responds
    expected = weights @ norm.cdf(0.0, means[:, 0], np.sqrt(covariances[:, 0, 0]))
    # 0.01: the weak error of 64 steps.
    assert abs((draws[:, 0] < 0).mean() - expected) < 4.5 * 0.5 / np.sqrt(num_draws) + 0.01
    sd = np.sqrt(weights @ (covariances[:, 0, 0] + means[:, 0] ** 2) - (weights @ means[:, 0]) ** 2)
    assert abs(draws[:, 0].mean() - weights @ means[:, 0]) < sd * (4.5 / np.sqrt(num_draws) + 0.02)


@pytest.mark.parametrize("kind", ONE_QUICK)
def test_on_the_program_all_particles_weigh_the_same_and_the_evidence_is_exact(kind):
    condition, observation, num_particles = make(), seen(kind), 10_000
    run = jax.jit(lambda key: twisted_smc(key, gaussian_denoiser, condition, observation, num_particles, FEW))
    particles = run(jax.random.key(2))
    mean, spread, log_evidence = exact(np.asarray(condition.mean), covariance(condition), observation)
    assert float(particles.log_evidence) == pytest.approx(log_evidence, abs=1e-8)
    np.testing.assert_allclose(particles.ess, num_particles, rtol=1e-8)
    assert len(particles.ess) == FEW.num_steps + 1
    check_draws(np.asarray(particles.v), mean, spread, num_particles)


@pytest.mark.slow
def test_on_a_bimodal_law_particles_draw_its_posterior_and_their_evidence_is_unbiased():
    law, num_particles, repeats = bimodal(), 256, 200
    program = law.condition()
    observation = Observation(jnp.array([-0.2]), jnp.array([[1.0, -0.5]]), jnp.array([[0.3]]))
    weights, means, _, log_evidence = posterior_of(law, observation)
    assert 0.2 < weights[0] < 0.9
    ratios = {}
    for num_steps in (24, 48):
        sampler = Sampler(Ancestral(), num_steps, asinh_grid)
        run = jax.vmap(lambda key, s=sampler: twisted_smc(key, law, program, observation, num_particles, s))
        particles = jax.jit(run)(jax.random.split(jax.random.key(num_steps), repeats))
        ratios[num_steps] = np.exp(np.asarray(particles.log_evidence) - log_evidence)
    # Unbiased for the chain, whose own law has weak order one: 7 % at 24 steps, 3 % at 48, and nothing beyond.
    assert abs(ratios[48].mean() - 1) < 0.05
    error = np.hypot(2 * ratios[48].std(), ratios[24].std()) / np.sqrt(repeats)
    assert abs(2 * ratios[48].mean() - ratios[24].mean() - 1) < 4.5 * error
    assert error < 0.01
    each = (np.exp(particles.log_weights)[..., None] * np.asarray(particles.v)).sum(1)
    error = (each - weights @ means).mean(0)
    assert (np.abs(error) < 4.5 * each.std(0) / np.sqrt(repeats) + 0.02).all()
    ess = np.asarray(particles.ess)
    assert (ess <= num_particles * (1 + 1e-9)).all()
    assert ess.min() < 0.95 * num_particles  # the network's part does cost something, and it is told
    drawn = jax.tree.map(lambda leaf: leaf[0], particles).resample(jax.random.key(4), 2_000)
    assert drawn.shape == (2_000, 2)
    np.testing.assert_allclose(drawn.mean(0), each[0], atol=4.5 / np.sqrt(256))


def test_ignoring_the_twist_would_be_seen():
    """The unconditional law is far from the posterior of the last test: its tolerances can fail."""
    law = bimodal()
    observation = Observation(jnp.array([-0.2]), jnp.array([[1.0, -0.5]]), jnp.array([[0.3]]))
    weights, means, _, _ = posterior_of(law, observation)
    assert np.abs(weights @ means - np.asarray(law.weights @ law.means)).max() > 0.1


@pytest.mark.slow
def test_observed_conditions_reweigh_the_latents_of_their_batch():
    """A latent shift u of two populations with a bimodal residual: posterior of u by quadrature.

    Draws of u come from the program, which takes the residual for Gaussian.
    """
    law = mixture([0.6, 0.4], [[-0.6], [0.9]], [[[0.05]], [[0.1]]])
    program = law.condition()
    observed, noise, num_draws = np.array([1.4, 1.3]), 0.04, 400
    total = float(program.values[0]) + noise
    precision = 1.0 + 2 / total
    mean = ((observed - float(program.mean[0])) / total).sum() / precision
    u = mean + np.random.default_rng(0).standard_normal(num_draws) / np.sqrt(precision)
    stacked = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (num_draws, 2, *leaf.shape)), program)
    conditions = stacked._replace(
        mean=stacked.mean + u[:, None, None],
        features=jnp.asarray(np.broadcast_to(u[:, None, None], (num_draws, 2, 1))),
    )

    def moved(v, sigma, condition):
        return law(v - condition.features, sigma, program) + condition.features

    observations = Observation(
        jnp.asarray(observed)[:, None], jnp.ones((2, 1, 1)), jnp.full((2, 1, 1), noise)
    )
    sampler = Sampler(Ancestral(), 24, asinh_grid)
    run = jax.jit(lambda key: reweight_latents(key, moved, conditions, observations, 32, sampler))
    log_weights, ess = run(jax.random.key(5))
    points = np.linspace(-4, 4, 2_001)
    residual = observed[:, None] - points
    sd = np.sqrt(np.asarray(law.values)[:, 0] + noise)
    likelihood = (
        np.asarray(law.weights)[:, None, None]
        * norm.pdf(residual, np.asarray(law.means)[:, :, None], sd[:, None, None])
    ).sum(0)
    density = norm.pdf(points) * likelihood.prod(0)
    density /= density.sum()
    exact_mean = density @ points
    exact_sd = np.sqrt(density @ points**2 - exact_mean**2)
    weighted = float(np.exp(log_weights) @ u)
    assert abs(exact_mean - mean) > 0.1  # the program alone is wrong about u
    assert abs(weighted - exact_mean) < 4 * exact_sd / np.sqrt(float(ess)) + 0.02
    assert 40 < float(ess) < 0.95 * num_draws


def test_with_the_programs_denoiser_latents_keep_their_weights():
    condition = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (4, 2, *leaf.shape)), make())
    observation = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), seen("genes"))
    run = jax.jit(lambda key: reweight_latents(key, gaussian_denoiser, condition, observation, 8, FEW))
    weights = run(jax.random.key(6))
    np.testing.assert_allclose(weights.log_weights, -np.log(4), atol=1e-8)
    assert float(weights.ess) == pytest.approx(4.0)


def test_what_cannot_draw_a_posterior_is_refused():
    condition, noise = make(), 0.1 * jnp.eye(D)
    with pytest.raises(ValueError, match=r"Split\(\) solves the probability flow.*needs the reverse SDE"):
        start_at_cells(
            jax.random.key(0), gaussian_denoiser, condition, condition.mean, noise, 0.5, split_sampler
        )
    network = init_network(jax.random.key(0), D, 0, width=8, depth=1)
    heavy = ResidualDenoiser(network, jnp.asarray(0.01), HeavyTailed(4))
    with pytest.raises(
        ValueError, match="a start at a cell count needs noise like that of a mean over cells"
    ):
        start_at_cells(jax.random.key(0), heavy, condition, condition.mean, noise, 0.5)
    with pytest.raises(ValueError, match="conditioning needs noise"):
        twisted_smc(jax.random.key(0), heavy, condition, seen("cells"), 8)
