"""The published vectors, and matrix products in full float32 on every kind of device."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hilbertcell.models import perturbdiff


class Golden:
    """Arrays of the golden file by name, and distances to them."""

    def __init__(self, arrays: dict[str, np.ndarray]):
        self.arrays = arrays

    def __getitem__(self, name: str) -> np.ndarray:
        return self.arrays[name]

    def state(self, prefix: str) -> dict[str, np.ndarray]:
        """Parameters below a prefix, by official name."""
        return {n.removeprefix(prefix): a for n, a in self.arrays.items() if n.startswith(prefix)}

    def jax(self, name: str) -> jax.Array:
        """An array in float32 (or int32), as the network takes it."""
        array = self.arrays[name]
        return jnp.asarray(array, jnp.float32 if np.issubdtype(array.dtype, np.floating) else jnp.int32)

    def check(self, name: str, given, tolerance: float) -> None:
        """The relative L2 error of `given` to the array `name` must be at most `tolerance`."""
        given, expected = np.asarray(given, np.float64), np.asarray(self.arrays[name], np.float64)
        assert given.shape == expected.shape, name
        error = np.linalg.norm(given - expected) / np.linalg.norm(expected)
        assert error <= tolerance, f"{name}: relative L2 error {error:.2e} > {tolerance:g}"


@pytest.fixture(scope="session")
def golden(data_dir: Path) -> Golden:
    with np.load(data_dir / "golden" / "perturbdiff_small.npz") as file:
        return Golden({name: file[name] for name in file.files})


@pytest.fixture(scope="session")
def networks(golden) -> tuple[perturbdiff.Denoiser, perturbdiff.CovariateEncoder]:
    return perturbdiff.from_state_dict(golden.state("param/"), num_heads=4)


@pytest.fixture(scope="module", autouse=True)
def _full_precision() -> Iterator[None]:
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="session")
def tiny() -> tuple[perturbdiff.Denoiser, perturbdiff.CovariateEncoder]:
    """Networks of 5 genes whose every parameter is random, so that no part is silent."""

    def new(key):
        return (
            perturbdiff.init_denoiser(key, 5, hidden=8, depth=2, num_heads=2, gene_features=3),
            perturbdiff.init_covariate_encoder(
                key, 5, perturbations=3, cell_types=np.eye(2, 4, dtype=np.float32), batches=2, hidden=4
            ),
        )

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(new, jax.random.key(0))
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(0.0, 0.5, a.shape), a.dtype), shapes)
