"""A structured variational family: a full-covariance block per feature, one more for what features share.

Features are conditionally independent given the shared scales and the microenvironment, which the program
integrates out; so correlations are kept where the posterior has them: within a feature (effects, slopes, loadings and
scales) and, where features are so few that they hardly determine what they share, between a feature and that. Wide
sites of large screens (many conditions) keep the diagonal only.
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
# More numbers than these that couple features to what they share are learned too slowly: with 58,000 (72 features)
# the ELBO was no better after 8,000 steps and much worse after 1,000.
_MAX_COUPLINGS = 10_000
_INITIAL_SD = 0.1


class _Site(NamedTuple):
    name: str
    shape: tuple[int, ...]  # unconstrained, without the feature axis
    transform: Any


class BlockGuide:
    """Gaussian guide over the unconstrained sites of a program with a plate named `feature`.

    Unknowns are measured from their starting values in units of their starting sds, so that one step size suits
    all of them. Variational parameters: `shared_loc` (H,), `shared_tril` (H, H); `feature_loc` (D, w), `feature_tril` (D, n, n)
    over the narrow sites, `feature_sd` (D, w - n) over the wide ones, with w the unknowns per feature;
    `feature_common` (D, n, H), in small tables, says how features follow the noise of the shared unknowns.
    """

    def __init__(
        self, program: Callable, *args: Any, initial: dict[str, np.ndarray], initial_sd: dict[str, np.ndarray]
    ) -> None:
        """Trace `program(*args)` for its latent sites.

        `initial` gives a constrained starting value for every site, `initial_sd` the starting spread of every
        feature site; both may hold more. The spread of shared sites is 0.1.
        """
        sites: dict[str, tuple[Any, bool]] = {}

        def collect() -> None:
            trace = handlers.trace(handlers.seed(program, 0)).get_trace(*args)
            for name, site in trace.items():
                if site["type"] == "sample" and not site["is_observed"]:
                    local = any(frame.name == "feature" for frame in site["cond_indep_stack"])
                    sites[name] = biject_to(site["fn"].support), local

        jax.eval_shape(collect)  # abstractly: nothing is compiled only to learn the names
        self._shared: list[_Site] = []
        self._feature: list[_Site] = []
        start: dict[str, Array] = {}
        for name, (transform, local) in sites.items():
            start[name] = transform.inv(jnp.asarray(initial[name], float))
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
        self._start_sd = jnp.concatenate(
            [jnp.asarray(initial_sd[site.name]).reshape(num_features, -1) for site in self._feature], axis=1
        )
        self._coupled = num_features * self._num_narrow * len(self._start_shared) <= _MAX_COUPLINGS

    def initial_params(self) -> dict[str, Array]:
        """Starting values of the variational parameters."""
        narrow = self._num_narrow
        num_features, width = self._start_feature.shape
        params = {
            "shared_loc": jnp.zeros_like(self._start_shared),
            "shared_tril": jnp.eye(len(self._start_shared)),
            "feature_loc": jnp.zeros_like(self._start_feature),
            "feature_tril": jnp.tile(jnp.eye(narrow), (num_features, 1, 1)),
            "feature_sd": jnp.ones((num_features, width - narrow)),
        }
        if self._coupled:
            params["feature_common"] = jnp.zeros((num_features, narrow, len(self._start_shared)))
        return params

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
        # x = start + sd (loc + L noise) has density N(noise; 0, I) / det: no triangular system is ever solved.
        noise = _standard_normal("_shared", shared_loc.shape, plated=False)
        volume = jnp.log(jnp.diagonal(shared_tril)).sum() + len(shared_loc) * np.log(_INITIAL_SD)
        if self._coupled:
            feature_loc = feature_loc.at[:, :narrow].add(
                numpyro.param("feature_common", start["feature_common"]) @ noise
            )
        shared = self._start_shared + _INITIAL_SD * (shared_loc + shared_tril @ noise)
        _emit(self._shared, shared[None], volume, plated=False)
        with numpyro.plate("feature", num_features):
            noise = _standard_normal("_feature", (num_features, width), plated=True)
            block = jnp.einsum("dij,dj->di", feature_tril, noise[:, :narrow])
            moved = feature_loc + jnp.concatenate([block, feature_sd * noise[:, narrow:]], axis=1)
            volume = jnp.log(jnp.diagonal(feature_tril, axis1=1, axis2=2)).sum(1) + jnp.log(feature_sd).sum(1)
            volume = volume + jnp.log(self._start_sd).sum(1)
            _emit(self._feature, self._start_feature + self._start_sd * moved, volume, plated=True)

    def sample(self, key: Array, params: dict[str, Array]) -> dict[str, Array]:
        """One draw of the program's latent sites from the fitted family."""
        trace = handlers.trace(handlers.seed(handlers.substitute(self, data=params), key)).get_trace()
        return {site.name: trace[site.name]["value"] for site in (*self._shared, *self._feature)}


def _standard_normal(name: str, shape: tuple[int, ...], *, plated: bool) -> Array:
    law = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape) - int(plated))
    return numpyro.sample(name, law, infer={"is_auxiliary": True})


def _emit(sites: list[_Site], block: Array, volume: Array, *, plated: bool) -> None:
    """Split unconstrained columns of `block` (rows, width) into sites; the Delta sites carry the Jacobians.

    `volume` is log det of the map from noise to `block`; the first site takes it.
    """
    offset = 0
    for site in sites:
        width = int(np.prod(site.shape))
        flat = block[:, offset : offset + width]
        offset += width
        unconstrained = flat.reshape((flat.shape[0], *site.shape) if plated else site.shape)
        value = site.transform(unconstrained)
        jacobian = site.transform.log_abs_det_jacobian(unconstrained, value)
        density = -(jacobian.reshape(flat.shape[0], -1).sum(1) if plated else jacobian.sum()) - volume
        volume = jnp.zeros_like(volume)
        numpyro.sample(site.name, dist.Delta(value, density, event_dim=value.ndim - int(plated)))
