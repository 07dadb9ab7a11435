"""Affine maps and the two normalisations of the denoiser, in the layout of the published checkpoints."""

from typing import ClassVar, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

NORM_EPS = 1e-6
FLOAT = jnp.float32  # of new parameters, also where float64 is switched on

QKNorm = Literal["mean_square", "variance"]


class Affine(eqx.Module):
    """x -> W x + b on the last axis; the weight is stored (out, in), as checkpoints do."""

    OFFICIAL: ClassVar[dict[str, str]] = {"weight": "weight", "bias": "bias"}

    weight: Array  # (out, in)
    bias: Array  # (out,)

    def __call__(self, x: Array) -> Array:
        """Map `x` (..., k), k <= in; inputs beyond the k given ones count as zero and cost nothing."""
        return x @ self.weight[:, : x.shape[-1]].T + self.bias


def at_least_float32(x: Array) -> Array:
    """`x` in float32, or in float64 if it is; sums of squares in bfloat16 would have two digits."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def gaussian(key: Array, *shape: int) -> Array:
    """N(0, 1) parameters."""
    return jax.random.normal(key, shape, FLOAT)


def constant(value: float, *shape: int) -> Array:
    """Equal parameters."""
    return jnp.full(shape, value, FLOAT)


def xavier(key: Array, num_out: int, num_in: int) -> Affine:
    """Weights uniform with variance 2 / (in + out), bias zero (Glorot & Bengio 2010)."""
    return Affine(
        jax.nn.initializers.glorot_uniform(1, 0)(key, (num_out, num_in), FLOAT), constant(0, num_out)
    )


def normal(key: Array, num_out: int, num_in: int) -> Affine:
    """Weights N(0, 0.02^2), bias zero."""
    return Affine(0.02 * gaussian(key, num_out, num_in), constant(0, num_out))


def zeros(num_out: int, num_in: int) -> Affine:
    """The zero map: a modulation that starts as the identity."""
    return Affine(constant(0, num_out, num_in), constant(0, num_out))


def fan_in(key: Array, num_out: int, num_in: int) -> Affine:
    """Weights and bias uniform in +-1/sqrt(in): the default of the published framework."""
    bound = num_in**-0.5
    key_weight, key_bias = jax.random.split(key)
    return Affine(
        jax.random.uniform(key_weight, (num_out, num_in), FLOAT, -bound, bound),
        jax.random.uniform(key_bias, (num_out,), FLOAT, -bound, bound),
    )


def layer_norm(x: Array) -> Array:
    """Centre and scale the last axis to mean square one, in float32 at least; no learned weight."""
    wide = at_least_float32(x)
    centred = wide - wide.mean(-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + NORM_EPS)).astype(x.dtype)


def qk_norm(x: Array, weight: Array, form: QKNorm) -> Array:
    """Scale queries or keys over the width of a head and multiply by a learned weight shared by the heads.

    Args:
        x: (..., d) queries or keys.
        weight: (d,).
        form: "mean_square" divides by the root mean square. "variance" divides by the unbiased standard
            deviation although nothing is centred: what timm before 1.0.13 computed under the same name, which a
            checkpoint trained with it needs.
    """
    wide = at_least_float32(x)
    square = (
        jnp.square(wide).mean(-1, keepdims=True)
        if form == "mean_square"
        else wide.var(-1, ddof=1, keepdims=True)
    )
    return (wide * jax.lax.rsqrt(square + NORM_EPS) * weight).astype(jnp.promote_types(x.dtype, weight.dtype))


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """Normalised tokens, scaled and shifted by what the condition says (adaptive layer norm)."""
    return layer_norm(x) * (1.0 + scale) + shift
