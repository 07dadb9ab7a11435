"""HilbertDiffusion as a distribution: closed forms, mass one, agreement of draws and density, every NumPyro use."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from numpyro import handlers
from numpyro.infer import Predictive
from numpyro.infer.util import log_density as log_joint
from scipy.stats import chisquare, kstest, multivariate_normal

from hilbertcell.inference.probability_flow import ProbabilityFlow, log_density
from hilbertcell.inference.samplers import Heun, Sampler, Split, asinh_grid, heun_sampler, split_sampler
from hilbertcell.models.denoisers import Condition, ResidualDenoiser, gaussian_denoiser, init_network
from hilbertcell.models.forward_processes import HeavyTailed
from hilbertcell.models.hilbert_diffusion import HilbertDiffusion
from tests.mixture_law import MixtureDenoiser, bimodal, skewed

D, B = 2, 3
QUICK = ProbabilityFlow(2)  # enough for the program, for which any number of steps is exact


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def conditions(*shape: int) -> Condition:
    """Programs with leading axes `shape`, means far apart."""
    rng = np.random.default_rng(0)
    vectors = np.linalg.qr(rng.standard_normal((*shape, D, D)))[0]
    mean = 100.0 * np.arange(np.prod(shape, dtype=int)).reshape(*shape, 1) + rng.standard_normal((*shape, D))
    values = np.exp(rng.standard_normal((*shape, D)))
    return Condition(*map(jnp.asarray, (mean, vectors, values, np.zeros((*shape, 0)))))


def covariance(condition: Condition, sigma: float) -> np.ndarray:
    values = condition.values + sigma**2
    return np.einsum("...ij,...j,...kj->...ik", condition.vectors, values, condition.vectors)


def gaussian(*shape: int, sigma: float | jnp.ndarray = 0.0) -> HilbertDiffusion:
    return HilbertDiffusion(gaussian_denoiser, conditions(*shape), sigma, split_sampler, QUICK)


def of_law(law: MixtureDenoiser, sampler: Sampler, sigma: float = 0.0, steps: int = 24) -> HilbertDiffusion:
    return HilbertDiffusion(law, law.condition(), sigma, sampler, ProbabilityFlow(steps))


def test_with_the_programs_denoiser_it_is_the_program():
    sigma = jnp.array([0.0, 0.5, 2.0])  # every population at its own level
    law, num_draws = gaussian(B, sigma=sigma), 10_000
    assert (law.batch_shape, law.event_shape) == ((B,), (D,))
    draws = np.asarray(jax.jit(lambda law, key: law.sample(key, (num_draws,)))(law, jax.random.key(0)))
    assert draws.shape == (num_draws, B, D)
    densities = np.asarray(jax.jit(lambda law, v: law.log_prob(v))(law, draws[:5]))
    assert densities.shape == (5, B)
    for b in range(B):
        condition = jax.tree.map(lambda leaf, b=b: leaf[b], law.condition)
        expected = covariance(condition, float(sigma[b]))
        root = np.linalg.inv(np.linalg.cholesky(expected))
        white = (draws[:, b] - np.asarray(condition.mean)) @ root.T
        assert np.abs(white.mean(0)).max() < 4.5 / np.sqrt(num_draws)
        assert np.abs(np.cov(white.T) - np.eye(D)).max() < 4.5 * np.sqrt(2 / num_draws)
        reference = multivariate_normal(condition.mean, expected).logpdf(draws[:5, b])
        np.testing.assert_allclose(densities[:, b], reference, rtol=1e-8)


@pytest.mark.parametrize("sigma", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_the_density_of_a_skewed_law_has_mass_one_and_is_that_of_the_draws(sigma):
    law = skewed()
    points = jnp.linspace(-4.0, 7.0, 801)
    diffusion = of_law(law, Sampler(Split(), 48, asinh_grid), sigma)
    density = np.exp(jax.jit(lambda d, v: d.log_prob(v))(diffusion, points[:, None]))
    width = float(points[1] - points[0])
    assert width * density.sum() == pytest.approx(1.0, abs=2e-4)
    draws = np.asarray(jax.jit(lambda d: d.sample(jax.random.key(1), (8_000,)))(diffusion))[:, 0]
    cdf = np.cumsum(density) * width - 0.5 * density * width
    # One false alarm in 1,000; an sd that is off by 5 % would be found nine times in ten at 8,000 draws.
    assert kstest(draws, lambda v: np.interp(v, points, cdf)).pvalue > 1e-3


@pytest.mark.parametrize("sigma", [0.0, pytest.param(0.3, marks=pytest.mark.slow)])
def test_the_density_of_a_bimodal_law_has_mass_one_and_is_that_of_the_draws(sigma):
    axes = jnp.linspace(-4.0, 4.0, 81), jnp.linspace(-3.0, 3.0, 81)
    points = jnp.stack(jnp.meshgrid(*axes, indexing="ij"), -1)
    diffusion = of_law(bimodal(), Sampler(Heun(), 48), sigma)
    density = np.exp(jax.jit(lambda d, v: d.log_prob(v))(diffusion, points))
    mass = density * float((axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0]))
    assert mass.sum() == pytest.approx(1.0, abs=5e-4)
    num_draws = 8_000
    draws = np.asarray(jax.jit(lambda d: d.sample(jax.random.key(2), (num_draws,)))(diffusion))
    # Cells of 5 x 5 points, those that expect fewer than 10 draws put together.
    edges = [np.append(np.asarray(a)[::5] - 0.5 * float(a[1] - a[0]), np.inf) for a in axes]
    expected = np.add.reduceat(np.add.reduceat(mass, np.arange(0, 81, 5), 0), np.arange(0, 81, 5), 1)
    observed = np.histogram2d(*draws.T, edges)[0]
    common = expected * num_draws > 10
    assert common.sum() > 20
    counts = np.append(observed[common], num_draws - observed[common].sum())
    shares = np.append(expected[common], 1.0 - expected[common].sum())
    assert chisquare(counts, num_draws * shares).pvalue > 1e-3


def program(condition: Condition, seen: jnp.ndarray | None = None) -> jnp.ndarray:
    """Populations of B batches: a shared shift, latent populations, their observed means at level 0.5."""
    shift = numpyro.sample("shift", dist.Normal(0.0, 1.0))
    moved = condition._replace(mean=condition.mean + shift)
    with numpyro.plate("population", B):
        v = numpyro.sample("v", HilbertDiffusion(gaussian_denoiser, moved, 0.0, split_sampler, QUICK))
        numpyro.sample("seen", dist.Normal(v, 0.5).to_event(1), obs=seen)
    return v


def test_inside_a_program_under_plate_condition_and_do():
    condition = conditions(B)
    key = jax.random.key(3)
    trace = handlers.trace(handlers.seed(program, key)).get_trace(condition)
    assert trace["v"]["value"].shape == (B, D)
    assert np.abs(trace["v"]["value"][2] - trace["v"]["value"][0]).min() > 100.0  # each its own condition
    value = condition.mean + 1.0
    conditioned = handlers.condition(program, {"v": value, "shift": jnp.asarray(0.3), "seen": value})
    joint, _ = log_joint(handlers.seed(conditioned, key), (condition,), {}, {})
    moved = condition._replace(mean=condition.mean + 0.3)
    expected = float(dist.Normal(0.0, 1.0).log_prob(0.3)) + B * D * float(dist.Normal(0, 0.5).log_prob(0))
    for b in range(B):
        one = jax.tree.map(lambda leaf, b=b: leaf[b], moved)
        expected += multivariate_normal(one.mean, covariance(one, 0.0)).logpdf(value[b])
    assert float(joint) == pytest.approx(expected, rel=1e-8)
    done = handlers.trace(handlers.seed(handlers.do(program, {"v": value}), key)).get_trace(condition)
    np.testing.assert_allclose(done["seen"]["fn"].base_dist.loc, value)  # downstream sees the intervention
    unbatched = handlers.trace(handlers.seed(lambda: _in_plate(), key)).get_trace()
    assert unbatched["v"]["value"].shape == (4, D)
    assert len(np.unique(np.asarray(unbatched["v"]["value"])[:, 0])) == 4


def _in_plate() -> None:
    with numpyro.plate("population", 4):
        numpyro.sample("v", gaussian())


def test_predictive_draws_with_and_without_posterior_samples():
    condition = conditions(B)
    prior = Predictive(program, num_samples=50)(jax.random.key(4), condition)
    assert prior["v"].shape == (50, B, D)
    centre = (prior["v"] - condition.mean)[..., 0].mean(1)
    assert np.corrcoef(centre, prior["shift"])[0, 1] > 0.3  # populations follow what is above them
    shift = jnp.array([-1_000.0, 1_000.0])
    posterior = Predictive(program, {"shift": shift})(jax.random.key(5), condition)
    np.testing.assert_allclose((posterior["v"] - condition.mean).mean((1, 2)), shift, atol=5.0)


def test_equal_distributions_share_compiled_code_and_vmap_takes_axes_away():
    compiled = jax.jit(lambda law, key: law.sample(key))
    network = ResidualDenoiser(init_network(jax.random.key(0), D, 0, width=8, depth=1), jnp.asarray(0.01))
    for shift in (0.0, 1.0):
        condition = conditions(B)._replace(mean=conditions(B).mean + shift)
        sampler = Sampler(Split(), 4, asinh_grid)  # a new object of equal value
        compiled(HilbertDiffusion(network, condition, 0.1, sampler, ProbabilityFlow(2)), jax.random.key(0))
    assert compiled._cache_size() == 1
    law = gaussian(B, sigma=0.1)
    value = law.condition.mean + 1.0
    one_by_one = jax.vmap(lambda law, v: law.log_prob(v))(law, value)
    np.testing.assert_allclose(one_by_one, law.log_prob(value), rtol=1e-12)
    keys = jax.random.split(jax.random.key(6), B)
    draws = jax.vmap(lambda law, key: law.sample(key, (7,)))(law, keys)
    assert draws.shape == (B, 7, D)
    made = jax.vmap(lambda c: HilbertDiffusion(gaussian_denoiser, c, 0.0, split_sampler, QUICK))(
        law.condition
    )
    assert made.batch_shape == (B,)


def test_draws_are_differentiable_in_the_condition():
    condition = conditions()

    def drawn(shift: float) -> jnp.ndarray:
        moved = condition._replace(mean=condition.mean + shift)
        return HilbertDiffusion(gaussian_denoiser, moved, 0.0, split_sampler, None).sample(jax.random.key(0))

    np.testing.assert_allclose(jax.jacfwd(drawn)(0.0), 1.0, rtol=1e-6)


def test_what_does_not_fit_is_refused():
    condition = conditions(B)
    with pytest.raises(
        ValueError, match=r"vectors \(..., D, D\).*given \(3, 2\), \(3, 2, 2\), \(3, 1\), \(3, 0\)"
    ):
        HilbertDiffusion(
            gaussian_denoiser, condition._replace(values=jnp.ones((B, 1))), 0.0, split_sampler, None
        )
    with pytest.raises(ValueError, match=r"sampler is static and must be hashable.*given \[\]"):
        HilbertDiffusion(gaussian_denoiser, condition, 0.0, [], None)
    with pytest.raises(ValueError, match="has no log_density: give one"):
        HilbertDiffusion(gaussian_denoiser, condition, 0.0, split_sampler, None).log_prob(condition.mean)
    network = init_network(jax.random.key(0), D, 0, width=8, depth=1)
    heavy = ResidualDenoiser(network, jnp.asarray(0.01), HeavyTailed(4))
    law = HilbertDiffusion(heavy, condition, 0.0, heun_sampler, log_density)
    assert jax.eval_shape(lambda law: law.sample(jax.random.key(0)), law).shape == (B, D)
    with pytest.raises(ValueError, match="log_prob needs noise"):
        law.log_prob(condition.mean)
