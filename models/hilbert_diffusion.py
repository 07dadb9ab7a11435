"""The law of a population given the draws of its batch, by a diffusion: a NumPyro distribution.

Generative process of one population, in signal-ordered coordinates:

    v_T ~ N(mean, S + sigma_max^2 I)                 the program's law at a level where nothing else is left
    dv  = (v - D(v, sigma, condition)) / sigma dsigma        from sigma_max down to sigma (or the reverse SDE)

`D` is any denoiser of `models.denoisers`; with the program's own, `D = G`, the law is `N(mean, S + sigma^2 I)`.
"""

from collections.abc import Callable, Hashable
from functools import partial

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax import Array
from jax.tree_util import Partial
from jax.typing import ArrayLike
from numpyro.distributions import constraints

from hilbertcell.models.denoisers import Condition, Denoiser

SamplerFunction = Callable[[Array, Denoiser, Condition, Array], Array]
LogDensity = Callable[[Array, Denoiser, Condition, Array], Array]


class HilbertDiffusion(dist.Distribution):
    """Law of populations `v` (D,) at noise level `sigma`; batch shape is that of the leading axes of `condition`.

    `sample` stops and `log_prob` starts at `sigma`: 0 for latent populations, the level of an observed one when it is
    scored. `sampler(key, denoiser, condition, sigma)` and `log_density(v, denoiser, condition, sigma)` work on one
    point and are static: pass module-level functions or values that hash equal (`hilbertcell.inference.samplers`,
    `hilbertcell.inference.probability_flow`), or every call compiles anew. `log_prob` is the density of the
    probability flow: samplers of the flow draw from it, those of the SDE only as far as the denoiser is exact.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from hilbertcell.models.denoisers import Condition, gaussian_denoiser
        >>> condition = Condition(jnp.zeros((5, 2)), jnp.tile(jnp.eye(2), (5, 1, 1)), jnp.ones((5, 2)), jnp.zeros((5, 0)))
        >>> exact = lambda key, denoiser, c, sigma: c.mean + jax.random.normal(key, c.mean.shape)
        >>> HilbertDiffusion(gaussian_denoiser, condition, 0.0, exact, None).sample(jax.random.key(0), (3,)).shape
        (3, 5, 2)
    """

    support = constraints.real_vector
    pytree_data_fields = ("denoiser", "condition", "sigma")
    pytree_aux_fields = ("sampler", "log_density")

    def __init__(
        self,
        denoiser: Denoiser,
        condition: Condition,
        sigma: ArrayLike,
        sampler: SamplerFunction,
        log_density: LogDensity | None,
    ) -> None:
        """See the class.

        Args:
            denoiser: a pytree of arrays that can be called (an Equinox module), or a module-level function.
            condition: `mean`, `values` (..., D), `vectors` (..., D, D), `features` (..., F).
            sigma: level, broadcast against the leading axes of `condition`.
            sampler: how `sample` draws one point.
            log_density: how `log_prob` scores one point; None: it is never asked for.

        Raises:
            ValueError: shapes that do not fit, or a sampler or log density that cannot be hashed.
        """
        _check(condition, sampler, log_density)
        # A plain function is no pytree of arrays: Partial makes it one with nothing in it.
        leaves = jax.tree.leaves(denoiser)
        self.denoiser = Partial(denoiser) if leaves and leaves[0] is denoiser else denoiser
        batch_shape = condition.mean.shape[:-1]
        self.condition = condition
        self.sigma = jnp.broadcast_to(jnp.asarray(sigma, condition.mean.dtype), batch_shape)
        self.sampler, self.log_density = sampler, log_density
        super().__init__(batch_shape, condition.mean.shape[-1:])

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of the condition, also where `vmap` has taken some away."""
        return jnp.shape(self.condition.mean)[:-1]

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw populations `sample_shape + batch_shape + (D,)`."""
        shape = (*sample_shape, *self.batch_shape)
        return _draw(key, self.denoiser, self.condition, self.sigma, self.sampler, shape)

    def log_prob(self, value: Array) -> Array:
        """Log density of populations (..., D) at level `sigma`, shape (...) broadcast against the batch shape.

        Raises:
            ValueError: without a `log_density`, or if the denoiser's process has no likelihood.
        """
        if self.log_density is None:
            raise ValueError(
                "this HilbertDiffusion has no log_density: give one, "
                "hilbertcell.inference.probability_flow.log_density for example"
            )
        value = jnp.asarray(value, self.condition.mean.dtype)
        shape = jnp.broadcast_shapes(value.shape, (*self.batch_shape, *self.event_shape))
        value = jnp.broadcast_to(value, shape)
        return _score(value, self.denoiser, self.condition, self.sigma, self.log_density)


# Compiled here, so that a program that is run step by step compiles a sampler once and not at every call.


@partial(jax.jit, static_argnums=(4, 5))
def _draw(
    key: Array,
    denoiser: Denoiser,
    condition: Condition,
    sigma: Array,
    sampler: SamplerFunction,
    shape: tuple[int, ...],
) -> Array:
    def draw(key: Array, condition: Condition, sigma: Array) -> Array:
        return sampler(key, denoiser, condition, sigma)

    for axis in range(len(shape)):  # the axes of the batch, innermost first, then those of the sample
        draw = jax.vmap(draw, in_axes=(0, 0, 0) if axis < sigma.ndim else (0, None, None))
    return draw(jax.random.split(key, shape), condition, sigma)


@partial(jax.jit, static_argnums=4)
def _score(
    value: Array, denoiser: Denoiser, condition: Condition, sigma: Array, log_density: LogDensity
) -> Array:
    def score(v: Array, condition: Condition, sigma: Array) -> Array:
        return log_density(v, denoiser, condition, sigma)

    for axis in range(value.ndim - 1):
        score = jax.vmap(score, in_axes=(0, 0, 0) if axis < sigma.ndim else (0, None, None))
    return score(value, condition, sigma)


def _check(condition: Condition, sampler: Hashable, log_density: Hashable) -> None:
    mean, vectors, values, features = (jnp.shape(leaf) for leaf in condition)
    if not mean or vectors != (*mean, mean[-1]) or values != mean or features[:-1] != mean[:-1]:
        raise ValueError(
            "a condition has mean (..., D), vectors (..., D, D), values (..., D), features (..., F) with the same "
            f"leading axes; given {mean}, {vectors}, {values}, {features}"
        )
    for name, function in (("sampler", sampler), ("log_density", log_density)):
        try:
            hash(function)
        except TypeError as error:
            raise ValueError(
                f"{name} is static and must be hashable, a module-level function for example; given {function!r}"
            ) from error
