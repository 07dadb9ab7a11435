"""Gradients of a fitted guide's ELBO, draw by draw, in units of the guide's own widths."""

from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpyro.infer import Trace_ELBO

from hilbertcell.models.hidden_factors import hidden_factor_program

if TYPE_CHECKING:
    from hilbertcell.inference.fit import Fit

NUM_DRAWS = 100


class GuideGradients(NamedTuple):
    """S draws of the guide, Q unknowns, float64."""

    log_ratio: np.ndarray  # (S,) log density of program and data minus log density of the guide
    score: np.ndarray  # (S, Q) gradient with respect to a shift of each unknown by one sd of the guide
    width: (
        np.ndarray
    )  # (S,) minus the mean over unknowns of white noise x score; its expectation is 1 at the optimum


def guide_gradients(fit: "Fit", seed: int, num_draws: int = NUM_DRAWS) -> GuideGradients:
    """Log ratios and gradients of draws of the guide of a variational fit.

    A shift of the unknowns that features share takes along what follows them (`feature_common`). By the chain rule the
    derivative with respect to the triangular matrices, contracted with them, is that with respect to all widths.
    """
    with jax.enable_x64(True):
        guide, args = fit.guide(), fit.program_args
        params = {name: jnp.asarray(value) for name, value in fit.params.items()}

        def loss(params: dict[str, Array], key: Array) -> Array:
            return Trace_ELBO().loss(key, params, hidden_factor_program, guide, *args)

        def one(key: Array) -> tuple[Array, Array, Array]:
            value, gradient = jax.value_and_grad(loss)(params, key)
            return -value, *_white(params, gradient)

        found = jax.jit(lambda keys: jax.lax.map(one, keys))(
            jax.random.split(jax.random.key(seed), num_draws)
        )
    return GuideGradients(*(np.asarray(values) for values in found))


def _white(params: dict[str, Array], gradient: dict[str, Any]) -> tuple[Array, Array]:
    """Scores (Q,) and the statistic of width of one draw, from the gradient of minus the ELBO."""
    tril, narrow = params["feature_tril"], params["feature_tril"].shape[1]
    of_feature = -gradient["feature_loc"]
    shared = -params["shared_tril"].T @ gradient["shared_loc"]
    spread = (params["shared_tril"] * gradient["shared_tril"]).sum() + (tril * gradient["feature_tril"]).sum()
    spread = spread + (params["feature_sd"] * gradient["feature_sd"]).sum()
    if "feature_common" in params:
        shared = shared + jnp.einsum("dnh,dn->h", params["feature_common"], of_feature[:, :narrow])
        spread = spread + (params["feature_common"] * gradient["feature_common"]).sum()
    block = jnp.einsum("dij,di->dj", tril, of_feature[:, :narrow])
    wide = params["feature_sd"] * of_feature[:, narrow:]
    score = jnp.concatenate([shared, block.ravel(), wide.ravel()])
    return score, 1.0 + spread / len(score)
