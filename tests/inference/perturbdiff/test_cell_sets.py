"""The data stream: what a set is made of, who stands beside whom, and that a step depends on its number alone."""

import numpy as np
import pytest

from hilbertcell.data.validation import DataError
from hilbertcell.inference.perturbdiff.cell_sets import Cells, CellSets, Expression, Partners, expression_of
from hilbertcell.inference.perturbdiff.vocabulary import Vocabulary, condition_labels


def stream(populations, set_size=4, sets_per_step=3, seed=0, **options) -> CellSets:
    vocabulary = Vocabulary.of(populations.labels, perturbations=True, batches=True)
    return CellSets(
        populations, vocabulary, expression_of(populations), set_size, sets_per_step, seed, **options
    )


def rows_of(populations, cells):
    """Positions of model-unit cells (n, G) among all cells, by value (the screen's cells are distinct)."""
    every = Cells(populations, expression_of(populations))(np.arange(len(populations.cell_names)))
    return np.array([np.flatnonzero((every == cell).all(axis=1))[0] for cell in cells])


def test_model_units_are_a_tenth_of_log1p(screen):
    sets = stream(screen)
    counts = screen.read_cells(np.arange(3))
    natural = np.log1p(1e4 * np.asarray(counts, float) / np.asarray(counts, float).sum(1, keepdims=True))
    np.testing.assert_allclose(Cells(screen, sets.unit)(np.arange(3)), natural / 10, rtol=1e-6)
    np.testing.assert_allclose(sets.unit.to_natural(sets.unit.to_model(natural)), natural, rtol=1e-6)


def test_other_scales_start_at_zero(make):
    populations = make({"scale": "other"}, seed=3)
    unit = expression_of(populations)
    cells = Cells(populations, unit)(np.arange(populations.num_cells))
    np.testing.assert_allclose(cells.min(axis=0), 0, atol=1e-7)
    assert unit.lowest.shape == (8,)


def test_an_epoch_shows_every_cell_and_fills_from_the_population(screen):
    sets = stream(screen, sets_per_step=1)
    rows, found = sets._epoch(0)
    labels = screen.labels
    for row in range(len(labels)):
        own = found[rows == row]
        members = screen.cells_of(labels.index[row])
        assert own.shape == (4, 4)  # 14 cells in sets of 4
        np.testing.assert_array_equal(np.unique(own), members)
    assert (np.sort(found, axis=None) != np.sort(sets._epoch(1)[1], axis=None)).any()  # other fillers
    assert len(set(map(tuple, found)) & set(map(tuple, sets._epoch(1)[1]))) <= 2


def test_ids_and_partners_belong_to_the_set(screen):
    sets = stream(screen)
    context, batch = (sorted(screen.labels[name].unique()) for name in ("context", "batch"))
    for number in range(sets.steps_per_epoch):
        made = sets.step(number)
        for i in range(3):
            target, partner = (rows_of(screen, cells[i]) for cells in (made.x0, made.control))
            own = screen.labels.iloc[screen.cell_population[target]]
            beside = screen.labels.iloc[screen.cell_population[partner]]
            assert own.index.nunique() == 1
            assert beside["is_control"].all()
            assert (beside["context"] == own["context"].iloc[0]).all()
            assert (beside["batch"] == own["batch"].iloc[0]).all()
            assert made.perturbation[i, 0] == ["A", "B", "PBS"].index(condition_labels(own)[0])
            assert context[made.cell_type[i, 0]] == own["context"].iloc[0]
            assert batch[made.batch[i, 0]] == own["batch"].iloc[0]


def test_a_step_depends_on_its_number_and_the_seed(screen):
    first, second = stream(screen), stream(screen)
    for number in (0, 1, 40, 41, 40):
        for a, b in zip(first.step(number)[:5], second.step(number)[:5], strict=True):
            np.testing.assert_array_equal(a, b)
    assert (first.step(0).x0 != stream(screen, seed=1).step(0).x0).any()
    assert (first.step(0).control != first.step(first.steps_per_epoch).control).any()


def test_cells_read_when_needed_are_the_same(screen):
    unit, positions = Expression(np.zeros(8)), np.array([[3, 3, 200], [0, 9, 1]])
    held, read = Cells(screen, unit), Cells(screen, unit, held_bytes=0)
    np.testing.assert_array_equal(held(positions), read(positions))
    assert held(positions).shape == (2, 3, 8)


def test_partners_where_there_are_no_controls(screen):
    labels = screen.labels
    gone = labels["is_control"] & (labels["context"] == "B") & (labels["batch"] == "Donor1")
    partners = Partners(screen.select((~gone).to_numpy()))
    assert [set(p) for p in partners.pools("B", "Donor1")] == [set(screen.cells_of("T | PBS | Donor1"))]
    gone = labels["is_control"] & (labels["batch"] == "Donor1")
    partners = Partners(screen.select((~gone).to_numpy()))
    assert len(partners.pools("B", "Donor1")) == 2  # those of B in the two other donors
    with pytest.raises(DataError, match=r"no controls of either; there are 'B \| Donor2'"):
        partners.pools("NK", "Donor1")


def test_too_few_cells_for_a_step(screen):
    with pytest.raises(
        DataError, match=r"a step takes 200 sets of 4 cells, the training populations fill 72"
    ):
        stream(screen, sets_per_step=200)


def test_controls_are_zero_in_pretraining(screen):
    assert not stream(screen, with_controls=False).step(0).control.any()


def test_unknown_labels_are_all_named(screen):
    vocabulary = Vocabulary({"A": 0, "PBS": 1}, {"B": 0}, {"pbmc_Donor1": 0, "pbmc_Donor2": 1}, "pbmc_")
    with pytest.raises(DataError) as error:
        vocabulary.ids(screen.labels)
    for line in ("perturbation = 'B'", "context = 'T'", "batch = 'pbmc_Donor3'", "batch_covariate = false"):
        assert line in str(error.value)
