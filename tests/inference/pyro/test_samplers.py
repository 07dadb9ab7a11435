"""Samplers of the torch twin visit the points of JAX's from the same start; their starts have the terminal law."""

import importlib
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.inference import samplers
from tests.torch_parity import assert_close, condition_of, precision, state_of, tensor, trained

NAMES = ("split_sampler", "heun_sampler", "dpm_sampler")
VALUES = [(2.0, 0.3, 0.01), (0.5, 0.5, 0.0)]
SIGMAS = np.array([0.0, 0.3])


@pytest.fixture
def denoisers(torch) -> ModuleType:
    return importlib.import_module("hilbertcell.models.pyro.denoisers")


@pytest.fixture
def twin(torch) -> ModuleType:
    """The module under test."""
    return importlib.import_module("hilbertcell.inference.pyro.samplers")


@pytest.fixture
def laws():
    """Conditions (2, ...) and a denoiser of JAX in double precision."""
    with precision("float64"):
        return condition_of(VALUES, 2, "float64"), trained(3, 2, 16, 1, "float64")


def in_torch(torch, denoisers, laws):
    condition, denoiser = laws
    given = denoisers.Condition(*(tensor(torch, leaf) for leaf in condition))
    return given, denoisers.ResidualDenoiser.from_state_dict(state_of(torch, denoiser))


@pytest.mark.parametrize("name", NAMES)
def test_trajectories_from_the_same_start_agree(torch, denoisers, twin, laws, name):
    """Two laws, one with a direction that cannot vary, each to the levels 0 and 0.3, with a network that speaks."""
    sampler, (condition, denoiser) = getattr(samplers, name), laws
    noise = np.random.default_rng(0).standard_normal((2, 2, 3))  # (sigma, law, D)

    @jax.jit
    @lambda f: jax.vmap(jax.vmap(f, (None, 0, 0)), (0, None, 0))
    def one(sigma, condition, noise):
        levels = sampler.levels(condition, sigma)
        start = condition.mean + levels[0] * noise
        states = samplers.trajectory(jax.random.key(0), denoiser, condition, start, levels, sampler.rule)
        return start, levels, states[1][0]

    with precision("float64"):
        start, levels, expected = one(jnp.asarray(SIGMAS), condition, jnp.asarray(noise))
    given, own_denoiser = in_torch(torch, denoisers, laws)
    own = getattr(twin, name)
    for i, sigma in enumerate(SIGMAS):
        own_levels = own.levels(given, sigma)
        assert_close(own_levels.T, levels[i], 1e-12)
        with torch.no_grad():
            points = twin.trajectory(own_denoiser, given, tensor(torch, start[i]), own_levels, own.rule)
        assert_close(points.transpose(0, 1), expected[i], 1e-9)
    # The network, and not the program alone, moves the points.
    with torch.no_grad():
        program = twin.sample(
            denoisers.gaussian_denoiser, given, tensor(torch, start[-1]), own_levels, own.rule
        )
    assert (points[-1] - program).abs().max() > 0.1


@pytest.mark.parametrize("name", ["asinh_grid", "rho_grid", "log_grid"])
def test_grids_equal_those_of_jax(torch, twin, name):
    """Down to 0, to a level below the floor, to one above it; of a law, a nearly flat one and a point mass."""
    values = np.array([[1.0, 0.25], [1.0, 0.0], [0.0, 0.0]])
    for num_steps in (1, 2, 7):
        for sigma in (0.0, 0.005, 0.4):
            with precision("float64"):
                rows = [samplers.Sampler(None, num_steps, getattr(samplers, name)) for _ in values]
                laws = [samplers.Condition(jnp.zeros(2), None, jnp.asarray(row), None) for row in values]
                expected = np.stack([s.levels(law, sigma) for s, law in zip(rows, laws, strict=True)], axis=1)
            own = twin.Sampler(None, num_steps, getattr(twin, name))
            found = own.levels(twin.Condition(None, None, torch.tensor(values), None), sigma)
            np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-200)


def test_draws_have_the_law_of_the_program(torch, denoisers, twin, laws):
    """`Split` is exact on the program: its draws show the terminal law, the grid and the map of axes at once."""
    given, _ = in_torch(torch, denoisers, laws)
    num_draws, generator = 20_000, torch.Generator().manual_seed(0)
    for sigma in (0.0, 0.3):
        draws = twin.split_sampler(generator, denoisers.gaussian_denoiser, given, sigma, (num_draws,))
        assert draws.shape == (num_draws, 2, 3)
        z = denoisers.whiten(draws, torch.full((2,), sigma, dtype=torch.float64), given)
        free = (given.values + sigma**2 > 0).double()
        assert (z.mean(0).abs().max()) < 4.5 / num_draws**0.5
        for law in range(2):
            expected = torch.diag(free[law])
            assert (torch.cov(z[:, law].T) - expected).abs().max() < 4.5 * (2 / num_draws) ** 0.5
        back = denoisers.colour(z, torch.full((2,), sigma, dtype=torch.float64), given)
        torch.testing.assert_close(back, draws, rtol=1e-9, atol=1e-9)  # nothing lies where a law cannot be


def test_a_generator_decides_the_draws_and_the_type_is_kept(torch, denoisers, twin, laws):
    given, denoiser = in_torch(torch, denoisers, laws)
    given, denoiser = given.to(torch.float32), denoiser.to(torch.float32)

    def draw(seed):
        with torch.no_grad():
            return twin.split_sampler(torch.Generator().manual_seed(seed), denoiser, given, 0.0, (4,))

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    assert draw(0).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_sampling_compiles_as_one_graph(torch, denoisers, twin, laws, name):
    given, denoiser = in_torch(torch, denoisers, laws)
    own = getattr(twin, name)
    levels = own.grid(torch.full((2,), 50.0).double(), torch.zeros(2).double(), 3, given.values)
    start = given.mean + 50.0
    torch._dynamo.reset()
    compiled = torch.compile(twin.sample, fullgraph=True, backend="eager")
    with torch.no_grad():
        found = compiled(denoiser, given, start, levels, own.rule)
        torch.testing.assert_close(found, twin.sample(denoiser, given, start, levels, own.rule))
