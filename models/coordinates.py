"""The hidden-factor program seen in signal-ordered coordinates, one batch, given draws of its unknowns.

With `v = A^T (m - mean)` (`models.embedding.Coordinates`) and the draws of globals and batch latents held fixed, the
program says `v ~ N(v_bar, s^2 S_c)`, `S_c = A^T diag(response_scale_c^2) A`, s the strength of the condition: nothing that
the draws already hold is counted in S. Where another law of `v` takes the place of this one, what the coordinates leave
out, `w = (I - C A A^T)(m - mean)`, still comes from the program, given `v`:

    m | v  =  m' + R A S_c^-1 (v - A^T (m' - mean)),      m' ~ program,  R = diag(response_scale_c^2)            (1)

(Matheron's rule: exact for Gaussian laws, and free of the strength).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from hilbertcell.models.denoisers import Condition
from hilbertcell.models.embedding import Coordinates
from hilbertcell.models.microenvironment import Globals, Latents, response_mean


class CoordinateMap(NamedTuple):
    """From standardised features m (D,) to coordinates: `m @ directions + origin`."""

    directions: Array  # (D, Q)
    origin: Array  # (Q,)

    def __call__(self, m: Array) -> Array:
        """Coordinates (..., Q) of standardised embeddings (..., D)."""
        return m @ self.directions + self.origin


class ResidualBasis(NamedTuple):
    """Eigen-decomposition of `S_c` of every context, for one draw of the globals."""

    vectors: Array  # (C, Q, Q)
    values: Array  # (C, Q)


def coordinate_map(coordinates: Coordinates, center: np.ndarray, scale: np.ndarray) -> CoordinateMap:
    """The map for features standardised as (phi - center) / scale, each (D,)."""
    return CoordinateMap(
        jnp.asarray(scale[:, None] * coordinates.A), jnp.asarray((center - coordinates.mean) @ coordinates.A)
    )


def residual_basis(globals_: Globals, mapping: CoordinateMap) -> ResidualBasis:
    """Eigenvectors and -values of `A^T diag(response_scale_c^2) A` for the C contexts."""
    scaled = globals_.response_scale[..., None] * mapping.directions
    values, vectors = jnp.linalg.eigh(jnp.einsum("cdq,cdr->cqr", scaled, scaled))
    return ResidualBasis(vectors, jnp.maximum(values, 0.0))


def given_draws(
    globals_: Globals,
    basis: ResidualBasis,
    mapping: CoordinateMap,
    latents: Latents,
    condition: Array,
    context: Array,
    features: Array,
) -> Condition:
    """What a denoiser needs of T targets: leading axis T, `features` (T, F) passed on."""
    strength = globals_.strength[condition][:, None]
    return Condition(
        mapping(response_mean(globals_, latents, condition, context)),
        basis.vectors[context],
        strength**2 * basis.values[context],
        features,
    )


def complete(
    m: Array, v: Array, globals_: Globals, basis: ResidualBasis, mapping: CoordinateMap, context: Array
) -> Array:
    """Equation (1): embeddings (T, D) with coordinates v (T, Q), from draws m (T, D) of the program."""
    vectors, values = basis.vectors[context], basis.values[context]
    rotated = jnp.einsum("tqr,tq->tr", vectors, v - mapping(m)) / values
    solved = jnp.einsum("tqr,tr->tq", vectors, rotated)
    return m + globals_.response_scale[context] ** 2 * (solved @ mapping.directions.T)
