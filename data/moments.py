"""Counts, means, variances and factor covariances of every population, in one pass over the cells.

The rows are cut into blocks by their place in the file. Each block is summed up on its own, by this process or by
another one, and the sums are merged in the order of the blocks (`hilbertcell.data.population_sums`): the number of
processes changes no bit of the result, the size of the blocks and the order of the cells no more than rounding.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.data.grouping import labels_from_json, labels_to_json
from hilbertcell.data.matrices import CellMatrix, MemoryPart
from hilbertcell.data.population_sums import PopulationSums, Scoring, sum_cells
from hilbertcell.data.populations import Populations, natural_rows
from hilbertcell.data.progress import track_cells
from hilbertcell.data.stores import Rows
from hilbertcell.data.stream_progress import SAVE_SECONDS, StreamProgress, stream_key
from hilbertcell.data.workers import in_order, in_threads

type FeatureMap = Callable[[Any], np.ndarray]

# Cells of one block in memory, as read. To merge the sums of a block, P x D numbers of them, should be little work
# against its cells; and a process needs some five times as much memory.
BLOCK_BYTES = 128e6
# Threads that sum up blocks beside each other. One in three is reading, and only one file can be read at a time.
_MAX_THREADS = 4


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

    def join(self, other: "Moments") -> "Moments":
        """These populations, then those of `other`; of the same features and scores."""
        names = ("n", "mean", "variance", "factor_covariance", "log_library")
        arrays = (np.concatenate([getattr(self, name), getattr(other, name)]) for name in names)
        return Moments(pd.concat([self.labels, other.labels]), *arrays)

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


@dataclass(frozen=True, eq=False)
class _Blocks:
    """What a process needs to sum up any block of the rows."""

    matrix: CellMatrix
    scale: str
    library_size: np.ndarray | None
    cell_population: np.ndarray
    scoring: Scoring

    def read(self, bounds: tuple[int, int]) -> tuple[np.ndarray, Rows]:
        """Selected cells among rows start <= i < stop, population by population, and the rows from first to last."""
        start, stop = bounds
        cells = np.flatnonzero(self.cell_population[start:stop] >= 0) + start
        if not len(cells):
            return cells, None
        start, stop = int(cells[0]), int(cells[-1]) + 1
        # In this order the sums of one population stay in the cache until it is done.
        cells = cells[np.argsort(self.cell_population[cells], kind="stable")]
        return cells, self.matrix.read_range(start, stop)

    def sum_up(self, block: tuple[np.ndarray, Rows]) -> tuple[np.ndarray, PopulationSums]:
        """The populations of a block, ascending, and the sums of each."""
        cells, rows = block
        if not len(cells):
            return cells, PopulationSums(0, *self.scoring.loadings.shape)
        populations, codes = np.unique(self.cell_population[cells], return_inverse=True)
        library = None if self.library_size is None else self.library_size[cells]

        def natural(rows: Rows, place: np.ndarray) -> Rows:
            return natural_rows(rows, self.scale, None if library is None else library[place])

        return populations, sum_cells(rows, cells - cells.min(), codes, self.scoring, natural)

    def sums(self, bounds: tuple[int, int]) -> tuple[np.ndarray, PopulationSums]:
        """Both: the populations among rows start <= i < stop, and the sums of each."""
        return self.sum_up(self.read(bounds))


def stream_moments(
    populations: Populations,
    feature_map: FeatureMap,
    loadings: np.ndarray,
    center: np.ndarray,
    chunk_size: int | None = None,
    progress: bool = False,
    *,
    workers: int = 1,
    resume: Path | None = None,
) -> Moments:
    """The moments of all selected populations in one pass over the cells; sums in float64.

    Args:
        populations: P selected populations with G genes.
        feature_map: (m, G) natural scale -> (m, D) float64. Sparse files are several times faster with one that
            makes its features from CSR rows, see `population_sums.Scoring`.
        loadings: (D, L), directions whose scores get a full within-population covariance.
        center: (D,), subtracted from phi before the scores are taken.
        chunk_size: cells read at a time, 128 MB of them if None; the result does not depend on it.
        progress: whether to show a progress bar.
        workers: processes that share the blocks of files. One does it with threads, which is faster where there are
            few cores; see `workers.in_order` for what more than one asks of feature_map and of the program. Cells in memory
            are not shared.
        resume: a file that keeps the sums, renewed every half minute, until the pass is complete. A pass that finds the file
            of an interrupted one over the same cells, features and blocks goes on from there, to the same bits.

    Raises:
        DataError: if a file cannot be read any more.
        ValueError: if feature_map, loadings and center do not agree on D, or `resume` cannot be used: it is some
            other file, the cells are in memory, or the feature map cannot be recognised.

    """
    loadings, center = np.asarray(loadings, dtype=np.float64), np.asarray(center, dtype=np.float64)
    num_features = len(center)
    if loadings.ndim != 2 or loadings.shape[0] != num_features:
        raise ValueError(
            f"loadings must be ({num_features}, L) as center has {num_features}, got {loadings.shape}"
        )
    matrix, library, codes = populations.matrix, populations.library_size, populations.cell_population
    scoring = Scoring(feature_map, loadings, center)
    blocks = _Blocks(matrix, populations.keys.scale, library, codes, scoring)
    total = PopulationSums(len(populations.labels), num_features, loadings.shape[1])
    bounds = matrix.partition(chunk_size, BLOCK_BYTES)
    kept, done, saved = None, 0, time.monotonic()
    if resume is not None:
        kept = StreamProgress(resume, stream_key(populations, feature_map, (loadings, center), bounds))
        done = kept.load(total)
    left = bounds[done:]
    if workers > 1 and not any(isinstance(part, MemoryPart) for part in matrix.parts):
        found = in_order(blocks.sums, left, workers)
    else:
        found = in_threads(blocks.sums, left, min(_MAX_THREADS, os.cpu_count() or 1))
    ranges = zip((range(*rows) for rows in left), found, strict=True)
    num_left = sum(stop - start for start, stop in left)
    for _, (present, sums) in track_cells(ranges, num_left, "reading cells", progress):
        total.merge(sums, present)
        done += 1
        if kept is not None and time.monotonic() - saved >= SAVE_SECONDS:
            kept.save(total, done)
            saved = time.monotonic()
    if kept is not None:
        kept.remove()
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
