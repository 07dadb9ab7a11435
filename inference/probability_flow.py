"""Log density of a diffusion by its probability flow (Song et al. 2021, section 4.3), in whitened points.

In the points z of `models.denoisers` the flow is `dz = -F dtheta`, so that along the flow from a point at level
`sigma` up to `sigma_max`, where z is standard normal,

    log p_sigma(v) = log N(z_max; 0, I) - 1/2 log det(S + sigma^2) - Integral over sigma of tr(dF / dz dtheta/dsigma)

with the sign of an ascending sigma. The program's density is exact with any number of steps; the steps resolve F alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from hilbertcell.models.denoisers import Condition, Denoiser, colour, residual, root, whiten
from hilbertcell.models.forward_processes import process_of, terminal_level

_LOG_2PI = 1.8378770664093453


@dataclass(frozen=True)
class ProbabilityFlow:
    """`flow(v, denoiser, condition, sigma) -> log density` (); classical Runge-Kutta in `asinh(sigma / w)`.

    Hashable by value: equal flows share compiled code.
    """

    num_steps: int = 32  # four denoiser evaluations each
    probes: int = 0  # Rademacher probes of Hutchinson's trace, the same at every level; 0: the exact trace
    seed: int = 0  # of the probes

    def __call__(self, v: Array, denoiser: Denoiser, condition: Condition, sigma: ArrayLike) -> Array:
        """Log density () at `v` (D,) of the law at level `sigma`.

        Raises:
            ValueError: if the denoiser's process has no likelihood.
        """
        process_of(denoiser).require_likelihood("log_prob")
        values = condition.values
        sigma = jnp.asarray(sigma, v.dtype)
        top = terminal_level(values, sigma)
        bend = 0.2 * root(values.max()) + 1e-6 * top
        clock = jnp.linspace(jnp.arcsinh(sigma / bend), jnp.arcsinh(top / bend), self.num_steps + 1)
        probes = jax.random.rademacher(jax.random.key(self.seed), (self.probes, len(v)), v.dtype)

        def velocity(z: Array, u: Array) -> tuple[Array, Array]:
            """dz/du (D,) and its divergence () at `sigma = w sinh(u)`."""
            level = bend * jnp.sinh(u)
            total = values + jnp.square(level)
            # dtheta/du; zero where the law has no variance, also at level 0.
            rate = root(values) / jnp.where(total > 0, total, 1.0) * bend * jnp.cosh(u)

            def drift(z: Array) -> Array:
                v = colour(z, level, condition)
                return -rate * residual(denoiser(v, level, condition), v, level, condition)

            if not self.probes:
                return drift(z), jnp.trace(jax.jacfwd(drift)(z))
            value, push = jax.linearize(drift, z)
            return value, (probes * jax.vmap(push)(probes)).sum(-1).mean()

        @jax.checkpoint  # gradients would keep a Jacobian per stage
        def step(state: tuple[Array, Array], ends: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            (z, divergence), (u, u_next) = state, ends
            h = u_next - u
            k1, d1 = velocity(z, u)
            k2, d2 = velocity(z + 0.5 * h * k1, u + 0.5 * h)
            k3, d3 = velocity(z + 0.5 * h * k2, u + 0.5 * h)
            k4, d4 = velocity(z + h * k3, u_next)
            return (
                z + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4),
                divergence + h / 6 * (d1 + 2 * d2 + 2 * d3 + d4),
            ), None

        start = whiten(v, sigma, condition), jnp.zeros((), v.dtype)
        (z, divergence), _ = jax.lax.scan(step, start, (clock[:-1], clock[1:]))
        normal = -0.5 * (jnp.square(z) + _LOG_2PI).sum()
        return normal + divergence - 0.5 * jnp.log(values + jnp.square(sigma)).sum()


log_density = ProbabilityFlow()
