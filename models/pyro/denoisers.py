"""Denoisers in torch: the program's own and the residual network of `hilbertcell.models.denoisers`.

Equations, names and constants are those of that module, written a second time without JAX;
`tests/models/pyro/test_denoisers.py` holds the two together. Only the batching differs: functions here take leading axes.
Points `v` are (..., D), levels `sigma` (...), and they broadcast against the leading axes of a condition. No branch
depends on a value, so that `torch.compile(..., fullgraph=True)` takes everything.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

Denoiser = Callable[[Tensor, Tensor, "Condition"], Tensor]  # (v (..., D), sigma (...), condition) -> (..., D)


class Condition(NamedTuple):
    """What is given when a population is drawn, in signal-ordered coordinates."""

    mean: Tensor  # (..., D) the program's mean of v given its draws
    vectors: Tensor  # (..., D, D) columns are the eigenvectors of S
    values: Tensor  # (..., D) its eigenvalues, >= 0
    features: Tensor  # (..., F) everything a network sees

    def to(self, *args: Any) -> "Condition":
        """All four on another device, or in another type, as `Tensor.to`."""
        return Condition(*(leaf.to(*args) for leaf in self))


def gaussian_denoiser(v: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """G: exact posterior mean (..., D) of `v_0 ~ N(mean, S)` given `v = v_0 + sigma eps`."""
    rotated = times(condition.vectors.mT, v - condition.mean)
    return condition.mean + times(condition.vectors, shrinkage(condition.values, sigma) * rotated)


def times(matrices: Tensor, points: Tensor) -> Tensor:
    """Matrices (..., D, D) times points (..., D); a matrix that many points share is not copied for each."""
    return torch.einsum("...ij,...j->...i", matrices, points)


def ratio(numerator: Tensor, denominator: Tensor, otherwise: float = 0.0) -> Tensor:
    """numerator / denominator, `otherwise` where the denominator is not positive."""
    positive = denominator > 0
    return torch.where(positive, numerator / torch.where(positive, denominator, 1.0), otherwise)


def root(values: Tensor) -> Tensor:
    """Square root with gradient 0 at 0, where autograd would give infinity and then NaN."""
    positive = values > 0
    return torch.where(positive, torch.sqrt(torch.where(positive, values, 1.0)), 0.0)


def shrinkage(values: Tensor, sigma: Tensor) -> Tensor:
    """`S / (S + sigma^2)` per eigenvector (..., D); 1 without noise, where S is zero too."""
    return ratio(values, values + sigma[..., None] ** 2, 1.0)


def posterior_sd(values: Tensor, sigma: Tensor) -> Tensor:
    """`(S sigma^2 / (S + sigma^2))^(1/2)` per eigenvector (..., D), the unit of F."""
    return sigma[..., None] * root(shrinkage(values, sigma))


def angle(values: Tensor, sigma: Tensor) -> Tensor:
    """`theta = arctan(sigma / sqrt(S))` per eigenvector (..., D); pi / 2 where S = 0 < sigma."""
    return torch.atan2(sigma[..., None], root(values))


def whiten(v: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """z (..., D) by eigenvector: standard normal under the program at any level; 0 where a coordinate cannot vary."""
    rotated = times(condition.vectors.mT, v - condition.mean)
    return ratio(rotated, root(condition.values + sigma[..., None] ** 2))


def colour(z: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """The inverse of `whiten`: v (..., D)."""
    return condition.mean + times(condition.vectors, root(condition.values + sigma[..., None] ** 2) * z)


def residual(estimate: Tensor, v: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
    """F by eigenvector (..., D), from the estimate `D(v, sigma, condition)` (..., D) of any denoiser."""
    difference = estimate - gaussian_denoiser(v, sigma, condition)
    return ratio(times(condition.vectors.mT, difference), posterior_sd(condition.values, sigma))


_NORM_EPS = 1e-6
_FREQUENCIES = 8


def _zeros(num_in: int, num_out: int) -> nn.Linear:
    layer = nn.Linear(num_in, num_out)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _norm(h: Tensor) -> Tensor:
    return functional.layer_norm(h, h.shape[-1:], eps=_NORM_EPS)


class ResidualBlock(nn.Module):
    """`h + W2 silu(W1 norm(h))`, the normalised points scaled and shifted by the condition; starts as the identity."""

    def __init__(self, width: int) -> None:
        """For points of `width` numbers."""
        super().__init__()
        self.modulation = _zeros(width, 2 * width)
        self.inner = nn.Linear(width, width)
        self.outer = nn.Linear(width, width)

    def forward(self, h: Tensor, context: Tensor) -> Tensor:
        """Map `h` (..., width) given `context` (..., width)."""
        shift, scale = self.modulation(context).chunk(2, -1)
        return h + self.outer(functional.silu(self.inner(_norm(h) * (1.0 + scale) + shift)))


class ResidualNetwork(nn.Module):
    """F: a residual network of a whitened point, its level and the condition's features; zero at the start."""

    octaves: Tensor

    def __init__(self, num_coordinates: int, num_features: int, width: int, depth: int) -> None:
        """For points (..., D) and features (..., F), with `depth` blocks of `width` numbers."""
        super().__init__()
        self.entry = nn.Linear(num_coordinates, width)
        levels = 1 + 2 * _FREQUENCIES
        self.context = nn.ModuleList([nn.Linear(levels + num_features, width), nn.Linear(width, width)])
        self.blocks = nn.ModuleList([ResidualBlock(width) for _ in range(depth)])
        self.exit = _zeros(width, num_coordinates)
        # A buffer follows `.to`; it is a constant, not a weight, and stays out of the state_dict.
        octaves = torch.tensor([2.0 ** (k - 3) for k in range(_FREQUENCIES)])
        self.register_buffer("octaves", octaves, persistent=False)

    def forward(self, whitened: Tensor, relative_level: Tensor, features: Tensor) -> Tensor:
        """F (..., D) in coordinates at `whitened` (..., D) and `relative_level` = log(sigma / s) (...)."""
        leading = torch.broadcast_shapes(relative_level.shape, features.shape[:-1])
        level = relative_level.expand(leading)[..., None]
        angles = level * self.octaves * (math.pi / 8)
        embedding = [level / 4, torch.sin(angles), torch.cos(angles), features.expand(*leading, -1)]
        context = torch.cat(embedding, -1)
        for layer in self.context:
            context = functional.silu(layer(context))
        h = self.entry(whitened) + context
        for block in self.blocks:
            h = block(h, context)
        return self.exit(_norm(h))


class ResidualDenoiser(nn.Module):
    """`D = G + (S sigma^2 / (S + sigma^2))^(1/2) F` with a network for F; the program's own denoiser below `sigma_min`.

    A network for fewer coordinates than v has is one for the leading ones; in the others F is zero.
    Names of the `state_dict` are the paths of the JAX tree, which are those of a fit's file after `diffusion.denoiser.`;
    `hilbertcell.inference.pyro.checkpoints.load_denoiser` reads one.
    """

    sigma_min: Tensor

    def __init__(self, network: ResidualNetwork, sigma_min: Tensor) -> None:
        """`sigma_min` () is the smallest level of any training population."""
        super().__init__()
        self.network = network
        self.register_buffer("sigma_min", sigma_min)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> Self:
        """The denoiser whose `state_dict` is `state`; sizes and type are read off it.

        Raises:
            KeyError, RuntimeError: the names or shapes are not those of a denoiser.
        """
        width, num_coordinates = state["network.entry.weight"].shape
        num_features = state["network.context.0.weight"].shape[1] - (1 + 2 * _FREQUENCIES)
        depth = len({name.split(".")[2] for name in state if name.startswith("network.blocks.")})
        network = ResidualNetwork(num_coordinates, num_features, width, depth)
        denoiser = cls(network, torch.zeros(())).to(state["network.exit.weight"].dtype)
        denoiser.load_state_dict(dict(state))
        return denoiser

    def forward(self, v: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """D (..., D) in the type of `v`; the network itself runs in the type of its weights."""
        sigma = sigma.to(v.dtype)
        # The tiny floor keeps log finite at sigma = 0 and for a law without variance, where F is not used.
        floor = torch.finfo(torch.float32).tiny
        width = root(condition.values.mean(-1))
        relative = torch.log(sigma.clamp(min=floor)) - torch.log(width.clamp(min=floor))
        seen, dtype = self.network.entry.in_features, self.network.exit.weight.dtype
        whitened = times(condition.vectors, whiten(v, sigma, condition))[..., :seen]
        f = self.network(whitened.to(dtype), relative.to(dtype), condition.features.to(dtype)).to(v.dtype)
        f = functional.pad(f, (0, v.shape[-1] - seen))
        gain = self.gate(sigma)[..., None] * posterior_sd(condition.values, sigma)
        added = times(condition.vectors, gain * times(condition.vectors.mT, f))
        return gaussian_denoiser(v, sigma, condition) + added

    def gate(self, sigma: Tensor) -> Tensor:
        """0 up to `sigma_min`, 1 from twice `sigma_min` on (...)."""
        sigma_min = self.sigma_min.to(sigma.dtype)
        position = torch.log2(torch.maximum(sigma, sigma_min) / sigma_min).clamp(0.0, 1.0)
        return position**2 * (3.0 - 2.0 * position)
