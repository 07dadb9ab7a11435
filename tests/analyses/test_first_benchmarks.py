import numpy as np
import pandas as pd
import pytest

from hilbertcell.analyses.benchmark import fit_fold, law_fold
from hilbertcell.analyses.first_benchmarks import (
    bodenmiller,
    cell_markdown,
    cell_targets,
    few_shot_fold,
    kang,
    law_markdown,
    law_targets,
)
from hilbertcell.analyses.predictors import Predictor, Screen, baseline_fitters
from hilbertcell.data.splits import leave_one_batch_out


@pytest.fixture(scope="module")
def cytometry(data_dir):
    return bodenmiller(data_dir)


def test_the_design_table_of_the_cytometry_donors_is_reproduced(cytometry):
    """Excess squared error, CRPS and cover measured before the project began, within their Monte Carlo error.

    The variance of cells divided by n - 1 (here) and by n (there) differ by 0.0003 in the excess.
    """
    populations, unit = cytometry
    rows = {
        "training means": (0.0620, 0.1392, 0.824),
        "null": (0.0542, 0.1323, 0.849),
        "own-baseline slope": (0.0388, 0.1161, 0.858),
    }
    fitters = {name: baseline_fitters(1000)[name] for name in rows}
    summary = law_targets(populations, unit, fitters, shuffled="own-baseline slope")["plain"]
    assert summary["num_targets"] == 30
    for name, (excess, crps, cover) in rows.items():
        mean = summary["models"][name]["mean"]
        assert mean["excess"] == pytest.approx(excess, abs=0.0008)
        assert mean["crps"] == pytest.approx(crps, abs=0.0008)
        assert mean["covered_90"] == pytest.approx(cover, abs=0.015)
    slope = summary["models"]["own-baseline slope"]["relative_to_null"]
    assert slope["excess"]["ratio"] == pytest.approx(0.72, abs=0.01)
    assert slope["crps"]["ratio"] == pytest.approx(0.877, abs=0.01)
    assert slope["crps"]["upper_90"] < 1
    # the wrong donor's controls bring nothing
    shuffled = summary["models"]["own-baseline slope, batch labels shuffled"]["relative_to_null"]
    assert shuffled["crps"]["ratio"] > 0.98
    assert shuffled["excess"]["ratio"] > 0.98
    text = law_markdown(summary)
    assert "| own-baseline slope | 0.03" in text
    assert text.count("patient6") >= 2


def test_few_shot_gives_the_cells_of_one_context_and_scores_the_others(cytometry):
    populations, unit = cytometry
    screen = Screen(populations)
    split = leave_one_batch_out(populations.labels)[1]  # patient2 has 16 stimulated B cells
    seen = []

    def law(given, targets, seed):
        labels = given.populations.labels
        told = labels[~labels["is_control"]]
        seen.append((told.index[0], int(told["num_cells"].iloc[0]), tuple(targets["context"]), seed))
        assert set(labels["batch"]) == {"patient2"}
        return np.zeros((5, len(targets), 24)) + np.arange(5)[:, None, None]

    scores = few_shot_fold(screen, split, Predictor(law=law), unit, 2)
    assert len(seen) == 10
    assert {number for _, number, _, _ in seen} == {16, 20}
    for name, _, contexts, _ in seen:
        assert len(contexts) == 4
        assert name.split(" | ")[0] not in contexts
    assert scores.targets.index.tolist() == list(split.held_out)
    assert scores.pit.shape == (5, 4 * 2 * 24)


def test_few_shot_of_a_model_that_ignores_the_cells_equals_its_plain_score(cytometry):
    populations, unit = cytometry
    screen = Screen(populations)
    split = leave_one_batch_out(populations.labels)[0]
    predictor = fit_fold(screen, split, baseline_fitters(8000)["null"])
    few = few_shot_fold(screen, split, predictor, unit, 1).targets
    plain = law_fold(screen, split, {"null": predictor}, unit, 0)[0]["null"].targets
    pd.testing.assert_series_equal(few["excess"], plain["excess"], atol=0.003, rtol=0)
    pd.testing.assert_series_equal(few["crps"], plain["crps"], rtol=0.05)


def test_the_cells_of_kang_are_compared_in_units_of_enough_cells(data_dir):
    fitters = {name: baseline_fitters(10)[name] for name in ("no change", "training cells")}
    summary = cell_targets(kang(data_dir), fitters, num_splits=1)
    assert summary["num_units"] == 23
    real = summary["models"]["training cells"]["mean"]
    # The peers' table (other donors): energy distance 0.53, precision 0.53, 957 genes called for 743, ratio 0.99
    assert 0.3 < real["energy_distance"] < 0.7
    assert 0.45 < real["precision_at_N"] < 0.7
    assert 0.9 < real["called_ratio"] < 1.4
    assert 0.9 < real["within_variance_ratio"] < 1.1
    nothing = summary["models"]["no change"]["mean"]
    assert nothing["energy_distance"] > 5 * real["energy_distance"]
    assert nothing["called_ratio"] < 0.05
    assert "| training cells | 0.8" in cell_markdown(summary)
