"""Transformer blocks over a set of cells; the unbatched mathematics of one set.

A token is a target cell joined with its index-paired control cell. There is no position: a block commutes with
permutations of the pairs. Shapes: S cells, H hidden width, condition `c` (S, H), or (1, H) when all cells of the
set share it, which makes every modulation S times cheaper.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

from hilbertcell.models.perturbdiff import layers
from hilbertcell.models.perturbdiff.layers import Affine, QKNorm


class Attention(eqx.Module):
    """Self-attention over the S joint tokens of width 2H, queries and keys normalised per head."""

    OFFICIAL: ClassVar[dict[str, str]] = {
        "qkv": "qkv", "query_scale": "q_norm.weight", "key_scale": "k_norm.weight", "out": "proj",
    }  # fmt: skip

    qkv: Affine  # 2H -> 6H, rows ordered (query, key, value), then head, then coordinate
    query_scale: Array  # (d,)
    key_scale: Array  # (d,)
    out: Affine  # 2H -> 2H
    norm: QKNorm = eqx.field(static=True)

    def __call__(self, tokens: Array) -> Array:
        """(S, 2H) -> (S, 2H)."""
        head_width = self.query_scale.shape[0]
        query, key, value = jnp.moveaxis(self.qkv(tokens).reshape(len(tokens), 3, -1, head_width), 1, 0)
        query = layers.qk_norm(query, self.query_scale, self.norm)
        key = layers.qk_norm(key, self.key_scale, self.norm)
        return self.out(jax.nn.dot_product_attention(query, key, value).reshape(tokens.shape))


class MLP(eqx.Module):
    """H -> 4H -> H with the tanh form of GELU."""

    OFFICIAL: ClassVar[dict[str, str]] = {"first": "fc1", "second": "fc2"}

    first: Affine
    second: Affine

    def __call__(self, x: Array) -> Array:
        """(..., H) -> (..., H)."""
        return self.second(jax.nn.gelu(self.first(x), approximate=True))


class Block(eqx.Module):
    """Attention and MLP in parallel, both reading the normalised *input* of the block.

    With (s1, k1, g1, s2, k2, g2) six equal chunks of an affine map of SiLU(c), per stream,

        [dx, dy] = Attention([LN(x)(1 + k1) + s1, LN(y)(1 + k1') + s1'])
        x <- x + g1 dx + g2 MLP(LN(x)(1 + k2) + s2)          and y likewise with its own maps
    """

    OFFICIAL: ClassVar[dict[str, str]] = {
        "attention": "block.attn",
        "mlp": "block.mlp",
        "control_mlp": "block.control_mlp",
        "modulation": "block.adaLN_modulation.1",
        "control_modulation": "block.control_adaLN_modulation.1",
    }

    attention: Attention
    mlp: MLP
    control_mlp: MLP
    modulation: Affine  # H -> 6H
    control_modulation: Affine

    def __call__(self, x: Array, y: Array, c: Array) -> tuple[Array, Array]:
        """Update the target stream `x` and the control stream `y`, each (S, H), under the condition `c`."""
        active = jax.nn.silu(c)
        s1, k1, g1, s2, k2, g2 = jnp.split(self.modulation(active), 6, axis=-1)
        t1, l1, h1, t2, l2, h2 = jnp.split(self.control_modulation(active), 6, axis=-1)
        tokens = jnp.concatenate([layers.modulate(x, s1, k1), layers.modulate(y, t1, l1)], axis=-1)
        dx, dy = jnp.split(self.attention(tokens), 2, axis=-1)
        return (
            x + g1 * dx + g2 * self.mlp(layers.modulate(x, s2, k2)),
            y + h1 * dy + h2 * self.control_mlp(layers.modulate(y, t2, l2)),
        )


class Head(eqx.Module):
    """From tokens to expression: modulated layer norm, affine map, ReLU (model units are not negative)."""

    OFFICIAL: ClassVar[dict[str, str]] = {"linear": "linear", "modulation": "adaLN_modulation.1"}

    linear: Affine  # H -> G
    modulation: Affine  # H -> 2H, chunks shift and scale

    def __call__(self, x: Array, c: Array) -> Array:
        """(S, H) -> (S, G)."""
        shift, scale = jnp.split(self.modulation(jax.nn.silu(c)), 2, axis=-1)
        return jax.nn.relu(self.linear(layers.modulate(x, shift, scale)))


def init_block(key: Array, hidden: int, num_heads: int, norm: QKNorm) -> Block:
    """Xavier weights; modulations zero, so that a new block is the identity."""
    keys = iter(jax.random.split(key, 6))
    mlps = [
        MLP(layers.xavier(next(keys), 4 * hidden, hidden), layers.xavier(next(keys), hidden, 4 * hidden))
        for _ in range(2)
    ]
    unit = layers.constant(1, 2 * hidden // num_heads)
    attention = Attention(
        layers.xavier(next(keys), 6 * hidden, 2 * hidden),
        unit,
        unit,
        layers.xavier(next(keys), 2 * hidden, 2 * hidden),
        norm,
    )
    return Block(attention, *mlps, layers.zeros(6 * hidden, hidden), layers.zeros(6 * hidden, hidden))


def init_head(key: Array, num_genes: int, hidden: int) -> Head:
    """Xavier output map, zero modulation."""
    return Head(layers.xavier(key, num_genes, hidden), layers.zeros(2 * hidden, hidden))
