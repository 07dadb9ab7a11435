"""Signal-ordered coordinates of populations: v = A^T (m - mean), in units of the noise of one cell.

A population of n cells is seen as v_hat ~ N(v, W / n), W = A^T C_j A; A^T C A = I for the pooled covariance C.
That is the central limit theorem, and with n = 20 cells a gene that few cells express is not Gaussian yet: at 0.1
counts per cell its mean has skewness 0.63, and a seventh of such populations show no count at all (measured in
tests/models/test_embedding.py). The covariance is right, the tails of the noise of small populations are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_array
from scipy.sparse.linalg import LinearOperator, eigsh

from hilbertcell.models.within_covariance import WithinCovariance, WithinPrior

# Data sets of pure sampling noise that are simulated for the cut; their mean maximum is known to a few percent.
NUM_NULL = 8
# Up to here the leading eigenpairs are taken from the D x D matrix, which is faster; beyond, by Lanczos iteration.
DENSE_FEATURES = 3_000


@dataclass(frozen=True, eq=False)
class Coordinates:
    """Linear coordinates of embeddings, ordered by signal: variance between batches per noise of one cell."""

    A: np.ndarray
    """(D, Q) from features to coordinates; A^T C A = I."""
    mean: np.ndarray
    """(D,) origin: the mean embedding of the training populations."""
    back_map: np.ndarray
    """(D, Q) C A: from coordinates to features."""
    spectrum: np.ndarray
    """(Q,) noise-corrected variance of each coordinate around (context, perturbation) means, decreasing."""
    cut: np.ndarray
    """() the largest value of the spectrum that sampling noise alone makes; smaller ones were left out."""
    deviations: np.ndarray
    """(R, D) X with X^T X = covariance of the observed means around their conditions, noise included."""
    noise_diagonal: np.ndarray
    """(D,) with the next two: expected noise in X^T X = diag(noise_diagonal) + loadings noise_factor loadings^T."""
    noise_factor: np.ndarray
    """(L, L)"""
    loadings: np.ndarray
    """(D, L)"""

    def project(self, m: np.ndarray) -> np.ndarray:
        """(..., Q) coordinates of embeddings m (..., D)."""
        return (m - self.mean) @ self.A

    def back(self, v: np.ndarray) -> np.ndarray:
        """(..., D) embeddings on the scale of the features from coordinates (..., Q); the first G are gene means."""
        return self.mean + v @ self.back_map.T

    def residual(self, m: np.ndarray) -> np.ndarray:
        """(..., D) what the coordinates leave out: (I - C A A^T)(m - mean); m = back(project(m)) + residual(m)."""
        return m - self.back(self.project(m))

    def functional(self, w: np.ndarray) -> Functional:
        """The expectation w . m of a function <w, phi> of the cells as a linear function of the coordinates.

        w (D,) or (D, F) for F functionals at once; the unit vectors of genes give the back-map to genes.
        """
        coefficients = self.back_map.T @ w
        left_out = w - self.A @ coefficients
        return Functional(self.mean @ w, coefficients, np.sqrt(np.maximum(self._between(left_out), 0.0)))

    def _between(self, w: np.ndarray) -> np.ndarray:
        """Noise-corrected variance between batches of the functional w; an unbiased estimate, may be negative."""
        factors = self.loadings.T @ w
        noise = self.noise_diagonal @ w**2 + (factors * (self.noise_factor @ factors)).sum(0)
        return ((self.deviations @ w) ** 2).sum(0) - noise

    def noise_spectrum(self, within: WithinCovariance) -> np.ndarray:
        """(P, Q) eigenvalues of W_j = A^T C_j A, decreasing: all 1 where a population has the pooled covariance."""
        return np.linalg.eigvalsh(within.project(self.A))[:, ::-1]

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, ready for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> Coordinates:
        """Inverse of `to_arrays`."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


@dataclass(frozen=True, eq=False)
class Functional:
    """E_P[<w, phi>] = intercept + coefficients . v, up to `error`; for F functionals a trailing axis F."""

    intercept: np.ndarray
    """() or (F,)"""
    coefficients: np.ndarray
    """(Q,) or (Q, F)"""
    error: np.ndarray
    """() or (F,): sd, between batches of one (context, perturbation) and without sampling noise, of what is left out."""


def fit_coordinates(
    mean: np.ndarray,
    within: WithinCovariance,
    prior: WithinPrior,
    condition_codes: np.ndarray,
    max_coordinates: int = 64,
) -> Coordinates:
    """Coordinates from training populations; whatever is passed in is used, so pass no held-out population.

    mean (P, D) observed embeddings, within and prior of the same populations, condition_codes (P,) their
    (context, perturbation). Solves Sigma a = lambda C a for the covariance Sigma between batches, around condition
    means and with the sampling noise subtracted; a condition seen once contributes nothing. Kept are the
    coordinates whose lambda exceeds the largest that sampling noise alone gives (parametric simulation with the
    same n_j and C_j), at least one and at most max_coordinates. Raises ValueError if every condition was seen once.
    """
    mean, (_, condition_codes) = np.asarray(mean, np.float64), np.unique(condition_codes, return_inverse=True)
    n = within.n
    # Half weight at the median size: large populations differ by biology, small ones by noise.
    weights = n / (n + np.median(n))
    totals = np.bincount(condition_codes, weights)
    squares = np.bincount(condition_codes, weights**2)
    degrees = (totals - squares / totals).sum()
    if np.bincount(condition_codes).max() < 2:
        raise ValueError(
            f"each of the {len(totals)} (context, perturbation) conditions was seen in one population only: the "
            "variation between batches is unknown; give more batches or a coarser batch key"
        )
    weighted_membership = csr_array((weights, (condition_codes, np.arange(len(n)))))

    def around_conditions(m: np.ndarray) -> np.ndarray:
        means = weighted_membership @ m / totals[:, None]
        return np.sqrt(weights / degrees)[:, None] * (m - means[condition_codes])

    # E sum_j w_j (m_j - mean)^2 = degrees * Sigma + sum_j (w_j - w_j^2 / total) C_j / n_j
    noise_weights = (weights - weights**2 / totals[condition_codes]) / (n * degrees)
    noise_diagonal = noise_weights @ within.rest
    noise_factor = np.tensordot(noise_weights, within.factor, 1)
    whiten = _Whitening(prior)

    def corrected(deviations: np.ndarray, vector: np.ndarray) -> np.ndarray:
        noise = noise_diagonal[:, None] * vector
        noise += within.loadings @ (noise_factor @ (within.loadings.T @ vector))
        return deviations.T @ (deviations @ vector) - noise

    def leading(deviations: np.ndarray, count: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
        def operator(x: np.ndarray) -> np.ndarray:
            return whiten.transposed(corrected(deviations, whiten(x)))

        return _leading_eigenpairs(operator, mean.shape[1], count, tolerance)

    observed = around_conditions(mean)
    values, vectors = leading(observed, max_coordinates, 0.0)
    # The mean of a few maxima is itself known to percents only.
    null = [leading(around_conditions(noise), 1, 1e-2)[0][0] for noise in _null_means(within, NUM_NULL)]
    cut = float(np.mean(null))
    keep = max(1, int(np.sum(values > cut)))
    A = whiten(vectors[:, :keep])
    A = A * np.sign(A[np.abs(A).argmax(0), np.arange(keep)])
    back_map = prior.pooled().apply(0, A)
    if len(observed) > observed.shape[1]:
        observed = np.linalg.qr(observed, mode="r")
    return Coordinates(
        A,
        mean.mean(0),
        back_map,
        values[:keep],
        np.asarray(cut),
        observed,
        noise_diagonal,
        noise_factor,
        within.loadings,
    )


class _Whitening:
    """R with R^T C R = I for the pooled C = loadings F loadings^T + diag(rest), at a cost linear in D.

    With H = rest^(-1/2) loadings F^(1/2) = U s V^T, R = rest^(-1/2) (I + U ((1 + s^2)^(-1/2) - 1) U^T).
    """

    def __init__(self, prior: WithinPrior) -> None:
        pooled = prior.pooled()
        self.inverse_sd = 1 / np.sqrt(pooled.rest[0])[:, None]
        values, vectors = np.linalg.eigh(pooled.factor[0])
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        self.U, s, _ = np.linalg.svd(self.inverse_sd * (pooled.loadings @ root), full_matrices=False)
        self.shrink = (1 / np.sqrt(1 + s**2) - 1)[:, None]

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self.inverse_sd * (x + self.U @ (self.shrink * (self.U.T @ x)))

    def transposed(self, x: np.ndarray) -> np.ndarray:
        x = self.inverse_sd * x
        return x + self.U @ (self.shrink * (self.U.T @ x))


def _null_means(within: WithinCovariance, count: int) -> Iterator[np.ndarray]:
    """`count` draws (P, D) of the sampling noise N(0, C_j / n_j) of all populations; the same on every call."""
    rng = np.random.default_rng(0)
    values, vectors = np.linalg.eigh(within.factor)
    roots = vectors * np.sqrt(np.maximum(values, 0.0))[:, None, :]
    for _ in range(count):
        factors = np.einsum("plk,pk->pl", roots, rng.standard_normal(values.shape))
        unique = np.sqrt(within.rest) * rng.standard_normal(within.rest.shape)
        yield (factors @ within.loadings.T + unique) / np.sqrt(within.n)[:, None]


def _leading_eigenpairs(
    operator: Callable[[np.ndarray], np.ndarray], size: int, count: int, tolerance: float
) -> tuple[np.ndarray, np.ndarray]:
    """Largest eigenvalues (k,), decreasing, and vectors (size, k), k = min(count, size), of a symmetric operator.

    Up to a relative tolerance, 0 for all digits.
    """
    affordable = size <= DENSE_FEATURES and tolerance == 0
    if affordable or 4 * count >= size:  # Lanczos needs room for a Krylov space
        matrix = operator(np.eye(size))
        values, vectors = eigh((matrix + matrix.T) / 2, subset_by_index=[max(0, size - count), size - 1])
    else:
        linear = LinearOperator((size, size), matvec=lambda x: operator(x.reshape(-1, 1))[:, 0], dtype=float)
        start = np.random.default_rng(0).standard_normal(size)
        values, vectors = eigsh(linear, k=count, which="LA", v0=start, tol=tolerance)
    order = np.argsort(values)[::-1]
    return values[order], vectors[:, order]
