"""Denoisers `D(v, sigma, condition)`: the posterior mean of a population of which noise `sigma` was added.

With `v_sigma = v_0 + sigma eps` and `score` the gradient of its log density, `D(v, sigma) = v + sigma^2 score(v, sigma)`
(Tweedie). Given the draws in `condition` the hidden-factor program says `v_0 ~ N(mean, S)`, and the denoiser of that is

    G(v, sigma) = mean + S / (S + sigma^2) (v - mean)

Every other denoiser here is written around it,

    D(v, sigma) = G(v, sigma) + (S sigma^2 / (S + sigma^2))^(1/2) F(v, sigma)                                        (1)

with matrix functions of S taken in its eigenbasis. The factor is the standard deviation of `v_0` given `v_sigma` under
the program, so that F is of order one at every level. In whitened points `z = (S + sigma^2)^(-1/2) (v - mean)`, by
eigenvector, the probability flow `dv / dsigma = (v - D) / sigma` is nothing but

    dz = -F dtheta,          theta = arctan(sigma / sqrt(S))                                                         (2)

which samplers and densities use: they are exact for the program, and numerical in F only.

All functions take one point `v` (D,) and one level `sigma` (); callers batch by `jax.vmap`.
"""

from collections.abc import Callable
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hilbertcell.models.forward_processes import ForwardProcess, VarianceExploding, process_of
from hilbertcell.models.perturbdiff.layers import Affine, fan_in, layer_norm, modulate, zeros

Denoiser = Callable[[Array, Array, "Condition"], Array]  # (v (D,), sigma (), condition) -> (D,)


class Condition(NamedTuple):
    """What is given when a population is drawn, in signal-ordered coordinates; leading axes by `vmap`."""

    mean: Array  # (D,) the program's mean of v given its draws
    vectors: Array  # (D, D) columns are the eigenvectors of S = A^T Cov(eps') A
    values: Array  # (D,) its eigenvalues, >= 0
    features: Array  # (F,) everything a network sees: drawn u, d, control mean; context; perturbation


def gaussian_denoiser(v: Array, sigma: Array, condition: Condition) -> Array:
    """G: exact posterior mean (D,) of `v_0 ~ N(mean, S)` given `v = v_0 + sigma eps`."""
    rotated = condition.vectors.T @ (v - condition.mean)
    return condition.mean + condition.vectors @ (shrinkage(condition.values, sigma) * rotated)


def shrinkage(values: Array, sigma: Array) -> Array:
    """`S / (S + sigma^2)` per eigenvector (D,); 1 without noise, where S is zero too."""
    total = values + jnp.square(sigma)
    return jnp.where(total > 0, values / jnp.where(total > 0, total, 1.0), 1.0)


def posterior_sd(values: Array, sigma: Array) -> Array:
    """`(S sigma^2 / (S + sigma^2))^(1/2)` per eigenvector (D,), the unit of F."""
    return sigma * root(shrinkage(values, sigma))


def root(values: Array) -> Array:
    """Square root with gradient 0 at 0, where autodiff would give infinity and then NaN."""
    positive = values > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, values, 1.0)), 0.0)


def angle(values: Array, sigma: Array) -> Array:
    """theta of equation (2) per eigenvector (D,), from 0 at `sigma = 0` to pi / 2; pi / 2 where S = 0 < sigma."""
    return jnp.arctan2(sigma, root(values))


def whiten(v: Array, sigma: Array, condition: Condition) -> Array:
    """z (D,) by eigenvector: standard normal under the program at any level; 0 where a coordinate cannot vary."""
    sd = root(condition.values + jnp.square(sigma))
    rotated = condition.vectors.T @ (v - condition.mean)
    return jnp.where(sd > 0, rotated / jnp.where(sd > 0, sd, 1.0), 0.0)


def colour(z: Array, sigma: Array, condition: Condition) -> Array:
    """The inverse of `whiten`: v (D,)."""
    return condition.mean + condition.vectors @ (root(condition.values + jnp.square(sigma)) * z)


def residual(estimate: Array, v: Array, sigma: Array, condition: Condition) -> Array:
    """F of equation (1) by eigenvector (D,), from the estimate `D(v, sigma, condition)` (D,) of any denoiser.

    Zero where the program has no variance, and at `sigma = 0`, where it is zero for every law with a smooth density.
    """
    difference = estimate - gaussian_denoiser(v, sigma, condition)
    sd = posterior_sd(condition.values, sigma)
    return jnp.where(sd > 0, (condition.vectors.T @ difference) / jnp.where(sd > 0, sd, 1.0), 0.0)


class ResidualBlock(eqx.Module):
    """`h + W2 silu(W1 norm(h))`, the normalised points scaled and shifted by the condition; starts as the identity."""

    modulation: Affine
    inner: Affine
    outer: Affine

    def __call__(self, h: Array, context: Array) -> Array:
        """Map `h` (width,) given `context` (width,)."""
        shift, scale = jnp.split(self.modulation(context), 2)
        return h + self.outer(jax.nn.silu(self.inner(modulate(h, shift, scale))))


_FREQUENCIES = (
    8  # of the embedding of a level: log sigma / sigma_0 in [-8, 8] is resolved to a quarter of an e-fold
)


class ResidualNetwork(eqx.Module):
    """F: a residual network of a whitened point, its level and the condition's features; zero at the start.

    The level enters as `log(sigma / s)` with `s^2` the mean of S, by itself and by Fourier features: what the shape
    of a law looks like depends on the noise relative to its width. Absolute scales, where they matter, are features.
    """

    entry: Affine
    context: tuple[Affine, Affine]
    blocks: tuple[ResidualBlock, ...]
    exit: Affine

    def __call__(self, whitened: Array, relative_level: Array, features: Array) -> Array:
        """F (D,) in coordinates at `whitened` (D,) and `relative_level` = log(sigma / s) (), in their type."""
        octaves = jnp.arange(_FREQUENCIES, dtype=relative_level.dtype) - 3
        angles = relative_level * 2.0**octaves * (jnp.pi / 8)
        embedding = jnp.concatenate([relative_level[None] / 4, jnp.sin(angles), jnp.cos(angles), features])
        context = jax.nn.silu(self.context[1](jax.nn.silu(self.context[0](embedding))))
        h = self.entry(whitened) + context
        for block in self.blocks:
            h = block(h, context)
        return self.exit(layer_norm(h))


def init_network(
    key: Array, num_coordinates: int, num_features: int, *, width: int = 128, depth: int = 3
) -> ResidualNetwork:
    """A network for points (D,) and features (F,) whose output is zero."""
    keys = jax.random.split(key, 3 + 2 * depth)
    blocks = tuple(
        ResidualBlock(
            zeros(2 * width, width),
            fan_in(keys[3 + 2 * i], width, width),
            fan_in(keys[4 + 2 * i], width, width),
        )
        for i in range(depth)
    )
    context = (
        fan_in(keys[0], width, 1 + 2 * _FREQUENCIES + num_features),
        fan_in(keys[1], width, width),
    )
    return ResidualNetwork(
        fan_in(keys[2], width, num_coordinates), context, blocks, zeros(num_coordinates, width)
    )


class ResidualDenoiser(eqx.Module):
    """Equation (1) with a network for F; the program's own denoiser below `sigma_min`.

    A network for fewer coordinates than v has is one for the leading ones; in the others F is zero.
    Below `sigma_min = 1 / sqrt(n_max)` no population says anything, there F counts as zero. Between `sigma_min` and
    twice that it is faded in by a cubic in log sigma: a jump would cost solvers their order of convergence.
    """

    network: ResidualNetwork
    sigma_min: Array  # (); an array, so that another value does not compile again
    process: ForwardProcess = eqx.field(static=True, default=VarianceExploding())

    def __call__(self, v: Array, sigma: Array, condition: Condition) -> Array:
        """D (D,) in the type of `v`; the network itself runs in the type of its weights, float32 once trained."""
        sigma = jnp.asarray(sigma, v.dtype)
        # The tiny floor keeps log finite at sigma = 0 and for a law without variance, where F is not used.
        floor = jnp.finfo(jnp.float32).tiny
        width = root(condition.values.mean())
        relative = jnp.log(jnp.maximum(sigma, floor)) - jnp.log(jnp.maximum(width, floor))
        seen, dtype = self.network.entry.weight.shape[1], self.network.exit.weight.dtype
        whitened = (condition.vectors @ whiten(v, sigma, condition))[:seen]
        f = self.network(*(x.astype(dtype) for x in (whitened, relative, condition.features)))
        f = jnp.pad(f.astype(v.dtype), (0, len(v) - seen))
        gain = self.gate(sigma) * posterior_sd(condition.values, sigma)
        return gaussian_denoiser(v, sigma, condition) + condition.vectors @ (gain * (condition.vectors.T @ f))

    def gate(self, sigma: Array) -> Array:
        """0 up to `sigma_min`, 1 from twice `sigma_min` on."""
        sigma_min = jnp.asarray(self.sigma_min, sigma.dtype)
        position = jnp.clip(jnp.log2(jnp.maximum(sigma, sigma_min) / sigma_min), 0.0, 1.0)
        return jnp.square(position) * (3.0 - 2.0 * position)


def without_features(condition: Condition) -> Condition:
    """The condition of a network trained with dropped features: the same program, features zero."""
    return condition._replace(features=jnp.zeros_like(condition.features))


class GuidedDenoiser(eqx.Module):
    """Classifier-free guidance (Ho & Salimans 2022): `(1 + w) D(v, sigma, c) - w D(v, sigma, null(c))`.

    `weight` 0 is none. What comes out is no longer the law the denoisers were trained for: draws are more typical
    of the condition and less spread than populations are.
    """

    denoiser: Denoiser
    weight: Array  # ()
    null: Callable[[Condition], Condition] = eqx.field(static=True, default=without_features)

    @property
    def process(self) -> ForwardProcess:
        """The process of the guided denoiser."""
        return process_of(self.denoiser)

    def __call__(self, v: Array, sigma: Array, condition: Condition) -> Array:
        """The guided estimate (D,)."""
        given, free = (self.denoiser(v, sigma, c) for c in (condition, self.null(condition)))
        return given + jnp.asarray(self.weight, v.dtype) * (given - free)
