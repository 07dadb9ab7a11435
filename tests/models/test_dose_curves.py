"""Curves over dose: what is near is alike, what is far or of another perturbation is not."""

import numpy as np
import pytest

from hilbertcell.models.dose_curves import dose_curve


def moments(curve, known):
    """Mean and covariance (N,), (N, N) of the new levels."""
    return curve.weights @ known, curve.chol @ curve.chol.T


def test_is_the_conditional_of_the_joint_gaussian():
    levels = [("A", 1.0), ("A", 10.0), ("B", 3.0), ("A", 3.0), ("B", 30.0)]
    log_dose = np.log10([dose for _, dose in levels])
    joint = 0.99 * np.exp(-0.5 * (log_dose[:, None] - log_dose) ** 2) + 0.01 * np.eye(5)
    of_a = np.array([True, True, False, True, False])
    joint *= of_a[:, None] == of_a
    known = np.array([1.5, 0.4, 2.0])
    mean, covariance = moments(dose_curve(levels, 3), known)
    gain = joint[3:, :3] @ np.linalg.inv(joint[:3, :3])
    np.testing.assert_allclose(mean, gain @ known, rtol=1e-12)
    np.testing.assert_allclose(covariance, joint[3:, 3:] - gain @ joint[:3, 3:], rtol=1e-12, atol=1e-14)


def test_a_dose_between_two_others_lies_between_them():
    curve = dose_curve([("A", 1.0), ("A", 10.0), ("A", 3.0)], 2)
    mean, covariance = moments(curve, np.array([1.0, 2.0]))
    assert 1.4 < mean[0] < 1.7
    assert covariance[0, 0] < 0.1


@pytest.mark.parametrize("new", [("B", 1.0), ("A", 1e6), ("A", -1.0)])
def test_another_perturbation_a_far_dose_and_no_dose_follow_the_prior(new):
    mean, covariance = moments(dose_curve([("A", 1.0), ("A", 10.0), new], 2), np.array([5.0, 5.0]))
    assert abs(mean[0]) < 1e-4
    assert covariance[0, 0] == pytest.approx(1.0, abs=1e-6)


def test_known_levels_are_kept_as_they_are():
    known = np.array([0.25, 0.5])
    every = dose_curve([("A", 1.0), ("A", 10.0), ("A", 2.0)], 2).extend(known, np.zeros(1))
    np.testing.assert_array_equal(every[:2], known)
