"""The torch twin of the denoisers equals JAX's at the same weights, in both precisions, and compiles as one graph."""

import importlib
import shutil
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models.denoisers import (
    angle,
    colour,
    gaussian_denoiser,
    posterior_sd,
    shrinkage,
    whiten,
)
from tests.conftest import absent
from tests.torch_parity import assert_close, condition_of, precision, state_of, tensor, trained

RTOL = {"float32": 1e-5, "float64": 1e-10}
# Two laws of each number of coordinates: one plain, one that cannot vary somewhere or, in one dimension, at all. Then
# the coordinates that the network sees, features, width and depth.
CASES = {
    "one coordinate": ([(0.7,), (0.0,)], 1, 0, 4, 1),
    "three": ([(2.0, 0.3, 0.01), (2.0, 0.0, 0.0)], 3, 2, 16, 2),
    "as a fit has": ([tuple(2.0**-k for k in range(12)), (1.0,) * 6 + (0.0,) * 6], 8, 20, 64, 2),
}
SIGMA_MIN = 0.05
LEVELS = (0.0, 1e-6, SIGMA_MIN, 1.4 * SIGMA_MIN, 0.3, 2.0, 57.0)  # the last is terminal for a variance of 2


@pytest.fixture
def twin(torch) -> ModuleType:
    """The module under test."""
    return importlib.import_module("hilbertcell.models.pyro.denoisers")


def points(values, dtype: str) -> np.ndarray:
    """Points (L, B, D), L the levels, as wide as the laws at these."""
    shape = (len(LEVELS), *np.shape(values))
    noise = np.random.default_rng(2).standard_normal(shape)
    return (noise * np.sqrt(np.asarray(values) + np.square(LEVELS)[:, None, None])).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_denoisers_equal_those_of_jax(torch, twin, name, dtype):
    values, seen, num_features, width, depth = CASES[name]
    with precision(dtype):
        denoiser = trained(seen, num_features, width, depth, dtype, SIGMA_MIN)
        condition, v = condition_of(values, num_features, dtype), jnp.asarray(points(values, dtype))
        levels = jnp.asarray(LEVELS, dtype)

        @jax.jit
        @lambda f: jax.vmap(jax.vmap(f, (0, None, 0)), (0, 0, None))
        def both(v, sigma, condition):
            return gaussian_denoiser(v, sigma, condition), denoiser(v, sigma, condition)

        program, expected = both(v, levels, condition)
    own = twin.ResidualDenoiser.from_state_dict(state_of(torch, denoiser))
    given = twin.Condition(*(tensor(torch, leaf) for leaf in condition))
    v, sigma = tensor(torch, v), tensor(torch, levels)[:, None]
    with torch.no_grad():
        assert_close(twin.gaussian_denoiser(v, sigma, given), program, RTOL[dtype])
        assert_close(own(v, sigma, given), expected, RTOL[dtype])
    said = np.abs(expected - program).max((1, 2))
    assert np.all(said[:3] == 0)  # up to sigma_min the program alone speaks
    assert np.all(said[3:] > 0.01)


def test_parts_equal_those_of_jax(torch, twin):
    """By eigenvector, in double precision; at level 0 and infinity, and where a variance is zero."""
    with precision("float64"):
        condition = condition_of([(2.0, 0.3, 0.0)], 0, "float64")
        one, z = jax.tree.map(lambda leaf: leaf[0], condition), jnp.array([0.3, -1.0, 2.0])
        given = twin.Condition(*(tensor(torch, leaf) for leaf in one))
        for level in (0.0, 0.2, 20.0, np.inf):
            sigma, own_sigma = jnp.asarray(level), torch.tensor(level, dtype=torch.float64)
            for name, function in (
                ("angle", angle),
                ("shrinkage", shrinkage),
                ("posterior_sd", posterior_sd),
            ):
                if name == "angle" or np.isfinite(level):
                    found = getattr(twin, name)(given.values, own_sigma)
                    np.testing.assert_allclose(found, function(one.values, sigma), rtol=1e-14, err_msg=name)
            if np.isfinite(level):
                for name, function in (("whiten", whiten), ("colour", colour)):
                    found = getattr(twin, name)(tensor(torch, z), own_sigma, given)
                    expected = function(z, sigma, one)
                    np.testing.assert_allclose(found, expected, rtol=1e-13, err_msg=name)


def small(torch, twin, dtype: str = "float32"):
    """A denoiser, conditions (2, ...) and points (5, 2, 3) at levels (5, 1) in torch."""
    with precision(dtype):
        state = state_of(torch, trained(3, 2, 16, 2, dtype, SIGMA_MIN))
        condition = condition_of(CASES["three"][0], 2, dtype)
    given = twin.Condition(*(tensor(torch, leaf) for leaf in condition))
    v = torch.tensor(points(CASES["three"][0], dtype)[:5])
    return twin.ResidualDenoiser.from_state_dict(state), v, v.new_tensor(LEVELS[:5])[:, None], given


def test_names_of_the_state_dict_are_the_paths_of_the_tree(torch, twin):
    with precision("float32"):
        state = state_of(torch, trained(3, 2, 16, 2, "float32"))
    own = twin.ResidualDenoiser.from_state_dict(state).state_dict()
    assert set(own) == set(state)
    assert all(torch.equal(own[name], state[name]) for name in state)
    assert "network.blocks.1.modulation.weight" in own


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_network_are_refused(torch, twin, change):
    state = small(torch, twin)[0].state_dict()
    if change == "missing":
        del state["network.blocks.0.outer.bias"]
    elif change == "extra":
        state["network.other"] = torch.zeros(())
    else:
        state["network.exit.weight"] = torch.zeros(4, 16)
    with pytest.raises(RuntimeError, match=r"network\.(blocks\.0\.outer\.bias|other|exit\.weight)"):
        twin.ResidualDenoiser.from_state_dict(state)


def test_a_new_network_adds_nothing(torch, twin):
    _, v, sigma, given = small(torch, twin)
    new = twin.ResidualDenoiser(twin.ResidualNetwork(3, 2, 8, 1), torch.tensor(SIGMA_MIN))
    assert torch.equal(new(v, sigma, given), twin.gaussian_denoiser(v, sigma, given))


def test_type_and_device_are_those_of_the_arguments(torch, twin):
    """On the meta device an operation fails that was given a tensor made somewhere else."""
    denoiser, v, sigma, given = small(torch, twin)
    double = given.to(torch.float64)
    assert denoiser(v.double(), sigma, double).dtype == torch.float64  # the network stays in float32
    wide = denoiser.to(torch.float64)
    assert {x.dtype for x in wide.state_dict().values()} == {torch.float64}
    assert wide(v.double(), sigma.double(), double).dtype == torch.float64
    there = denoiser.to("meta")(v.to("meta"), sigma.to("meta"), given.to("meta"))
    assert there.device.type == "meta"
    assert there.shape == v.shape


def test_leading_axes_broadcast(torch, twin):
    """One condition for many points, and one point at a time, are the same."""
    denoiser, v, sigma, given = small(torch, twin, "float64")
    one = twin.Condition(*(leaf[0] for leaf in given))
    together = denoiser(v[:, 0], sigma[:, 0], one)
    apart = torch.stack([denoiser(v[i, 0], sigma[i, 0], one) for i in range(len(v))])
    torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(together, denoiser(v, sigma, given)[:, 0], rtol=1e-12, atol=1e-12)


def test_gradients_are_finite_where_the_program_has_no_variance(torch, twin):
    denoiser, v, sigma, given = small(torch, twin)
    v.requires_grad_()
    denoiser(v, sigma, given).sum().backward()
    assert torch.isfinite(v.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in denoiser.parameters())
    assert denoiser.network.entry.weight.grad.abs().max() > 0


def test_the_denoiser_compiles_as_one_graph(torch, twin):
    """`fullgraph` raises at a graph break. Code for it is made in a slow test: the C++ compiler takes its time."""
    denoiser, v, sigma, given = small(torch, twin)
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(v, sigma, given), denoiser(v, sigma, given), rtol=1e-6, atol=1e-6)


@pytest.mark.slow
def test_generated_code_equals_the_denoiser(torch, twin):
    if not (shutil.which("g++") or shutil.which("clang++")):
        absent("torch", "no C++ compiler, which torch.compile needs on the CPU")
    denoiser, v, sigma, given = small(torch, twin)
    torch._dynamo.reset()
    compiled = torch.compile(denoiser, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(v, sigma, given), denoiser(v, sigma, given), rtol=1e-5, atol=1e-5)
