import numpy as np
import pytest

from hilbertcell.analyses.conformal import LEVEL, conformal_summary, residual, widening


@pytest.fixture
def rng():
    return np.random.default_rng(8)


def test_the_factor_by_hand():
    batches = [np.array([1.0, 3.0]), np.array([2.0]), np.array([4.0]), np.array([5.0])]
    # masses 0.1, 0.1 (half a fifth each), 0.2, 0.2, 0.2, and 0.2 at infinity: 1, 2, 3, 4, 5 reach 0.1, 0.3, 0.4, 0.6, 0.8
    assert widening(batches, 40) == 3.0
    assert widening(batches, 41) == 4.0
    assert widening(batches, 80) == 5.0
    assert widening(batches, 81) == np.inf  # four batches promise nothing above four fifths
    assert widening([], 50) == np.inf
    assert widening([np.array([2.0, np.nan]), np.array([np.nan])], 50) == 2.0


def test_residuals_are_in_half_widths():
    np.testing.assert_allclose(
        residual(np.array([0.0, 0.0, 1.0]), np.array([2.0, 4.0, 1.0]), np.array([2.0, 1.0, 1.0])), [1, 0.5, 0]
    )
    assert residual(np.array(1.0), np.array(1.0), np.array(2.0)) == np.inf


@pytest.mark.parametrize("claimed", [0.3, 1.0, 3.0])
def test_a_new_batch_is_covered_whatever_the_model_claims(rng, claimed):
    """Batches with effects of their own: 5 to calibrate, one to predict, as in a screen of six donors."""
    covers, factors = [], []
    for _ in range(400):
        sizes = rng.integers(3, 40, size=6)
        truth = [rng.normal() + 0.5 * rng.normal(size=size) for size in sizes]
        half = claimed * 1.2816  # central 80 % of N(0, claimed^2)
        scores = [residual(np.full(t.size, -half), np.full(t.size, half), t) for t in truth]
        factor = widening(scores[:-1])
        factors.append(factor)
        covers.append(np.mean(scores[-1] <= factor))
    error = np.std(covers) / np.sqrt(len(covers))
    assert np.mean(covers) > LEVEL / 100 - 3 * error
    if claimed == 0.3:
        assert np.median(factors) > 2.0  # narrow claims are widened
    if claimed == 3.0:
        assert np.median(factors) < 1.0  # wide ones are narrowed


def test_the_summary_lets_other_batches_calibrate_each(rng):
    batch = np.repeat([f"d{i}" for i in range(6)], 4)
    scores = np.abs(rng.normal(size=(24, 10)))
    scores[batch == "d0"] *= 10  # one bad batch: it must not calibrate itself
    width = np.full(24, 2.0)
    summary = conformal_summary(scores, width, batch)
    factors = []
    for name in np.unique(batch):
        factors.append(widening([scores[batch == b] for b in np.unique(batch) if b != name]))
    assert summary["factor"] == pytest.approx(np.mean(factors))
    assert summary["width"] == pytest.approx(2 * np.mean(factors))
    few = conformal_summary(scores[:12], width[:12], batch[:12])
    assert np.isnan(few["factor"])  # three batches: two to calibrate, too few for 80 %
    scores[:, 0] = np.inf  # a tenth of the intervals has no width
    scores[:, 1] = np.inf
    assert np.isnan(conformal_summary(scores, width, batch)["factor"])
