"""Per-feature transport of continuous cells: exact means and spreads, ranks and zeros kept."""

import numpy as np
import pytest

from hilbertcell.models.continuous_transport import MAX_FOLD, transport_continuous, transport_nonnegative


@pytest.fixture
def cells():
    rng = np.random.default_rng(0)
    return rng.normal(size=(50, 3)) @ rng.normal(size=(3, 3)) + 100.0  # far from the targets, correlated


def test_means_and_spreads_are_met_exactly(cells):
    target, ratio = np.array([-100.0, 0.0, 5.0]), np.log([0.5, 1.0, 3.0])
    moved = transport_continuous(cells, target, ratio)
    np.testing.assert_allclose(moved.mean(0), target, atol=1e-12)
    np.testing.assert_allclose(moved.std(0), cells.std(0) * np.exp(ratio))


def test_ranks_and_correlations_stay(cells):
    moved = transport_continuous(cells, np.zeros(3), np.array([-0.7, 0.0, 0.4]))
    np.testing.assert_array_equal(moved.argsort(0), cells.argsort(0))
    np.testing.assert_allclose(np.corrcoef(moved.T), np.corrcoef(cells.T))


def test_nothing_to_do_changes_no_bit(cells):
    np.testing.assert_array_equal(transport_continuous(cells, cells.mean(0), np.zeros(3)), cells)


def test_dtype_of_the_file_is_kept_and_integers_become_floats(cells):
    assert transport_continuous(cells.astype(np.float32), np.zeros(3), np.zeros(3)).dtype == np.float32
    assert transport_continuous(cells.astype(int), np.zeros(3), np.zeros(3)).dtype == np.float64


def test_one_cell_becomes_the_target():
    np.testing.assert_allclose(
        transport_continuous(np.ones((1, 2)), np.array([3.0, 4.0]), np.zeros(2)), [[3, 4]]
    )


def test_non_negative_cells_keep_zeros_up_to_max_fold():
    x = np.array([[0.0, 0.0, 1.0, 0.0], [2.0, 1.0, 3.0, 0.0]])
    target = np.array([0.5, MAX_FOLD * 0.5 + 1, -1.0, 0.2])
    moved = transport_nonnegative(x, target)
    np.testing.assert_allclose(moved.mean(0), np.maximum(target, 0))
    np.testing.assert_array_equal(moved[:, 0], [0.0, 1.0])
    np.testing.assert_array_equal(
        moved[:, 1], [1.0, 1.0 + MAX_FOLD]
    )  # what four times as much lacks, for all cells
    np.testing.assert_array_equal(moved[:, 3], [0.2, 0.2])
    assert moved.min() >= 0


@pytest.mark.parametrize(
    "transport", [lambda x, m: transport_continuous(x, m, np.zeros(3)), transport_nonnegative]
)
def test_bad_shapes_are_named(transport):
    with pytest.raises(ValueError, match=r"got \(2, 4\) and \(3,\)"):
        transport(np.zeros((2, 4)), np.zeros(3))
    with pytest.raises(ValueError, match=r"n > 0.*got \(0, 3\)"):
        transport(np.zeros((0, 3)), np.zeros(3))


def test_negative_values_are_refused_where_there_are_none():
    with pytest.raises(ValueError, match="minimum is -1"):
        transport_nonnegative(np.array([[-1.0]]), np.ones(1))
