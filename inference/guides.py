"""A structured variational family: a full-covariance block per feature, one more for what features share.

Features are conditionally independent given the shared scales and the microenvironment, which the program
integrates out; so correlations are kept where the posterior has them: within a feature (effects, slopes, loadings and
scales) and, where features are so few that they hardly determine what they share, between a feature and that. Wide
sites of large screens (many conditions) keep the diagonal only.
"""

from collections.abc import Callable, Iterable
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
INITIAL_SD = 0.1  # of shared sites


class Site(NamedTuple):
    """A latent site of a program."""

    name: str
    shape: tuple[int, ...]  # unconstrained, without the feature axis
    transform: Any  # from unconstrained values

    @property
    def size(self) -> int:
        """Number of unknowns, of one feature where it has them per feature."""
        return int(np.prod(self.shape))


class Layout(NamedTuple):
    """Where the sites of a program lie in the blocks of its guide; H, D, w, n as in `BlockGuide`."""

    shared: tuple[Site, ...]
    feature: tuple[Site, ...]  # the narrow ones first
    num_features: int  # D
    num_narrow: int  # n
    coupled: bool  # features follow the noise of what they share

    @property
    def num_shared(self) -> int:
        """H."""
        return sum(site.size for site in self.shared)

    @property
    def width(self) -> int:
        """Unknowns per feature, w."""
        return sum(site.size for site in self.feature)

    def initial_params(self) -> dict[str, np.ndarray]:
        """Starting values of the variational parameters."""
        narrow, number = self.num_narrow, self.num_features
        params = {
            "shared_loc": np.zeros(self.num_shared),
            "shared_tril": np.eye(self.num_shared),
            "feature_loc": np.zeros((number, self.width)),
            "feature_tril": np.tile(np.eye(narrow), (number, 1, 1)),
            "feature_sd": np.ones((number, self.width - narrow)),
        }
        if self.coupled:
            params["feature_common"] = np.zeros((number, narrow, self.num_shared))
        return params


def block_layout(sites: Iterable[tuple[Site, bool]], num_features: int) -> Layout:
    """Lay out sites; each comes with whether it lies in the plate `feature`."""
    shared, feature = (tuple(site for site, local in sites if local == kind) for kind in (False, True))
    feature = tuple(sorted(feature, key=lambda site: site.size))
    widths = np.cumsum([site.size for site in feature])
    num_narrow = int(widths[widths <= _MAX_BLOCK].max())
    num_shared = sum(site.size for site in shared)
    coupled = num_features * num_narrow * num_shared <= _MAX_COUPLINGS
    return Layout(shared, feature, num_features, num_narrow, coupled)


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
        start = {
            name: transform.inv(jnp.asarray(initial[name], float)) for name, (transform, _) in sites.items()
        }
        num_features = next(len(start[name]) for name, (_, local) in sites.items() if local)
        self._layout = layout = block_layout(
            [
                (Site(name, start[name].shape[int(local) :], transform), local)
                for name, (transform, local) in sites.items()
            ],
            num_features,
        )
        self._start_shared = jnp.concatenate([start[site.name].ravel() for site in layout.shared])
        columns = lambda values: jnp.concatenate(
            [jnp.asarray(values[site.name]).reshape(num_features, -1) for site in layout.feature], axis=1
        )
        self._start_feature, self._start_sd = columns(start), columns(initial_sd)

    def initial_params(self) -> dict[str, Array]:
        """Starting values of the variational parameters."""
        return {name: jnp.asarray(value) for name, value in self._layout.initial_params().items()}

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Sample every latent site of the program; the signature is the program's."""
        layout, start = self._layout, self.initial_params()
        tril = dist.constraints.lower_cholesky
        shared_loc = numpyro.param("shared_loc", start["shared_loc"])
        shared_tril = numpyro.param("shared_tril", start["shared_tril"], constraint=tril)
        feature_loc = numpyro.param("feature_loc", start["feature_loc"])
        feature_tril = numpyro.param("feature_tril", start["feature_tril"], constraint=tril)
        feature_sd = numpyro.param("feature_sd", start["feature_sd"], constraint=dist.constraints.positive)
        narrow, (num_features, width) = layout.num_narrow, feature_loc.shape
        # x = start + sd (loc + L noise) has density N(noise; 0, I) / det: no triangular system is ever solved.
        noise = _standard_normal("_shared", shared_loc.shape, plated=False)
        volume = jnp.log(jnp.diagonal(shared_tril)).sum() + len(shared_loc) * np.log(INITIAL_SD)
        if layout.coupled:
            feature_loc = feature_loc.at[:, :narrow].add(
                numpyro.param("feature_common", start["feature_common"]) @ noise
            )
        shared = self._start_shared + INITIAL_SD * (shared_loc + shared_tril @ noise)
        _emit(layout.shared, shared[None], volume, plated=False)
        with numpyro.plate("feature", num_features):
            noise = _standard_normal("_feature", (num_features, width), plated=True)
            block = jnp.einsum("dij,dj->di", feature_tril, noise[:, :narrow])
            moved = feature_loc + jnp.concatenate([block, feature_sd * noise[:, narrow:]], axis=1)
            volume = jnp.log(jnp.diagonal(feature_tril, axis1=1, axis2=2)).sum(1) + jnp.log(feature_sd).sum(1)
            volume = volume + jnp.log(self._start_sd).sum(1)
            _emit(layout.feature, self._start_feature + self._start_sd * moved, volume, plated=True)

    def sample(self, key: Array, params: dict[str, Array]) -> dict[str, Array]:
        """One draw of the program's latent sites from the fitted family."""
        trace = handlers.trace(handlers.seed(handlers.substitute(self, data=params), key)).get_trace()
        return {
            site.name: trace[site.name]["value"] for site in (*self._layout.shared, *self._layout.feature)
        }


def _standard_normal(name: str, shape: tuple[int, ...], *, plated: bool) -> Array:
    law = dist.Normal(jnp.zeros(shape), 1.0).to_event(len(shape) - int(plated))
    return numpyro.sample(name, law, infer={"is_auxiliary": True})


def _emit(sites: tuple[Site, ...], block: Array, volume: Array, *, plated: bool) -> None:
    """Split unconstrained columns of `block` (rows, width) into sites; the Delta sites carry the Jacobians.

    `volume` is log det of the map from noise to `block`; the first site takes it.
    """
    offset = 0
    for site in sites:
        flat = block[:, offset : offset + site.size]
        offset += site.size
        unconstrained = flat.reshape((flat.shape[0], *site.shape) if plated else site.shape)
        value = site.transform(unconstrained)
        jacobian = site.transform.log_abs_det_jacobian(unconstrained, value)
        density = -(jacobian.reshape(flat.shape[0], -1).sum(1) if plated else jacobian.sum()) - volume
        volume = jnp.zeros_like(volume)
        numpyro.sample(site.name, dist.Delta(value, density, event_dim=value.ndim - int(plated)))
