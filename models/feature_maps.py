"""Feature map of a cell: its genes, and random Fourier features of Gaussian kernels on principal components.

The embedding of a population (its kernel mean embedding) is the mean of these features over its cells.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import scipy.sparse as sp

# Several length scales: the coarse one sees which kinds of cells there are, the fine one sees mixed responders.
BANDWIDTH_FACTORS = (0.5, 1.0, 2.0)
# A gene seen in one pilot cell of 20,000 stands 141 sd from its mean; unclipped it would own a component.
MAX_DEVIATION = 10.0
type Cells = Any  # (m, G) dense array or CSR: scipy has no types to say it with

# Pairwise distances for the median heuristic: 10^6 / 2 pairs fix a median to far below a percent.
NUM_MEDIAN_CELLS = 1_000


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """phi(x) = [x, sqrt(2/R) cos(Omega^T component(x) + phase)], fixed after the pilot.

    The gene block is the identity, so the first G entries of an embedding are the gene means on the scale of
    the input. The random block (Rahimi and Recht, 2007) approximates the mean of Gaussian kernels at
    several bandwidths, each characteristic on the components; the finite map is so only approximately, with an
    error of order 1/sqrt(R). Components are of unit pilot variance: the leading one is mostly the kind of
    cell, and unscaled it would hide all that happens within a kind.
    """

    center: np.ndarray
    """(G,) pilot means, natural scale."""
    scale: np.ndarray
    """(G,) pilot standard deviations, natural scale; 1 for a gene that is constant in the pilot."""
    directions: np.ndarray
    """(G, K) from standardised, clipped genes to components of unit pilot variance."""
    frequencies: np.ndarray
    """(K, R) Omega, columns ~ N(0, I / bandwidth^2)."""
    phase: np.ndarray
    """(R,) uniform on [0, 2 pi)."""
    bandwidths: np.ndarray
    """(R,) the bandwidth each random feature belongs to, in units of the components."""
    weights: np.ndarray
    """(G + R,) weights of the features in the norm of H; each block has unit total variance in the pilot."""

    @property
    def num_genes(self) -> int:
        """G: how many of the features, the first ones, are genes."""
        return len(self.center)

    @property
    def num_features(self) -> int:
        """D = G + R."""
        return len(self.weights)

    def names(self, genes: np.ndarray) -> np.ndarray:
        """(D,) names: the given gene names, then `random_0`, `random_1`, ..."""
        return np.concatenate([np.asarray(genes, str), [f"random_{i}" for i in range(len(self.phase))]])

    def components(self, X: Cells) -> np.ndarray:
        """(m, K) standardised principal components of cells (m, G), dense or CSR, on the natural scale."""
        X = _cells(X, self.num_genes)
        if sp.issparse(X):
            # Where values are not negative and 0 is never clipped, a gene adds to its standardised 0 the stored
            # value over its scale, clipped from above.
            highest = self.center + MAX_DEVIATION * self.scale
            if X.data.min(initial=0.0) >= 0 and np.all(np.abs(self.center) <= MAX_DEVIATION * self.scale):
                stored = np.minimum(X.data, highest.take(X.indices))
                rows = sp.csr_array((stored, X.indices, X.indptr), shape=X.shape)
                return (
                    rows @ (self.directions / self.scale[:, None])
                    - (self.center / self.scale) @ self.directions
                )
            X = X.toarray()
        return np.clip((X - self.center) / self.scale, -MAX_DEVIATION, MAX_DEVIATION) @ self.directions

    def random_features(self, X: Cells) -> np.ndarray:
        """(m, R) float64, the features beyond the genes, of cells (m, G), dense or CSR, on the natural scale."""
        angles = self.components(X) @ self.frequencies + self.phase
        return np.sqrt(2 / max(len(self.phase), 1)) * _cosine(angles)

    def __call__(self, X: Cells) -> np.ndarray:
        """(m, D) float64 features of cells (m, G), dense or CSR, on the natural scale. Raises ValueError on another G."""
        X = _cells(X, self.num_genes)
        features = np.empty((X.shape[0], self.num_features))
        features[:, : self.num_genes] = X.toarray() if sp.issparse(X) else X
        features[:, self.num_genes :] = self.random_features(X)
        return features

    def kernel(self, X: np.ndarray, Y: np.ndarray) -> np.ndarray:
        """(m, l) the exact kernel that `phi` approximates: k(x, y) ~ sum_d weights_d phi_d(x) phi_d(y).

        Weighted linear kernel on genes plus the weighted mean over random features of the Gaussian kernels.
        """
        X, Y = _cells(X, self.num_genes), _cells(Y, self.num_genes)
        linear = (X * self.weights[: self.num_genes]) @ Y.T
        squared = squared_distances(self.components(X), self.components(Y))
        random_weights = self.weights[self.num_genes :] / len(self.phase)
        bandwidths = np.unique(self.bandwidths)
        shares = [random_weights[self.bandwidths == h].sum() for h in bandwidths]
        gaussian = [c * np.exp(-squared / (2 * h**2)) for c, h in zip(shares, bandwidths, strict=True)]
        return linear + np.sum(gaussian, axis=0)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Named arrays, ready for safetensors."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> FeatureMap:
        """Inverse of `to_arrays`."""
        return cls(**{field.name: arrays[field.name] for field in fields(cls)})


def fit_feature_map(
    pilot: np.ndarray, num_components: int = 16, num_random: int = 96, seed: int = 0
) -> FeatureMap:
    """Fix components, bandwidths and frequencies on pilot cells (m, G), natural scale, training cells only.

    Fewer components are used where the pilot has fewer directions. Bandwidths: the median distance between
    pilot cells (Gretton et al., 2012) times 0.5, 1 and 2. The order of the pilot's rows does not matter.
    Raises ValueError for fewer than two cells or a pilot in which all genes are constant.
    """
    pilot = np.asarray(pilot, np.float64)
    if pilot.ndim != 2 or len(pilot) < 2:
        raise ValueError(
            f"the pilot has shape {pilot.shape}: give at least two training cells as (cells, genes)"
        )
    rng = np.random.default_rng(seed)
    center, scale = pilot.mean(0), pilot.std(0)
    constant = scale <= 1e-12 * np.maximum(1.0, np.abs(center))
    if constant.all():
        raise ValueError(
            "every gene is constant in the pilot: there is nothing to embed; check the file's layer"
        )
    scale = np.where(constant, 1.0, scale)
    standardised = np.clip((pilot - center) / scale, -MAX_DEVIATION, MAX_DEVIATION)
    mean = standardised.mean(0)  # clipping moves it a little
    directions, singular = leading_directions(standardised - mean, num_components, rng)
    directions = directions / (singular / np.sqrt(len(pilot)))
    components = standardised @ directions

    per_bandwidth = np.array_split(np.arange(num_random), len(BANDWIDTH_FACTORS))
    factors = np.repeat(BANDWIDTH_FACTORS, [len(part) for part in per_bandwidth])
    bandwidths = median_distance(components) * factors
    frequencies = rng.standard_normal((components.shape[1], num_random)) / bandwidths
    phase = rng.uniform(0, 2 * np.pi, num_random)
    random = np.sqrt(2 / max(num_random, 1)) * np.cos(components @ frequencies + phase)
    gene_weights = np.where(constant, 0.0, 1 / (scale**2 * np.sum(~constant)))
    random_weights = np.full(num_random, 1.0) / (random.var(0).sum() or 1.0)
    weights = np.concatenate([gene_weights, random_weights])
    return FeatureMap(center, scale, directions, frequencies, phase, bandwidths, weights)


def leading_directions(X: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Right singular vectors (D, k) and values (k,) of X (m, D), largest first, k <= rank.

    Randomised subspace iteration (Halko, Martinsson and Tropp, 2011, algorithm 4.4); exact when rank + 10 >= D.
    Directions of relative size < 1e-6 are dropped, signs fixed by the largest entry.
    """
    num_features = X.shape[1]
    size = min(rank + 10, num_features)  # ten extra directions, as the paper advises
    basis = np.linalg.qr(rng.standard_normal((num_features, size)))[0]
    for _ in range(8):  # the error falls by the ratio of squared singular values each time
        basis = np.linalg.qr(X.T @ (X @ basis))[0]
    _, singular, rotation = np.linalg.svd(X @ basis, full_matrices=False)
    keep = min(rank, int(np.sum(singular > 1e-6 * singular[0])))
    directions = basis @ rotation[:keep].T
    signs = np.sign(directions[np.abs(directions).argmax(0), np.arange(keep)])
    return directions * signs, singular[:keep]


def median_distance(components: np.ndarray) -> float:
    """Median distance between pilot cells, from at most 1,000 of them.

    Cells are taken at even ranks of the first component: a stratified choice that ignores the order of rows.
    """
    step = max(1, len(components) // NUM_MEDIAN_CELLS)
    chosen = components[np.lexsort(components.T[::-1])[::step]]
    squared = squared_distances(chosen, chosen)[np.triu_indices(len(chosen), 1)]
    # More than half of the pairs may be equal cells; the mean is then the next best length scale.
    return float(np.sqrt(np.median(squared))) or float(np.sqrt(squared.mean()))


def squared_distances(X: np.ndarray, Y: np.ndarray) -> np.ndarray:
    """(m, l) squared Euclidean distances between the rows of X (m, K) and Y (l, K)."""
    squared = (X**2).sum(1)[:, None] + (Y**2).sum(1) - 2 * X @ Y.T
    return np.maximum(squared, 0.0)


def _cosine(angles: np.ndarray) -> np.ndarray:
    """cos, to 2e-16: NumPy's tangent is vectorised and its cosine is not, which makes this six times faster."""
    squared = np.square(np.tan(angles / 2))
    return (1 - squared) / (1 + squared)


def _cells(X: Cells, num_genes: int) -> Cells:
    if sp.issparse(X):
        X = X if X.format == "csr" and X.dtype == np.float64 else sp.csr_array(X, dtype=np.float64)
    else:
        X = np.asarray(X, np.float64)
    if X.ndim != 2 or X.shape[1] != num_genes:
        raise ValueError(
            f"the feature map was fitted on {num_genes} genes and was given an array of shape {X.shape}: "
            "pass cells as (cells, genes) with the genes of the fit, in its order"
        )
    return X
