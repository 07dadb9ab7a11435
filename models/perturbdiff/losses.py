"""Discrepancies between two cell sets: index-paired squared error and the energy distance between point clouds.

    E(x, y) = mean_ij d(x_i, y_j) - 1/2 mean_ij d(x_i, x_j) - 1/2 mean_ij d(y_i, y_j)
    d(a, b) = sqrt(max(|a - b|^2, 1e-8))

This is half the energy distance of Szekely & Rizzo (2013) and the V-statistic: pairs of a cell with itself count, so
two samples of one law of m cells differ by about (mean distance) / m and not by zero.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

_SQUARED_FLOOR = 1e-8  # published; below it a distance is 1e-4 and has no gradient


def squared_error(x: Array, y: Array) -> Array:
    """Mean over cells and genes of the squared difference of index-paired cells; (B, S, G) twice -> (B,)."""
    return jnp.square(x - y).mean((-2, -1))


@partial(jax.jit, static_argnames="block_size")
def energy_loss(x: Array, y: Array, *, block_size: int = 512) -> Array:
    """Half the energy distance of each set of `x` to the same set of `y`, as published.

    Squared distances are expanded around the common centre of the two sets, which leaves float32 the digits that
    the cells' common level would take, and a cell is at the floor distance of itself whatever rounding says.

    Args:
        x: (B, N, G) cells of B sets.
        y: (B, M, G) cells of B sets.
        block_size: rows of the distance matrix held at a time, forward and backward.

    Returns:
        (B,) energies in the units of the cells, differentiable in both arguments.

    Raises:
        ValueError: if the sets cannot be paired or compared.
    """
    if x.ndim != 3 or y.ndim != 3 or x.shape[0] != y.shape[0] or x.shape[2] != y.shape[2]:
        raise ValueError(f"energy_loss compares (B, N, G) with (B, M, G); given {x.shape} and {y.shape}")
    return jax.vmap(partial(_energy, block_size=block_size))(x, y)


def _energy(x: Array, y: Array, block_size: int) -> Array:
    """Unbatched energy, (N, G) and (M, G) -> scalar."""
    centre = jax.lax.stop_gradient(0.5 * (x.mean(0) + y.mean(0)))  # distances do not depend on it
    x, y = x - centre, y - centre
    within_x = _sum_distances(x, x, block_size, same=True) / len(x) ** 2
    within_y = _sum_distances(y, y, block_size, same=True) / len(y) ** 2
    between = _sum_distances(x, y, block_size, same=False) / (len(x) * len(y))
    return between - 0.5 * (within_x + within_y)


def _sum_distances(x: Array, y: Array, block_size: int, *, same: bool) -> Array:
    """Sum of all N M distances, one block of rows of the distance matrix at a time."""
    num_rows = len(x)
    block_size = min(block_size, num_rows)
    num_blocks = -(-num_rows // block_size)
    rows = jnp.pad(x, ((0, num_blocks * block_size - num_rows), (0, 0)))
    index = jnp.arange(num_blocks * block_size)
    square_y = jnp.square(y).sum(-1)

    @jax.checkpoint  # the backward pass recomputes a block, so memory stays block_size x M
    def block(rows: Array, index: Array) -> Array:
        square = jnp.square(rows).sum(-1)[:, None] - 2.0 * rows @ y.T + square_y
        if same:
            square = jnp.where(index[:, None] == jnp.arange(len(y)), 0.0, square)
        # The inner where keeps the square root's infinite slope at zero out of the gradient.
        above = square > _SQUARED_FLOOR
        distance = jnp.where(above, jnp.sqrt(jnp.where(above, square, 1.0)), _SQUARED_FLOOR**0.5)
        return jnp.where((index < num_rows)[:, None], distance, 0.0).sum()

    if num_blocks == 1:
        return block(rows, index)
    blocks = rows.reshape(num_blocks, block_size, -1), index.reshape(num_blocks, block_size)
    return jax.lax.map(lambda args: block(*args), blocks).sum()
