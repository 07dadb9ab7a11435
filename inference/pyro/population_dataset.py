"""Populations for torch's `DataLoader`: an item is a population, a batch is several of unequal size.

    loader = DataLoader(PopulationDataset(populations), batch_size=8, shuffle=True, collate_fn=collate)

JAX's threads do not survive a fork: with `num_workers`, in a process that also runs JAX, give the loader
`multiprocessing_context="spawn"`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from hilbertcell.data.populations import Populations, natural_scale


class PopulationCells(NamedTuple):
    """One population."""

    population: int  # its row of `populations.labels`
    cells: Tensor  # (n, G) float32, natural scale


class PopulationBatch(NamedTuple):
    """B populations, their cells below each other."""

    population: Tensor  # (B,) int64, rows of `populations.labels`
    num_cells: Tensor  # (B,) int64
    cells: Tensor  # (N, G) float32, N the sum of num_cells
    member: Tensor  # (N,) int64, which of the B a cell belongs to


class PopulationDataset(Dataset[PopulationCells]):
    """Item i is row i of `populations.labels` with all its cells, sorted by name whatever the order of the file.

    Counts come as log1p(1e4 count / library size), other scales as they are. Cells are read when asked for, by the worker that
    is asked: populations that lie in memory are copied to each worker, those of a file are not.
    """

    def __init__(self, populations: Populations) -> None:
        """Hold `populations`; `select` those wanted before."""
        self.populations = populations

    def __len__(self) -> int:
        """P."""
        return len(self.populations.labels)

    def __getitem__(self, index: int) -> PopulationCells:
        """Read one population. Raises: IndexError; DataError if its cells cannot be read."""
        row = range(len(self))[index]
        populations = self.populations
        positions = populations.cells_of(populations.labels.index[row])
        positions = positions[np.argsort(populations.cell_names[positions])]
        library_size = populations.library_size
        cells = natural_scale(
            populations.read_cells(positions),
            populations.keys.scale,
            None if library_size is None else library_size[positions],
        )
        return PopulationCells(row, torch.from_numpy(cells.astype(np.float32)))


def collate(items: Sequence[PopulationCells]) -> PopulationBatch:
    """Stack populations of unequal size; nothing is padded, repeated or left out."""
    num_cells = torch.tensor([len(item.cells) for item in items])
    return PopulationBatch(
        torch.tensor([item.population for item in items]),
        num_cells,
        torch.cat([item.cells for item in items]),
        torch.repeat_interleave(torch.arange(len(items)), num_cells),
    )
