import numpy as np
import pytest
from scipy.spatial.distance import cdist

from hilbertcell.analyses import metrics
from hilbertcell.analyses.metrics import (
    energy_distance,
    mae_delta,
    mse_delta,
    pearson_delta,
    within_variance_ratio,
)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def test_deltas_against_their_definitions(rng):
    prediction, truth, control = rng.normal(size=(3, 50)) + np.array([[0.0], [1.0], [100.0]])
    expected = np.corrcoef(prediction - control, truth - control)[0, 1]
    np.testing.assert_allclose(pearson_delta(prediction, truth, control), expected, rtol=1e-10)
    np.testing.assert_allclose(mae_delta(prediction, truth), np.abs(prediction - truth).mean())
    np.testing.assert_allclose(mse_delta(prediction, truth), ((prediction - truth) ** 2).mean())


def test_halved_and_doubled_effects_move_errors_and_not_the_correlation(rng):
    control = rng.normal(size=200)
    shift = rng.normal(size=200)
    truth = control + shift
    for factor in (0.5, 2.0):
        prediction = control + factor * shift
        assert pearson_delta(prediction, truth, control) == pytest.approx(1.0)
        assert mae_delta(prediction, truth) == pytest.approx(abs(factor - 1) * np.abs(shift).mean())


def test_no_change_has_no_correlation(rng):
    control = rng.normal(size=10)
    assert np.isnan(pearson_delta(control, control + 1 + rng.normal(size=10), control))


@pytest.mark.parametrize("block", [7, 1024])
def test_energy_distance_equals_its_definition_whatever_the_block(rng, block, monkeypatch):
    monkeypatch.setattr(metrics, "BLOCK", block)
    x, y = 50 + rng.normal(size=(23, 4)), 51 + 2 * rng.normal(size=(31, 4))
    inner = [cdist(z, z).sum() / (len(z) * (len(z) - 1)) for z in (x, y)]
    np.testing.assert_allclose(energy_distance(x, y), 2 * cdist(x, y).mean() - sum(inner), rtol=1e-7)
    assert energy_distance(x, y) == pytest.approx(energy_distance(rng.permutation(x), y), rel=1e-9)


def test_energy_distance_does_not_reward_more_cells(rng):
    def repeated(num_cells, shift):
        return np.array(
            [
                energy_distance(rng.normal(size=(num_cells, 3)) + shift, rng.normal(size=(40, 3)))
                for _ in range(200)
            ]
        )

    for shift in (0.0, 0.5):
        few, many = repeated(20, shift), repeated(160, shift)
        error = np.hypot(few.std(), many.std()) / np.sqrt(len(few))
        assert abs(few.mean() - many.mean()) < 4 * error
    assert abs(repeated(20, 0.0).mean()) < 0.05  # the truth against itself with fresh cells


def test_within_variance_ratio_sees_shrunken_cells_and_not_the_mean(rng):
    truth = rng.normal(size=(4000, 5)) * np.array([1, 2, 3, 1, 1])
    shrunken = truth.mean(0) + 0.5 * (truth - truth.mean(0)) + 10
    assert within_variance_ratio(shrunken, truth) == pytest.approx(0.25)
    fresh = rng.normal(size=(500, 5)) * np.array([1, 2, 3, 1, 1])
    assert within_variance_ratio(fresh, truth) == pytest.approx(1.0, abs=0.15)


def test_one_cell_is_refused():
    with pytest.raises(ValueError, match="got 1 and 5"):
        energy_distance(np.zeros((1, 2)), np.zeros((5, 2)))
