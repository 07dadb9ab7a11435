"""Combinations are structure: their parts, their design, their summed features."""

import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.perturbations import perturbation_table, split_combination
from hilbertcell.data.validation import DataError

FEATURES = pd.DataFrame({"f": [1.0, 20.0, 300.0], "g": [0.5, 0.0, -1.0]}, index=["A", "B", "C"])


def test_parts_of_a_label():
    assert split_combination("A") == ("A",)
    assert split_combination("B + A+C") == ("B", "A", "C")
    for label in ("A+", "+", "", "A+A"):
        with pytest.raises(DataError, match="perturbation = "):
            split_combination(label)


def test_design_marks_the_parts():
    table = perturbation_table(["B", "A+C", "A"], "control")
    assert table.singles == ("A", "B", "C")
    assert table.components == (("B",), ("A", "C"), ("A",))
    np.testing.assert_array_equal(table.design, [[0, 1, 0], [1, 0, 1], [1, 0, 0]])
    assert table.features is None
    assert table.known.all()


def test_features_of_a_combination_are_summed():
    table = perturbation_table(["C", "B+A"], "control", features=FEATURES)
    np.testing.assert_array_equal(table.features, [[300, -1], [21, 0.5]])


def test_an_unknown_part_needs_features():
    with pytest.raises(DataError, match=r"'C': unknown and without features .*'A', 'B'"):
        perturbation_table(["A+C"], "control", singles=("A", "B"))
    table = perturbation_table(["A+C", "B"], "control", singles=("A", "B"), features=FEATURES)
    np.testing.assert_array_equal(table.design, [[1, 0], [0, 1]])
    np.testing.assert_array_equal(table.known, [False, True])
    np.testing.assert_array_equal(table.features, [[301, -0.5], [20, 0]])
    with pytest.raises(DataError, match="no features for 'D'"):
        perturbation_table(["A", "D"], "control", features=FEATURES)


def test_controls_have_no_row():
    with pytest.raises(DataError, match="control = 'B'"):
        perturbation_table(["A+B"], "B")


def test_no_perturbations_at_all():
    table = perturbation_table([], "control", features=FEATURES)
    assert table.design.shape == (0, 0)
    assert table.features.shape == (0, 2)
