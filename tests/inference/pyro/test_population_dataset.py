"""A data loader over populations returns every cell once, the same ones whatever the workers and the order."""

import importlib
from types import ModuleType

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from hilbertcell.data.anndata_io import read_populations

KEYS = {"perturbation": "drug", "control": "DMSO", "context": "tissue", "batch": "donor"}
SIZES = {("DMSO", "d0"): 7, ("A", "d0"): 3, ("DMSO", "d1"): 5, ("A", "d1"): 1}


@pytest.fixture
def twin(torch) -> ModuleType:
    """The module under test."""
    return importlib.import_module("hilbertcell.inference.pyro.population_dataset")


def counts(shuffled: int | None = None) -> anndata.AnnData:
    """Counts of 4 genes in populations of unequal size; rows in another order if `shuffled`."""
    rows = [(drug, "liver", donor) for (drug, donor), size in SIZES.items() for _ in range(size)]
    names = [f"cell{i}" for i in range(len(rows))]
    obs = pd.DataFrame(rows, columns=["drug", "tissue", "donor"], index=names)
    x = sp.csr_matrix(1 + np.random.default_rng(0).poisson(3.0, (len(rows), 4)).astype(np.float32))
    screen = anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(4)]))
    if shuffled is None:
        return screen
    return screen[np.random.default_rng(shuffled).permutation(len(rows))].copy()


def test_items_are_the_populations_of_the_labels_on_the_natural_scale(twin):
    screen = counts()
    populations = read_populations(screen, **KEYS)
    dataset = twin.PopulationDataset(populations)
    assert len(dataset) == 4
    library = screen.X.sum(1)
    natural = pd.DataFrame(np.log1p(1e4 * screen.X.toarray() / np.asarray(library)), index=screen.obs_names)
    for row, (population, cells) in enumerate(dataset):  # ends at an IndexError
        assert population == row
        label = populations.labels.iloc[row]
        mine = (screen.obs["drug"] == label["perturbation"]) & (screen.obs["donor"] == label["batch"])
        expected = natural[mine.to_numpy()].sort_index().to_numpy(np.float32)
        np.testing.assert_array_equal(cells, expected)
    assert row == 3
    last = dataset[-1]
    assert last.population == 3
    assert last.cells.shape[0] == populations.labels["num_cells"].iloc[3]


def test_cells_do_not_depend_on_the_order_of_the_file(torch, twin):
    one, other = (twin.PopulationDataset(read_populations(counts(s), **KEYS)) for s in (None, 1))
    assert all(torch.equal(one[i].cells, other[i].cells) for i in range(4))


def test_a_batch_says_whose_each_cell_is(torch, twin):
    dataset = twin.PopulationDataset(read_populations(counts(), **KEYS))
    batch = twin.collate([dataset[2], dataset[0]])
    assert batch.population.tolist() == [2, 0]
    assert batch.num_cells.tolist() == [len(dataset[2].cells), len(dataset[0].cells)]
    for member, row in enumerate((2, 0)):
        assert torch.equal(batch.cells[batch.member == member], dataset[row].cells)


def test_workers_and_shuffling_change_no_population(torch, twin, tmp_path):
    """Workers are spawned and open the file themselves; with a fixed generator they return the same batches."""
    counts().write_h5ad(tmp_path / "screen.h5ad")
    dataset = twin.PopulationDataset(read_populations(tmp_path / "screen.h5ad", **KEYS))

    def batches(**options):
        generator = torch.Generator().manual_seed(0)
        loader = torch.utils.data.DataLoader(
            dataset, batch_size=3, shuffle=True, generator=generator, collate_fn=twin.collate, **options
        )
        return list(loader)

    alone, shared = batches(), batches(num_workers=2, multiprocessing_context="spawn")
    assert [len(batch.population) for batch in alone] == [3, 1]
    for one, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    order = torch.cat([batch.population for batch in alone])
    assert order.tolist() != [0, 1, 2, 3]
    assert sorted(order.tolist()) == [0, 1, 2, 3]
