"""Parity with cell-eval, from numbers that it gave once: see `tests/fixtures/cell_eval.json` for its version.

The fixture holds 24 cells x 30 genes of a control and six perturbations, true and predicted (log1p counts), and what
cell-eval says about them, given one table of DE tests (Mann-Whitney, Benjamini-Hochberg) for both sides.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from hilbertcell.analyses.differential_expression import de_summary
from hilbertcell.analyses.discrimination import count_spearman, discrimination
from hilbertcell.analyses.metrics import mae_delta, mse_delta, pearson_delta

FOLDER = Path(__file__).parent.parent / "fixtures"
WANTED = json.loads((FOLDER / "cell_eval.json").read_text())
NAMES = WANTED["perturbations"]


@pytest.fixture(scope="module")
def cells():
    with np.load(FOLDER / "cell_eval.npz") as arrays:
        return {name: arrays[name].astype(np.float64) for name in ("control", "real", "predicted")}


def wanted(metric):
    return np.array([WANTED["metrics"][metric].get(name, np.nan) for name in NAMES], dtype=float)


def test_point_metrics(cells):
    control, true, predicted = (cells[name].mean(-2) for name in ("control", "real", "predicted"))
    found = [pearson_delta(p, t, control) for p, t in zip(predicted, true, strict=True)]
    np.testing.assert_allclose(found, wanted("pearson"), rtol=1e-6)
    for metric, name in ((mae_delta, "mae"), (mse_delta, "mse")):
        found = [metric(p, t) for p, t in zip(predicted, true, strict=True)]
        np.testing.assert_allclose(found, wanted(name), rtol=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2", "cosine"])
def test_discrimination(cells, norm):
    true, predicted = (cells[name].mean(-2) - cells["control"].mean(0) for name in ("real", "predicted"))
    found = discrimination(predicted, true, WANTED["genes"], NAMES, norm)
    np.testing.assert_allclose(found, wanted(f"discrimination_{norm}"), atol=1e-6)
    assert np.ptp(found) > 0.1  # or ranks could not be wrong
    if norm == "l1":  # the target gene counts: without leaving it out other ranks come out of these data
        assert not np.allclose(
            discrimination(predicted, true, WANTED["genes"], ["-"] * len(NAMES), norm), found
        )


def test_differential_expression(cells):
    found = [
        de_summary(p, t, cells["control"]) for p, t in zip(cells["predicted"], cells["real"], strict=True)
    ]
    for metric in ("overlap_at_N", "precision_at_N", "direction_match", "lfc_spearman", "auroc", "auprc"):
        own = np.array([row[metric] for row in found])
        np.testing.assert_allclose(own, wanted(metric), atol=1e-6, err_msg=metric)
    counts = WANTED["metrics"]["counts"]
    assert [row["called"] for row in found] == [counts[name]["pred"] for name in NAMES]
    assert [row["true"] for row in found] == [counts[name]["real"] for name in NAMES]
    both = [np.array([row[side] for row in found]) for side in ("called", "true")]
    np.testing.assert_allclose(count_spearman(*both), WANTED["metrics"]["count_spearman"], atol=1e-6)
