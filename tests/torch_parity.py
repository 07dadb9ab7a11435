"""The same condition and weights in JAX and in torch, for tests that hold the two together; needs torch only when called."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hilbertcell.models.denoisers import Condition, ResidualDenoiser, init_network


@contextmanager
def precision(dtype: str) -> Iterator[None]:
    """JAX in single precision, or with double precision switched on."""
    with jax.enable_x64(dtype == "float64"):
        yield


def trained(
    num_coordinates: int, num_features: int, width: int, depth: int, dtype: str, sigma_min: float = 0.05
) -> ResidualDenoiser:
    """A denoiser with weights of order one in every layer, the last and the modulations included."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(
        lambda: init_network(jax.random.key(0), num_coordinates, num_features, width=width, depth=depth)
    )
    network = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / leaf.shape[-1] ** 0.5, dtype), shapes
    )
    return ResidualDenoiser(network, jnp.asarray(sigma_min, dtype))


def condition_of(values: Sequence[Sequence[float]], num_features: int, dtype: str) -> Condition:
    """Conditions (B, ...) with eigenvalues (B, D), each with its own mean, eigenvectors and features."""
    rng = np.random.default_rng(1)
    batch, size = np.shape(values)
    vectors = np.linalg.qr(rng.standard_normal((batch, size, size)))[0]
    leaves = (
        rng.standard_normal((batch, size)),
        vectors,
        np.asarray(values),
        rng.standard_normal((batch, num_features)),
    )
    return Condition(*(jnp.asarray(leaf, dtype) for leaf in leaves))


def tensor(torch: ModuleType, array: Any) -> Any:
    """A tensor of the same type with a copy of an array."""
    return torch.tensor(np.asarray(array))


def state_of(torch: ModuleType, denoiser: ResidualDenoiser) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): tensor(torch, leaf)
        for path, leaf in jax.tree.leaves_with_path(denoiser)
    }


def assert_close(found: Any, expected: Any, rtol: float) -> None:
    """Points (..., D) agree to `rtol` of the largest coordinate of each."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    assert np.all(np.abs(found - expected).max(-1) <= rtol * np.abs(expected).max(-1))
