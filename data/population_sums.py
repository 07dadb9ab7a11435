"""Counts, means and sums of squares of populations, and how two of them become one.

A group of cells contributes their number, their mean, and their sums of squared deviations *from that mean*. Two such
summaries are merged exactly (Chan, Golub and LeVeque 1983, eq. 2.1):

    n = n1 + n2,   d = mean2 - mean1,   mean = mean1 + d n2 / n,   S = S1 + S2 + d d^T n1 n2 / n,

so nothing large is ever subtracted. The sums of squares of CSR rows never see a zero: the n - m cells of a group that
store no value of a gene add (n - m) mean^2.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import scipy.sparse as sp

from hilbertcell.data.stores import Rows

# Values that are worked on at a time: what is made of them has to fit in the cache of a core.
_PIECE = 2**19
# A matrix with more stored values than this share is made dense, whose arithmetic is then the faster one.
_DENSE = 0.3


class PopulationSums:
    """Of P populations: n (P,), mean and squares (P, D) of phi, factor_mean (P, L) and products (P, L, L) of z."""

    def __init__(self, num_populations: int, num_features: int, num_factors: int):
        """No cells yet."""
        self.n = np.zeros(num_populations)
        self.mean = np.zeros((num_populations, num_features))
        self.squares = np.zeros((num_populations, num_features))
        self.factor_mean = np.zeros((num_populations, num_factors))
        self.products = np.zeros((num_populations, num_factors, num_factors))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All of it by name."""
        return vars(self)

    def add(self, j: int, other: "PopulationSums", i: int) -> None:
        """Merge population i of other sums into our population j."""
        if other.n[i] == 0:
            return
        old, n = self.n[j], other.n[i]
        self.n[j] += n
        step = n / self.n[j]
        delta = other.mean[i] - self.mean[j]
        self.mean[j] += delta * step
        np.square(delta, out=delta)
        delta *= old * step
        self.squares[j] += delta
        self.squares[j] += other.squares[i]
        delta = other.factor_mean[i] - self.factor_mean[j]
        self.factor_mean[j] += delta * step
        self.products[j] += other.products[i] + np.outer(delta, delta * (old * step))

    def put(self, j: int, other: "PopulationSums", i: int) -> None:
        """Let populations i, i + 1, ... of other sums be our populations j, j + 1, ..."""
        for name, array in self.arrays.items():
            values = other.arrays[name][i:]
            array[j : j + len(values)] = values

    def merge(self, other: "PopulationSums", populations: np.ndarray) -> None:
        """Merge the sums of other cells, whose population i is our population `populations[i]`."""
        for i, j in enumerate(populations):
            self.add(int(j), other, i)


@dataclass(frozen=True, eq=False)
class Scoring:
    """What is summed: D features phi(x), and L scores z = (phi - center) loadings.

    Attributes:
        feature_map: (m, G) natural scale -> (m, D). With a method `random_features` that makes all features but the
            first G, which are the genes, from CSR rows, sparse rows are never made dense.
        loadings: (D, L).
        center: (D,).

    """

    feature_map: Any
    loadings: np.ndarray
    center: np.ndarray

    def sums(self, rows: Rows, starts: np.ndarray) -> PopulationSums:
        """The sums of groups of cells (m, G) on the natural scale; group i begins at row `starts[i]`.

        Raises: ValueError if feature_map and center do not agree on D.
        """
        sums = PopulationSums(len(starts), *self.loadings.shape)
        num_cells, num_genes = rows.shape
        sums.n = np.diff(starts, append=num_cells).astype(np.float64)
        if not self.is_sparse(rows):
            phi = self._checked(self.feature_map(rows.toarray() if sp.issparse(rows) else rows), num_cells)
            sums.mean, sums.squares, _ = _dense_sums(phi, starts)
            scores = (phi - self.center) @ self.loadings
        else:
            of_genes = slice(0, num_genes)
            rest = self._checked(self.feature_map.random_features(rows), num_cells, num_genes)
            sums.mean[:, of_genes], sums.squares[:, of_genes] = _sparse_sums(rows, starts)
            sums.mean[:, num_genes:], sums.squares[:, num_genes:], _ = _dense_sums(rest, starts)
            scores = rows @ self.loadings[of_genes]
            scores += rest @ self.loadings[num_genes:] - self.center @ self.loadings
        sums.factor_mean, _, deviation = _dense_sums(scores, starts)
        for i, (first, last) in enumerate(pairwise(np.append(starts, num_cells))):
            np.matmul(deviation[first:last].T, deviation[first:last], out=sums.products[i])
        return sums

    def is_sparse(self, rows: Rows) -> bool:
        """Whether the sums are taken from CSR rows as they are."""
        return (
            sp.issparse(rows)
            and hasattr(self.feature_map, "random_features")
            and rows.nnz < _DENSE * np.prod(rows.shape)
        )

    def piece(self, rows: Rows) -> int:
        """How many of the rows to work on at a time."""
        per_cell = sum(self.loadings.shape)
        if self.is_sparse(rows):
            per_cell += rows.nnz / rows.shape[0] - rows.shape[1]
        return max(1, int(_PIECE / max(per_cell, 1.0)))

    def _checked(self, features: np.ndarray, num_cells: int, num_before: int = 0) -> np.ndarray:
        features = np.asarray(features, dtype=np.float64)
        if features.shape != (num_cells, len(self.center) - num_before):
            wanted = f"({num_cells}, {len(self.center) - num_before})"
            raise ValueError(f"feature_map must return {wanted} as center has, got {features.shape}")
        return features


def sum_cells(
    rows: Rows,
    order: np.ndarray,
    codes: np.ndarray,
    scoring: Scoring,
    natural: Callable[[Rows, np.ndarray], Rows],
) -> PopulationSums:
    """The sums of max(codes) + 1 populations of cells.

    Args:
        rows: (r, G) CSR or dense, in the scale of the file.
        order: (m,) the rows that are wanted, population by population.
        codes: (m,) their populations, ascending, none left out.
        scoring: what is summed.
        natural: brings rows to the natural scale, given the rows and their places in `order`.

    """
    sums = PopulationSums(int(codes[-1]) + 1, *scoring.loadings.shape)
    size = scoring.piece(rows)
    for first in range(0, len(order), size):
        place = np.arange(first, min(first + size, len(order)))
        starts = np.flatnonzero(np.diff(codes[place], prepend=-1))
        found = scoring.sums(natural(rows[order[place]], place), starts)
        j = int(codes[first])
        begun = int(sums.n[j] > 0)  # the piece before this one ended in the middle of a population
        if begun:
            sums.add(j, found, 0)
        sums.put(j + begun, found, begun)
    return sums


def _sparse_sums(rows: Rows, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means and sums of squares about them (groups, G) of groups of CSR rows that begin at `starts`.

    With y = x - r for a stored x, r the mean of all stored values of the gene, f values stored of n and m the mean,

        sum (x - m)^2 = sum y^2 - 2 (m - r) sum y + f (m - r)^2 + (n - f) m^2.
    """
    shape = len(starts), rows.shape[1]
    n = np.diff(starts, append=rows.shape[0])[:, None]
    pointers = rows.indptr[np.append(starts, rows.shape[0])]

    def by_group(values: np.ndarray) -> np.ndarray:
        # A group as one long row: genes that are stored several times are added up in the dense array.
        return sp.csr_array((values, rows.indices, pointers), shape=shape).toarray()

    total, filled = by_group(rows.data), by_group(np.ones(rows.nnz, np.int32))
    center = total.sum(0) / np.maximum(filled.sum(0), 1)
    deviation = rows.data - center.take(rows.indices)
    np.square(deviation, out=deviation)
    mean = total / n
    from_center = mean - center
    squares = by_group(deviation) - 2 * from_center * (total - filled * center)
    squares += filled * np.square(from_center) + (n - filled) * np.square(mean)
    return mean, np.maximum(squares, 0.0)


def _dense_sums(x: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means and sums of squares about them (groups, q) of groups of rows of x (m, q), and the deviations (m, q)."""
    n = np.diff(starts, append=len(x))
    mean = np.add.reduceat(x, starts, axis=0) / n[:, None]
    deviation = x - np.repeat(mean, n, axis=0)
    return mean, np.add.reduceat(np.square(deviation), starts, axis=0), deviation
