"""A regression in both languages, small enough to compile in a second, and guides of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest

from hilbertcell.inference.guides import BlockGuide

D, N = 3, 8


class Problem(NamedTuple):
    """Per-feature regressions with two coefficients and a shared positive scale; design (N, 2), outcome (D, N)."""

    design: np.ndarray
    outcome: np.ndarray

    def numpyro(self) -> tuple[Callable, BlockGuide, tuple[Any, ...]]:
        """Program, guide, arguments; call it where float64 is enabled."""

        def program(design, outcome):
            scale = numpyro.sample("scale", dist.HalfNormal(jnp.ones(2)).to_event(1))
            with numpyro.plate("feature", D):
                weights = numpyro.sample("weights", dist.Normal(jnp.zeros(2), scale).to_event(1))
                numpyro.sample("outcome", dist.Normal(weights @ design.T, 0.5).to_event(1), obs=outcome)

        args = (jnp.asarray(self.design), jnp.asarray(self.outcome))
        return program, BlockGuide(program, *args, **self.starts), args

    def pyro(self) -> tuple[Callable, Callable, tuple[Any, ...]]:
        """The same in Pyro."""
        import pyro
        import torch
        from pyro.distributions import HalfNormal, Normal

        from hilbertcell.inference.pyro.guides import BlockGuide
        from hilbertcell.models.pyro.arguments import as_tensors

        def program(design, outcome):
            scale = pyro.sample("scale", HalfNormal(torch.ones_like(design[0])).to_event(1))
            with pyro.plate("feature", D):
                weights = pyro.sample("weights", Normal(torch.zeros_like(scale), scale).to_event(1))
                pyro.sample("outcome", Normal(weights @ design.T, 0.5).to_event(1), obs=outcome)

        args = as_tensors(tuple(self))
        return program, BlockGuide(program, *args, **self.starts), args

    @property
    def starts(self) -> dict[str, dict[str, np.ndarray]]:
        """Starting values of guides."""
        initial = {"weights": np.full((D, 2), 0.1), "scale": np.array([0.8, 1.2])}
        return {"initial": initial, "initial_sd": {"weights": np.array([[0.3, 0.2]] * D)}}

    def params(self) -> dict[str, np.ndarray]:
        """Parameters of the guide unlike those it starts from."""
        rng = np.random.default_rng(1)
        tril = lambda *shape: np.tril(0.3 * rng.standard_normal(shape), -1) + np.eye(2) * rng.uniform(0.5, 2)
        return {
            "shared_loc": rng.standard_normal(2),
            "shared_tril": tril(2, 2),
            "feature_loc": rng.standard_normal((D, 2)),
            "feature_tril": tril(D, 2, 2),
            "feature_sd": np.ones((D, 0)),
            "feature_common": rng.standard_normal((D, 2, 2)),
        }

    def noise(self) -> dict[str, np.ndarray]:
        """A draw of the guide's noise."""
        rng = np.random.default_rng(2)
        return {"_shared": rng.standard_normal(2), "_feature": rng.standard_normal((D, 2))}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    design = rng.standard_normal((N, 2)) @ np.array([[1.0, 0.9], [0.0, 0.4]])
    outcome = rng.standard_normal((D, 2)) @ design.T + 0.5 * rng.standard_normal((D, N))
    with jax.enable_x64(True):
        yield Problem(design, outcome)
