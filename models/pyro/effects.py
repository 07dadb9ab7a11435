"""Prior over the mean responses of conditions, in torch; the kernels are those of `models.effects`."""

import math

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

from hilbertcell.models.effects import JITTER


def kernel_cholesky(kernels: Tensor, amplitudes: Tensor) -> Tensor:
    """Lower Cholesky factor (E, E) of `sum_m amplitudes_m^2 kernels_m`; kernels (M, E, E), amplitudes (M,)."""
    kernel = torch.tensordot(amplitudes**2, kernels, 1)
    jitter = JITTER * kernel.diagonal().mean()
    return torch.linalg.cholesky(
        kernel + jitter * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device)
    )


class ConditionEffects(TorchDistribution):
    """Effects of one feature on all conditions, N(0, scale^2 chol chol^T); batch (D,), event (E,)."""

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012 - torch declares it so
    support = constraints.real_vector
    has_rsample = True

    def __init__(self, scale: Tensor, chol: Tensor) -> None:
        """`scale` (D,) and `chol` (E, E) lower triangular."""
        self.scale, self.chol = scale, chol
        super().__init__(scale.shape, chol.shape[:1], validate_args=False)

    def expand(
        self, batch_shape: torch.Size | list[int] | tuple[int, ...], _instance: object = None
    ) -> "ConditionEffects":
        """The same law for a batch of features that `scale` broadcasts to."""
        return ConditionEffects(self.scale.expand(batch_shape), self.chol)

    def rsample(self, sample_shape: torch.Size | list[int] | tuple[int, ...] = ()) -> Tensor:
        """Draw (*sample_shape, D, E)."""
        shape = (*sample_shape, *self.batch_shape, *self.event_shape)
        white = torch.randn(shape, dtype=self.chol.dtype, device=self.chol.device)
        return self.scale[..., None] * (white @ self.chol.T)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density (..., D)."""
        flat = value.reshape(-1, self.event_shape[0]).T
        white = torch.linalg.solve_triangular(self.chol, flat, upper=False).T.reshape(value.shape)
        log_volume = self.chol.diagonal().log().sum() + self.event_shape[0] * (
            self.scale.log() + 0.5 * math.log(2 * math.pi)
        )
        return -0.5 * ((white / self.scale[..., None]) ** 2).sum(-1) - log_volume
