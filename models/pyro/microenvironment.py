"""The law of all populations of a batch in torch, latents integrated out: twin of `models.microenvironment`.

The generative process stands there; `Globals` and `Observations` are its named tuples, here of tensors in float64. All
batches are worked on at once. Per feature the exponent is a quadratic form in `(1, d, u)` once the control deviations
`x` are eliminated; then `d` goes, and the sum over features is a K x K system for `u`.
"""

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from hilbertcell.models.microenvironment import Globals, Latents, Observations


def slot_loading(globals_: Globals, condition: Tensor) -> Tensor:
    """Loadings (B, J, D, K) of the perturbed slots on the microenvironment, for unit strength: Lambda_j."""
    common: Tensor = globals_.response_loading
    if globals_.modulation is None:
        return common.expand(*condition.shape, *common.shape)
    return common + globals_.modulation.permute(1, 2, 0)[condition]


def response_mean(globals_: Globals, latents: Latents, layout: Observations) -> Tensor:
    """Means (B, J, D) of the latent perturbed means of all slots, given the latents of their batches (B, ...)."""
    strength = globals_.strength[layout.condition][..., None]
    alpha, control = globals_.alpha[layout.context], of_context(latents.control_mean, layout)
    loading = slot_loading(globals_, layout.condition)
    shared = latents.batch_effect[:, None] + torch.einsum("bjdk,bk->bjd", loading, latents.microenvironment)
    return (
        control + globals_.effect[layout.condition] + strength * (globals_.slope * (control - alpha) + shared)
    )


def of_context(values: Tensor, layout: Observations) -> Tensor:
    """Values (B, J, D) of the contexts of the perturbed slots; `values` (B, C, D)."""
    return torch.take_along_dim(values, layout.context[..., None], 1)


def log_density(globals_: Globals, batches: Observations) -> Tensor:
    """Collapsed log density (B,) of the observed means of batches."""
    g, num_contexts = globals_, globals_.alpha.shape[0]
    control_mask = batches.observed[:, :num_contexts, None].to(g.alpha.dtype)
    mask = batches.observed[:, num_contexts:, None].to(g.alpha.dtype)
    control_noise = batches.noise[:, :num_contexts]
    strength = g.strength[batches.condition][..., None]
    own = 1.0 + strength * g.slope
    variance = (strength * g.response_scale[batches.context]) ** 2 + batches.noise[:, num_contexts:]
    weight, control_weight, prior = mask / variance, control_mask / control_noise, g.baseline_scale**-2
    deviation = batches.mean[:, :num_contexts] - g.alpha
    residual = batches.mean[:, num_contexts:] - g.alpha[batches.context] - g.effect[batches.condition]

    # A slot misses by a . (1, d, u) - own x; x has the precision `precision` and the mean pull . (1, d, u) / precision.
    loading = strength[..., None] * slot_loading(g, batches.condition)
    shared = strength.expand_as(residual)[..., None]
    a = torch.cat([residual[..., None], -shared, -loading], -1)
    in_context = torch.nn.functional.one_hot(batches.context, num_contexts).to(a.dtype)
    precision = prior + control_weight + torch.einsum("bjc,bjd->bcd", in_context, weight * own**2)
    zero = torch.zeros_like(deviation)[..., None]
    tilt = (prior[..., None] * g.baseline_loading).expand(*deviation.shape, -1)
    direct = torch.cat([(control_weight * deviation)[..., None], zero, tilt], -1)
    pull = torch.einsum("bjc,bjd,bjdi->bcdi", in_context, weight * own, a) + direct
    form = torch.einsum("bjd,bjdi,bjdk->bdik", weight, a, a)
    form = form - torch.einsum("bcdi,bcdk->bdik", pull / precision[..., None], pull)

    # d in units of batch_scale, so that a scale of zero is legal.
    volume = 1.0 + form[..., 1, 1] * g.batch_scale**2
    gain, d_one, d_u = g.batch_scale**2 / volume, form[..., 1, 0], form[..., 1, 2:]
    prior_u = torch.einsum("cd,dk,dl->kl", prior, g.baseline_loading, g.baseline_loading)
    u_precision = torch.eye(len(prior_u), dtype=a.dtype, device=a.device) + prior_u
    u_precision = u_precision + form[..., 2:, 2:].sum(1) - torch.einsum("bd,bdk,bdl->bkl", gain, d_u, d_u)
    chol = torch.linalg.cholesky(u_precision)
    # The form at its minimum over (x, d, u), where it is flat: no gradient passes through where that is.
    with torch.no_grad():
        linear = ((gain * d_one)[..., None] * d_u - form[..., 0, 2:]).sum(1)
        u = torch.cholesky_solve(linear[..., None], chol)[..., 0]
        d_unit = -g.batch_scale * (d_one + torch.einsum("bdk,bk->bd", d_u, u)) / volume
        one = torch.ones_like(d_unit)[..., None]
        d = (g.batch_scale * d_unit)[..., None]
        point = torch.cat([one, d, u[:, None].expand(*d_unit.shape, -1)], -1)
        x = torch.einsum("bcdi,bdi->bcd", pull, point) / precision
    shared_part = strength * (g.batch_scale * d_unit)[:, None] + torch.einsum("bjdk,bk->bjd", loading, u)
    misfit = residual - shared_part - own * of_context(x, batches)
    baseline = (u @ g.baseline_loading.T)[:, None]
    square = (prior * (x - baseline) ** 2 + control_weight * (deviation - x) ** 2).sum((1, 2))
    square = square + (d_unit**2).sum(1) + (u**2).sum(1) + (weight * misfit**2).sum((1, 2))
    log_determinant = (
        (precision / prior).log().sum((1, 2))
        + volume.log().sum(1)
        + 2.0 * chol.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        + (mask * (variance * 2 * math.pi).log()).sum((1, 2))
        + (control_mask * (control_noise * 2 * math.pi).log()).sum((1, 2))
    )
    return -0.5 * (square + log_determinant)


class PopulationMeans(TorchDistribution):
    """The law of batches' observed population means, latents integrated out; event (C + J, D), batch (B,)."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch declares it so
    support = constraints.independent(constraints.real, 2)
    has_rsample = False  # nothing differentiates through simulated data

    def __init__(self, globals_: Globals, layout: Observations) -> None:
        """Law under `globals_` of the slots of `layout` (its noise, masks, indices; its means are not used)."""
        self.globals_, self.layout = globals_, layout
        super().__init__(layout.mean.shape[:1], layout.mean.shape[1:], validate_args=False)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None
    ) -> "PopulationMeans":
        """Itself: batches differ in their slots. Raises: ValueError for any other number of batches."""
        if torch.Size(batch_shape) != self.batch_shape:
            raise ValueError(
                f"a law of {self.batch_shape[0]} batches cannot become one of shape {tuple(batch_shape)}"
            )
        return self

    def sample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw observed means, cell noise included; slots that are not observed are drawn too."""
        with torch.no_grad():
            number = math.prod(sample_shape)
            draws = torch.stack([self._draw() for _ in range(number)])
        return draws.reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def _draw(self) -> Tensor:
        g, layout = self.globals_, self.layout

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=g.alpha.dtype, device=g.alpha.device)

        num_batches = self.batch_shape[0]
        num_features, num_factors = g.baseline_loading.shape
        u = normal(num_batches, num_factors)
        d = g.batch_scale * normal(num_batches, num_features)
        control = g.alpha + (u @ g.baseline_loading.T)[:, None]
        control = control + g.baseline_scale * normal(*control.shape)
        response = response_mean(g, Latents(u, d, control), layout)
        spread = g.strength[layout.condition][..., None] * g.response_scale[layout.context]
        means = torch.cat([control, response + spread * normal(*response.shape)], 1)
        return means + layout.noise.sqrt() * normal(*means.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Collapsed log density per batch, (B,)."""
        return log_density(self.globals_, self.layout._replace(mean=value))
