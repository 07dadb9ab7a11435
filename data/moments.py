"""Counts, means, variances and factor covariances of every population, in one pass over the cells.

Each block contributes, per population, the number of cells, their mean, and their sums of squared deviations
*from that mean*. Two such summaries are merged exactly (Chan, Golub and LeVeque 1983, eq. 2.1):

    n = n1 + n2,   d = mean2 - mean1,   mean = mean1 + d n2 / n,   S = S1 + S2 + d d^T n1 n2 / n,

so nothing large is ever subtracted, and the result does not depend on the blocks or on the order of the cells
beyond rounding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd

from hilbertcell.data.grouping import labels_from_json, labels_to_json
from hilbertcell.data.populations import Populations

type FeatureMap = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Moments:
    """What inference needs of P populations: D features phi(x), L factor scores z = (phi - center) loadings.

    Attributes:
        labels: as `Populations.labels`, P rows.
        n: (P,) float64, cells.
        mean: (P, D) float64, mean of phi.
        variance: (P, D) float64, unbiased within-population variance; nan where n == 1.
        factor_covariance: (P, L, L) float64, unbiased within-population covariance of z; nan where n == 1.
        log_library: (P,) float64, mean log library size of the cells with counts; nan if there are none, and
            for data that are not counts.

    """

    labels: pd.DataFrame
    n: np.ndarray
    mean: np.ndarray
    variance: np.ndarray
    factor_covariance: np.ndarray
    log_library: np.ndarray

    def select(self, mask: np.ndarray | Sequence[bool]) -> "Moments":
        """Only the populations where `mask` (P,) is true."""
        mask = np.asarray(mask, dtype=bool)
        if mask.shape != self.n.shape:
            raise ValueError(f"mask must have one entry per population, {self.n.shape}, got {mask.shape}")
        arrays = (self.n, self.mean, self.variance, self.factor_covariance, self.log_library)
        return Moments(self.labels[mask].copy(), *(array[mask] for array in arrays))

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Arrays only, for safetensors; the labels as the bytes of a JSON text."""
        return {
            "labels": np.frombuffer(labels_to_json(self.labels).encode(), dtype=np.uint8),
            "n": self.n,
            "mean": self.mean,
            "variance": self.variance,
            "factor_covariance": self.factor_covariance,
            "log_library": self.log_library,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Moments":
        """The inverse of `to_arrays`."""
        labels = labels_from_json(arrays["labels"].tobytes().decode())
        return cls(labels=labels, **{name: array for name, array in arrays.items() if name != "labels"})


class _Running:
    """Running (n, mean, S) of P populations, for phi and for z, merged group by group."""

    def __init__(self, num_populations: int, num_features: int, num_factors: int):
        self.n = np.zeros(num_populations)
        self.mean = np.zeros((num_populations, num_features))
        self.squares = np.zeros((num_populations, num_features))
        self.factor_mean = np.zeros((num_populations, num_factors))
        self.products = np.zeros((num_populations, num_factors, num_factors))

    def add(self, codes: np.ndarray, phi: np.ndarray, scores: np.ndarray) -> None:
        """Merge a block: populations (m,), features (m, D), scores (m, L).

        Group by group, because a group fits into the cache where the block and its deviations do not.
        """
        order = np.argsort(codes, kind="stable")
        bounds = np.flatnonzero(np.diff(codes[order], prepend=-1, append=-1))
        for start, stop in pairwise(bounds):
            rows = order[start:stop]
            self._merge(int(codes[rows[0]]), phi[rows], scores[rows])

    def _merge(self, j: int, phi: np.ndarray, scores: np.ndarray) -> None:
        old, new = self.n[j], len(phi)
        self.n[j] += new
        step = new / self.n[j]

        mean = phi.mean(axis=0)
        phi -= mean
        np.square(phi, out=phi)
        delta = mean - self.mean[j]
        self.mean[j] += delta * step
        self.squares[j] += phi.sum(axis=0) + delta**2 * (old * step)

        mean = scores.mean(axis=0)
        scores -= mean
        delta = mean - self.factor_mean[j]
        self.factor_mean[j] += delta * step
        self.products[j] += scores.T @ scores + np.outer(delta, delta * (old * step))


def stream_moments(
    populations: Populations,
    feature_map: FeatureMap,
    loadings: np.ndarray,
    center: np.ndarray,
    chunk_size: int = 4096,
    progress: bool = False,
) -> Moments:
    """The moments of all selected populations in one pass over the cells; sums in float64.

    Args:
        populations: P selected populations with G genes.
        feature_map: (m, G) natural scale -> (m, D) float64.
        loadings: (D, L), directions whose scores get a full within-population covariance.
        center: (D,), subtracted from phi before the scores are taken.
        chunk_size: cells read at a time; the result does not depend on it.
        progress: whether to show a progress bar.

    Raises:
        DataError: if a file cannot be read any more.
        ValueError: if feature_map, loadings and center do not agree on D.

    """
    loadings, center = np.asarray(loadings, dtype=np.float64), np.asarray(center, dtype=np.float64)
    num_features = len(center)
    if loadings.ndim != 2 or loadings.shape[0] != num_features:
        raise ValueError(
            f"loadings must be ({num_features}, L) as center has {num_features}, got {loadings.shape}"
        )
    total = _Running(len(populations.labels), num_features, loadings.shape[1])
    for positions, x in populations.chunks(chunk_size, progress):
        phi = np.asarray(feature_map(x), dtype=np.float64)
        if phi.shape != (len(x), num_features):
            raise ValueError(
                f"feature_map must return ({len(x)}, {num_features}) as center has, got {phi.shape}"
            )
        total.add(populations.cell_population[positions], phi, (phi - center) @ loadings)
    degrees = np.where(total.n > 1, total.n - 1, np.nan)
    return Moments(
        labels=populations.labels,
        n=total.n,
        mean=total.mean,
        variance=total.squares / degrees[:, None],
        factor_covariance=total.products / degrees[:, None, None],
        log_library=_mean_log_library(populations),
    )


def _mean_log_library(populations: Populations) -> np.ndarray:
    num = len(populations.labels)
    if populations.library_size is None:
        return np.full(num, np.nan)
    use = (populations.cell_population >= 0) & (populations.library_size > 0)
    codes = populations.cell_population[use]
    sums = np.bincount(codes, weights=np.log(populations.library_size[use]), minlength=num)
    count = np.bincount(codes, minlength=num)
    return np.divide(sums, count, out=np.full(num, np.nan), where=count > 0)
