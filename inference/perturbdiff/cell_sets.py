"""The data stream of the published training: sets of cells of one population, each cell with a control partner.

Every epoch the cells of a population are shuffled and cut into sets of S; an incomplete set is filled with cells of the
population, drawn with replacement. Sets of all populations are shuffled and dealt out, B to a step; a last step that is
not full is left out. Partners are drawn anew at every use. A step is a pure function of the seed and its number, so that
training can go on from anywhere.
"""

import itertools
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import pandas as pd

from hilbertcell.data.populations import Populations, natural_rows
from hilbertcell.data.validation import DataError, listing
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary
from hilbertcell.models.perturbdiff import Batch

MODEL_UNIT = 10.0  # published: log1p values are divided by it
_HELD_BYTES = 2 * 2**30  # cells that take less are read once and kept
_CHUNK = 8192


@dataclass(frozen=True, eq=False)
class Expression:
    """Natural scale to model units and back: x -> (x - lowest) / 10.

    `lowest` (G,) is 0 for log1p values, and the smallest training value of each gene on other scales: the network's
    output is not negative.
    """

    lowest: np.ndarray

    def to_model(self, natural: np.ndarray) -> np.ndarray:
        """(..., G) float32."""
        return ((natural - self.lowest) / MODEL_UNIT).astype(np.float32)

    def to_natural(self, model: np.ndarray) -> np.ndarray:
        """(..., G) float64."""
        return np.asarray(model, np.float64) * MODEL_UNIT + self.lowest


def expression_of(populations: Populations) -> Expression:
    """The units that fit training populations."""
    lowest = np.zeros(len(populations.genes))
    if populations.keys.scale == "other":
        lowest[:] = np.inf
        for _, rows in populations.chunks():
            np.minimum(lowest, rows.min(axis=0), out=lowest)
    return Expression(lowest)


class Cells:
    """Cells of populations in model units, by position; kept in memory when they are few."""

    def __init__(self, populations: Populations, unit: Expression, held_bytes: int = _HELD_BYTES):
        """Read them now if they take at most `held_bytes`."""
        self._populations, self._unit = populations, unit
        self._held: np.ndarray | None = None
        selected = np.flatnonzero(populations.cell_population >= 0)
        if 4 * len(selected) * len(populations.genes) <= held_bytes:
            self._place = np.full(len(populations.cell_population), -1)
            self._place[selected] = np.arange(len(selected))
            parts = [
                self._read(selected[start : start + _CHUNK]) for start in range(0, len(selected), _CHUNK)
            ]
            self._held = np.concatenate(parts)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """(...) positions to float32 cells (..., G)."""
        flat = positions.reshape(-1)
        if self._held is not None:
            cells = self._held[self._place[flat]]
        else:
            unique, inverse = np.unique(flat, return_inverse=True)
            cells = self._read(unique)[inverse]
        return cells.reshape(*positions.shape, -1)

    def _read(self, positions: np.ndarray) -> np.ndarray:
        library = self._populations.library_size
        rows = natural_rows(
            self._populations.read_cells(positions),
            self._populations.keys.scale,
            None if library is None else library[positions],
        )
        return self._unit.to_model(rows if isinstance(rows, np.ndarray) else rows.toarray())


class Partners:
    """Which cells stand beside those of a (context, batch): its controls, or those closest in kind."""

    def __init__(self, populations: Populations):
        """Note where the controls are."""
        labels = populations.labels
        control = labels["is_control"].to_numpy(dtype=bool)
        self._cells: dict[tuple[str, str], np.ndarray] = {}
        for name, row in labels[control].iterrows():
            self._cells[row["context"], row["batch"]] = populations.cells_of(str(name))

    def pools(self, context: str, batch: str) -> list[np.ndarray]:
        """Pools of which one is taken at random (published rule).

        The controls of the (context, batch); without any, those of other contexts of the batch; without any, those
        of the context in other batches.

        Raises:
            DataError: if there are none of these either.
        """
        if (context, batch) in self._cells:
            return [self._cells[context, batch]]
        for i, wanted in ((1, batch), (0, context)):
            if found := [cells for key, cells in self._cells.items() if key[i] == wanted]:
                return found
        have = listing(f"{c} | {b}" for c, b in self._cells)
        raise DataError(f"context = {context!r}, batch = {batch!r}: no controls of either; there are {have}")

    def draw(self, rng: np.random.Generator, context: str, batch: str, number: int) -> np.ndarray:
        """Positions (number,) drawn with replacement."""
        pools = self.pools(context, batch)
        return rng.choice(pools[rng.integers(len(pools)) if len(pools) > 1 else 0], number)


@dataclass(frozen=True, eq=False)
class CellSets:
    """The stream. `with_controls` is false in marginal pretraining, whose controls are zero; `u` (P, K) or None."""

    populations: Populations
    vocabulary: Vocabulary
    unit: Expression
    set_size: int
    sets_per_step: int
    seed: int
    with_controls: bool = True
    source: int | None = None
    u: np.ndarray | None = None

    def __post_init__(self) -> None:
        """Refuse populations that do not fill a step, or have no controls at all, before anything is computed."""
        if not self.steps_per_epoch:
            raise DataError(
                f"cells_per_batch = {self.sets_per_step * self.set_size}: a step takes {self.sets_per_step} sets of "
                f"{self.set_size} cells, the training populations fill {self._num_sets}; take fewer or smaller sets"
            )
        if self.with_controls:
            for context, batch in zip(self._labels["context"], self._labels["batch"], strict=True):
                self._partners.pools(context, batch)

    @property
    def _labels(self) -> pd.DataFrame:
        return self.populations.labels

    @cached_property
    def _members(self) -> list[np.ndarray]:
        order = np.argsort(self.populations.cell_population, kind="stable")
        edges = np.searchsorted(self.populations.cell_population[order], np.arange(len(self._labels) + 1))
        return [order[a:b] for a, b in itertools.pairwise(edges)]

    @cached_property
    def _partners(self) -> Partners:
        return Partners(self.populations)

    @cached_property
    def _cells(self) -> Cells:
        return Cells(self.populations, self.unit)

    @cached_property
    def _ids(self) -> np.ndarray:
        return self.vocabulary.ids(self._labels)

    @property
    def _num_sets(self) -> int:
        return sum(-(-len(cells) // self.set_size) for cells in self._members)

    @property
    def steps_per_epoch(self) -> int:
        """Full steps in one pass over the cells."""
        return self._num_sets // self.sets_per_step

    @lru_cache(maxsize=1)  # noqa: B019 - one epoch at a time, and the stream lives as long as its training
    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Sets of one epoch in their order: row of labels (N,), positions (N, S)."""
        rng = np.random.default_rng([self.seed, epoch])
        rows, sets = [], []
        for row, members in enumerate(self._members):
            cells = rng.permutation(members)
            fill = rng.choice(members, -len(cells) % self.set_size)
            found = np.concatenate([cells, fill]).reshape(-1, self.set_size)
            sets.append(found)
            rows += [row] * len(found)
        order = rng.permutation(len(rows))
        return np.array(rows)[order], np.concatenate(sets)[order]

    def step(self, number: int) -> Batch:
        """The batch of optimiser step `number` = 0, 1, ..., as NumPy arrays; ids (B, 1), shared by the cells of a set."""
        epoch, place = divmod(number, self.steps_per_epoch)
        rows, sets = (
            values[place * self.sets_per_step : (place + 1) * self.sets_per_step]
            for values in self._epoch(epoch)
        )
        if self.with_controls:
            rng = np.random.default_rng([self.seed, epoch, place + 1])
            keys = zip(self._labels["context"].iloc[rows], self._labels["batch"].iloc[rows], strict=True)
            control = self._cells(np.stack([self._partners.draw(rng, *key, self.set_size) for key in keys]))
        x0 = self._cells(sets)
        perturbation, context, batch = (self._ids[rows, j, None] for j in range(3))
        return Batch(
            x0,
            control if self.with_controls else np.zeros_like(x0),
            perturbation,
            context,
            batch,
            None if self.source is None else np.full(len(rows), self.source, np.int32),
            None if self.u is None else self.u[rows].astype(np.float32),
        )
