"""The variational family of `inference.guides` in Pyro: the same blocks, parameter names and scales."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, Normal
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import biject_to, constraints

from hilbertcell.inference.guides import INITIAL_SD, Site, block_layout

CONSTRAINTS = {
    "shared_tril": constraints.lower_cholesky,
    "feature_tril": constraints.lower_cholesky,
    "feature_sd": constraints.positive,
}


def latent_sites(program: Callable, *args: Any) -> dict[str, Any]:
    """The latent sites of `program(*args)` by name, at values drawn from their prior; no draw of the caller moves."""
    with torch.random.fork_rng():
        nodes = poutine.trace(program).get_trace(*args).nodes
    return {
        name: node
        for name, node in nodes.items()
        if node["type"] == "sample" and not node["is_observed"] and not site_is_subsample(node)
    }


class BlockGuide:
    """Gaussian guide over the unconstrained sites of a Pyro program with a plate named `feature`.

    Equal to `inference.guides.BlockGuide` of the NumPyro program: with the same noise, values and densities are the
    same functions of the same parameters.
    """

    def __init__(
        self, program: Callable, *args: Any, initial: dict[str, np.ndarray], initial_sd: dict[str, np.ndarray]
    ) -> None:
        """Run `program(*args)` once for its latent sites; `args` are tensors, whose device the guide takes.

        `initial` gives a constrained starting value for every site, `initial_sd` the starting spread of every
        feature site; both may hold more.
        """
        sites, start = [], {}
        for name, node in latent_sites(program, *args).items():
            local = any(frame.name == "feature" for frame in node["cond_indep_stack"])
            transform = biject_to(node["fn"].support)
            start[name] = transform.inv(torch.as_tensor(initial[name]).to(node["value"]))
            sites.append((Site(name, tuple(start[name].shape[int(local) :]), transform), local))
        number = next(len(start[site.name]) for site, local in sites if local)
        self.layout = block_layout(sites, number)
        self._start_shared = torch.cat([start[site.name].reshape(-1) for site in self.layout.shared])
        columns = [start[site.name].reshape(number, -1) for site in self.layout.feature]
        self._start_feature = torch.cat(columns, 1)
        spread = [np.reshape(initial_sd[site.name], (number, -1)) for site in self.layout.feature]
        self._start_sd = torch.as_tensor(np.concatenate(spread, 1)).to(self._start_feature)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the program, and return them by name; the signature is the program's."""
        layout = self.layout
        param = {
            name: pyro.param(
                name, self._start_shared.new_tensor(value), CONSTRAINTS.get(name, constraints.real)
            )
            for name, value in layout.initial_params().items()
        }
        narrow, moved = layout.num_narrow, param["feature_loc"]
        # As in NumPyro: x = start + sd (loc + L noise) has density N(noise; 0, I) / det.
        standard = Normal(torch.zeros_like(param["shared_loc"]), 1.0).to_event(1)
        noise = pyro.sample("_shared", standard, infer={"is_auxiliary": True})
        volume = param["shared_tril"].diagonal().log().sum() + layout.num_shared * np.log(INITIAL_SD)
        if layout.coupled:
            follow = param["feature_common"] @ noise
            moved = torch.cat([moved[:, :narrow] + follow, moved[:, narrow:]], 1)
        shared = self._start_shared + INITIAL_SD * (param["shared_loc"] + param["shared_tril"] @ noise)
        drawn = _emit(layout.shared, shared[None], volume, plated=False)
        with pyro.plate("feature", layout.num_features):
            standard = Normal(torch.zeros_like(moved), 1.0).to_event(1)
            noise = pyro.sample("_feature", standard, infer={"is_auxiliary": True})
            block = torch.einsum("dij,dj->di", param["feature_tril"], noise[:, :narrow])
            moved = moved + torch.cat([block, param["feature_sd"] * noise[:, narrow:]], 1)
            volume = param["feature_tril"].diagonal(dim1=1, dim2=2).log().sum(1)
            volume = volume + param["feature_sd"].log().sum(1) + self._start_sd.log().sum(1)
            moved = self._start_feature + self._start_sd * moved
            return drawn | _emit(layout.feature, moved, volume, plated=True)


def _emit(sites: tuple[Site, ...], block: Tensor, volume: Tensor, *, plated: bool) -> dict[str, Tensor]:
    """Split unconstrained columns of `block` (rows, width) into sites; the Delta sites carry the Jacobians."""
    offset, drawn = 0, {}
    for site in sites:
        flat = block[:, offset : offset + site.size]
        offset += site.size
        unconstrained = flat.reshape((len(flat), *site.shape) if plated else site.shape)
        value = site.transform(unconstrained)
        jacobian = site.transform.log_abs_det_jacobian(unconstrained, value)
        density = -(jacobian.reshape(len(flat), -1).sum(1) if plated else jacobian.sum()) - volume
        volume = torch.zeros_like(volume)
        law = Delta(value, density, event_dim=value.dim() - int(plated))
        drawn[site.name] = pyro.sample(site.name, law)
    return drawn
