"""Score matching on noisy points: the latent law comes back, and the term of the ELBO is exact for the program."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hilbertcell.inference.score_matching import (
    Conditions,
    NoisyPoints,
    corrections,
    deconvolution_loss,
    elbo_correction,
    elbo_term,
    noisy_points,
    pick,
    restoration_error,
)
from hilbertcell.models.denoisers import Condition, gaussian_denoiser
from hilbertcell.models.forward_processes import terminal_level

MEAN = np.array([100.0, -100.0, 5.0])
LAW = np.array([[0.040, 0.024, 0.0], [0.024, 0.030, -0.006], [0.0, -0.006, 0.010]])
WITHIN = np.array([[1.0, 0.3, 0.0], [0.3, 0.6, 0.1], [0.0, 0.1, 1.6]])


def populations(num: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Observed means (P, 3) of populations of the law, each seen through its own number of cells, 20 to 1,000."""
    rng = np.random.default_rng(seed)
    n = np.exp(rng.uniform(np.log(20), np.log(1000), num))
    latent = MEAN + rng.standard_normal((num, 3)) @ np.linalg.cholesky(LAW).T
    noise = rng.standard_normal((num, 3)) @ np.linalg.cholesky(WITHIN).T / np.sqrt(n)[:, None]
    return latent + noise, n


def points_of(num: int, seed: int = 0) -> NoisyPoints:
    observed, n = populations(num, seed)
    return noisy_points(observed, np.tile(WITHIN, (num, 1, 1)), n)


def program(covariance: np.ndarray = LAW, mean: np.ndarray = MEAN) -> Condition:
    values, vectors = np.linalg.eigh(covariance)
    return Condition(jnp.asarray(mean), jnp.asarray(vectors), jnp.asarray(values), jnp.zeros(0))


def linear_denoiser(root, v, sigma, condition):
    """Posterior mean under the covariance root root^T, whatever the condition says of it."""
    covariance = root @ root.T
    gain = jnp.linalg.solve(covariance + sigma**2 * jnp.eye(3), covariance).T
    return condition.mean + gain @ (v - condition.mean)


def plain_loss(key, denoiser, points, condition):
    """What is learned where observed means are taken for latent ones."""
    clean = NoisyPoints(points.observed, jnp.full_like(points.level, 1e-3), jnp.zeros_like(points.root))
    return deconvolution_loss(key, denoiser, clean, condition)


def learned_covariance(loss, num_points: int = 30_000, num_steps: int = 600) -> np.ndarray:
    with jax.enable_x64(True):
        points = jax.tree.map(jnp.asarray, points_of(num_points))
        condition = program(0.02 * np.eye(3))  # only the mean and the terminal level are taken from here
        optimiser = optax.adam(optax.cosine_decay_schedule(0.02, num_steps, 0.01))

        def objective(root, key):
            keys = jax.random.split(key, 512)
            chosen = jax.random.randint(key, (512,), 0, num_points)
            denoiser = jax.tree_util.Partial(linear_denoiser, root)
            return jnp.mean(
                jax.vmap(lambda k, j: loss(k, denoiser, pick(points, j), condition)[0])(keys, chosen)
            )

        def body(state, key):
            root, opt = state
            updates, opt = optimiser.update(jax.grad(objective)(root, key), opt)
            return (root + updates, opt), None

        root = 0.14 * jnp.eye(3)
        keys = jax.random.split(jax.random.key(1), num_steps)
        (root, _), _ = jax.jit(lambda s: jax.lax.scan(body, s, keys))((root, optimiser.init(root)))
        return np.asarray(root @ root.T)


def relative_error(covariance: np.ndarray) -> float:
    return float(np.linalg.norm(covariance - LAW) / np.linalg.norm(LAW))


def test_noisy_population_gives_back_the_covariance_of_the_law():
    # 30,000 populations: sampling error of a covariance sqrt(2 / 30,000), about 1 %, and as much for noise and steps
    assert relative_error(learned_covariance(deconvolution_loss)) < 0.05


def test_plain_score_matching_learns_the_sampling_noise_as_biology():
    learned = learned_covariance(plain_loss)
    _, n = populations(30_000)
    assert relative_error(learned) > 0.15
    assert np.linalg.norm(learned - (LAW + WITHIN * np.mean(1 / n))) / np.linalg.norm(LAW) < 0.08


def test_points_enter_at_their_level():
    num = 20_000
    observed = np.tile(MEAN, (num, 1))
    points = noisy_points(observed, np.tile(WITHIN, (num, 1, 1)), np.full(num, 50.0))
    assert np.allclose(points.level, np.sqrt(np.linalg.eigvalsh(WITHIN)[-1] / 50), rtol=1e-5)
    drawn = jax.vmap(lambda key, j: pick(points, j).draw(key))(
        jax.random.split(jax.random.key(0), num), jnp.arange(num)
    )
    total = np.cov(np.asarray(drawn, float).T) + WITHIN / 50
    level = float(points.level[0])
    # entries of a covariance from N draws have sd sqrt(2 / N) of its scale: 5 of them
    assert np.abs(total - level**2 * np.eye(3)).max() < 5 * np.sqrt(2 / num) * level**2


def test_exact_denoiser_restores_points_without_bias():
    """E[point | v_sigma] is linear in the exact denoiser: the error is orthogonal to v_sigma."""
    with jax.enable_x64(True):
        condition = program()
        num, level, sigma = 40_000, 0.1, 0.2
        keys = jax.random.split(jax.random.key(3), 2)
        covariance = LAW + level**2 * np.eye(3)
        points = MEAN + jax.random.normal(keys[0], (num, 3)) @ np.linalg.cholesky(covariance).T
        eps = jax.random.normal(keys[1], (num, 3))
        error = jax.vmap(
            lambda point, e: restoration_error(
                gaussian_denoiser, point, level, jnp.asarray(sigma), e, condition
            )
        )(points, eps)
        v = points + np.sqrt(sigma**2 - level**2) * eps - MEAN
        moments = np.asarray(error.T @ v) / num
        scale = np.sqrt(np.outer(np.var(error, 0), np.var(v, 0)) / num)
        assert np.abs(moments / scale).max() < 4.5


def test_elbo_term_is_the_gaussian_log_density_without_a_network():
    with jax.enable_x64(True):
        points = jax.tree.map(jnp.asarray, points_of(5))
        condition = program(1.7 * LAW, MEAN + 0.1)
        key = jax.random.key(0)
        for j in range(5):
            one = pick(points, j)
            point = one.draw(jax.random.split(key, 3)[0])
            expected = jax.scipy.stats.multivariate_normal.logpdf(
                point, condition.mean, 1.7 * LAW + one.level**2 * np.eye(3)
            )
            assert elbo_correction(key, gaussian_denoiser, one, condition) == 0
            assert np.allclose(elbo_term(key, gaussian_denoiser, one, condition), expected, rtol=1e-10)


def test_correction_is_the_difference_of_log_densities_of_two_gaussians():
    """With the exact denoiser of another Gaussian law (2) is that law's log density: same terminal law up to 1 / 40."""
    with jax.enable_x64(True):
        other = program(LAW, MEAN + np.array([0.05, -0.1, 0.03]))
        condition = program(1.5 * LAW)
        points = jax.tree.map(jnp.asarray, points_of(6, seed=2))

        def denoiser(v, sigma, _):
            return gaussian_denoiser(v, sigma, other)

        def log_density(point, level, law, scale):
            return jax.scipy.stats.multivariate_normal.logpdf(
                point, law.mean, scale * LAW + level**2 * np.eye(3)
            )

        for j in range(6):
            one = pick(points, j)
            flat = one._replace(root=jnp.zeros((3, 3)))  # the point itself, so that the truth is one number
            keys = jax.random.split(jax.random.key(j), 400)
            found = np.asarray(
                jax.vmap(lambda k, one=one, flat=flat: elbo_correction(k, denoiser, flat, condition))(keys)
            )
            truth = log_density(one.observed, one.level, other, 1.0)
            truth = float(truth - log_density(one.observed, one.level, condition, 1.5))
            top = float(terminal_level(condition.values, one.level))
            error = (
                4.5 * found.std() / np.sqrt(len(found))
                + 0.1 * 3 * float(condition.values.max()) / top**2 * 40
            )
            assert abs(found.mean() - truth) < error, (found.mean(), truth, error)


def test_corrections_cover_all_draws_and_populations():
    points = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), points_of(4))
    condition = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), program())
    conditions = Conditions(
        jnp.tile(condition.mean, (2, 4, 1)), condition.vectors[None, None].repeat(2, 0),
        condition.values[None, None].repeat(2, 0), jnp.ones((2, 4)), jnp.zeros(4, int), jnp.zeros((2, 4, 0)),
    )  # fmt: skip
    found = corrections(jax.random.key(0), jax.tree_util.Partial(gaussian_denoiser), points, conditions)
    assert found.shape == (2, 4)
    assert np.all(np.asarray(found) == 0)


@pytest.mark.parametrize("leaf", ["mean", "values"])
def test_correction_falls_for_a_wrong_law(leaf):
    """On average over populations of the program no other law has a higher term."""
    with jax.enable_x64(True):
        condition = program()
        wrong = condition._replace(**{leaf: getattr(condition, leaf) * (1.001 if leaf == "mean" else 2.0)})
        points = jax.tree.map(jnp.asarray, points_of(300, seed=5))

        def denoiser(v, sigma, _):
            return gaussian_denoiser(v, sigma, wrong)

        found = jax.vmap(lambda key, j: elbo_correction(key, denoiser, pick(points, j), condition))(
            jax.random.split(jax.random.key(0), 300), jnp.arange(300)
        )
        assert found.mean() + 3 * found.std() / np.sqrt(300) < 0
