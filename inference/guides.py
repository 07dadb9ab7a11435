"""A structured variational family: a full-covariance block per feature, one more for what features share.

Features are conditionally independent given the shared scales and the microenvironment, which the program
integrates out; so correlations are kept where the posterior has them (effects, slopes, loadings and scales of one
feature) and dropped between features. Wide sites of large screens (many conditions) keep the diagonal only.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array
from numpyro import handlers
from numpyro.distributions import biject_to

# A block of 64 unknowns costs 64^2 numbers per feature: 2,000 features stay below 70 MB in float64.
_MAX_BLOCK = 64
_INITIAL_SD = 0.1


class _Site(NamedTuple):
    name: str
    shape: tuple[int, ...]  # unconstrained, without the feature axis
    transform: Any


class BlockGuide:
    """Gaussian guide over the unconstrained sites of a program with a plate named `feature`.

    Variational parameters: `shared_loc` (H,), `shared_tril` (H, H); `feature_loc` (D, w), `feature_tril` (D, n, n)
    over the narrow sites, `feature_sd` (D, w - n) over the wide ones, with w the unknowns per feature.
    """

    def __init__(self, program: Callable, *args: Any, initial: dict[str, np.ndarray] | None = None) -> None:
        """Trace `program(*args)` for its latent sites; `initial` gives constrained starting values by site."""
        trace = handlers.trace(handlers.seed(program, 0)).get_trace(*args)
        self._shared: list[_Site] = []
        self._feature: list[_Site] = []
        start: dict[str, Array] = {}
        for name, site in trace.items():
            if site["type"] != "sample" or site["is_observed"]:
                continue
            local = any(frame.name == "feature" for frame in site["cond_indep_stack"])
            transform = biject_to(site["fn"].support)
            value = jnp.asarray((initial or {}).get(name, site["value"]))
            start[name] = transform.inv(value)
            shape = start[name].shape[int(local) :]
            (self._feature if local else self._shared).append(_Site(name, shape, transform))
        self._feature.sort(key=lambda site: int(np.prod(site.shape)))
        widths = np.cumsum([int(np.prod(site.shape)) for site in self._feature])
        self._num_narrow = int(widths[widths <= _MAX_BLOCK].max())
        num_features = start[self._feature[0].name].shape[0]
        self._start_shared = jnp.concatenate([start[site.name].ravel() for site in self._shared])
        self._start_feature = jnp.concatenate(
            [start[site.name].reshape(num_features, -1) for site in self._feature], axis=1
        )

    def initial_params(self) -> dict[str, Array]:
        """Starting values of the variational parameters."""
        num_features, width = self._start_feature.shape
        narrow = self._num_narrow
        return {
            "shared_loc": self._start_shared,
            "shared_tril": _INITIAL_SD * jnp.eye(len(self._start_shared)),
            "feature_loc": self._start_feature,
            "feature_tril": jnp.tile(_INITIAL_SD * jnp.eye(narrow), (num_features, 1, 1)),
            "feature_sd": jnp.full((num_features, width - narrow), _INITIAL_SD),
        }

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Sample every latent site of the program; the signature is the program's."""
        start = self.initial_params()
        tril = dist.constraints.lower_cholesky
        shared_loc = numpyro.param("shared_loc", start["shared_loc"])
        shared_tril = numpyro.param("shared_tril", start["shared_tril"], constraint=tril)
        feature_loc = numpyro.param("feature_loc", start["feature_loc"])
        feature_tril = numpyro.param("feature_tril", start["feature_tril"], constraint=tril)
        feature_sd = numpyro.param("feature_sd", start["feature_sd"], constraint=dist.constraints.positive)
        narrow, (num_features, width) = self._num_narrow, feature_loc.shape
        auxiliary = {"is_auxiliary": True}
        shared = numpyro.sample(
            "_shared", dist.MultivariateNormal(shared_loc, scale_tril=shared_tril), infer=auxiliary
        )
        _emit(self._shared, shared[None], plated=False)
        with numpyro.plate("feature", num_features):
            block = numpyro.sample(
                "_feature", dist.MultivariateNormal(feature_loc[:, :narrow], scale_tril=feature_tril), infer=auxiliary
            )
            if width > narrow:
                wide = numpyro.sample(
                    "_feature_wide", dist.Normal(feature_loc[:, narrow:], feature_sd).to_event(1), infer=auxiliary
                )
                block = jnp.concatenate([block, wide], axis=1)
            _emit(self._feature, block, plated=True)

    def sample(self, key: Array, params: dict[str, Array]) -> dict[str, Array]:
        """One draw of the program's latent sites from the fitted family."""
        trace = handlers.trace(handlers.seed(handlers.substitute(self, data=params), key)).get_trace()
        return {site.name: trace[site.name]["value"] for site in (*self._shared, *self._feature)}


def _emit(sites: list[_Site], block: Array, *, plated: bool) -> None:
    """Split unconstrained columns of `block` (rows, width) into sites; Delta sites carry the Jacobian."""
    offset = 0
    for site in sites:
        width = int(np.prod(site.shape))
        flat = block[:, offset : offset + width]
        offset += width
        unconstrained = flat.reshape((flat.shape[0], *site.shape) if plated else site.shape)
        value = site.transform(unconstrained)
        jacobian = site.transform.log_abs_det_jacobian(unconstrained, value)
        density = -(jacobian.reshape(flat.shape[0], -1).sum(1) if plated else jacobian.sum())
        numpyro.sample(site.name, dist.Delta(value, density, event_dim=value.ndim - int(plated)))
