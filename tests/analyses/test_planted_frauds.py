"""Frauds beside a real benchmark: what they do to a prediction, and what the table says of it."""

import numpy as np
import pandas as pd
import pytest

from hilbertcell.analyses import planted_frauds as frauds
from hilbertcell.analyses.fraud_table import FRESH, fraud_rows, summarise_frauds
from hilbertcell.analyses.gene_table import GeneTable
from hilbertcell.analyses.predictors import Predictor, Screen

TARGETS = pd.DataFrame(
    {"context": ["B", "B", "T"], "batch": ["d0"] * 3, "perturbation": ["x", "y", "x"], "dose": np.nan},
    index=["B x", "B y", "T x"],
)
CONTROLS = pd.DataFrame(
    {"context": ["B", "T"], "batch": ["d0"] * 2, "is_control": [True, True]}, index=["B", "T"]
)


def given():
    table = GeneTable(
        CONTROLS, np.full(2, 30), np.array([[1.0, 2.0], [3.0, 4.0]]), np.ones((2, 2)), np.ones((2, 2))
    )
    return Screen(None, table)


class Honest:
    """Draws and cells about control + 1, and how often it was asked."""

    def __init__(self):
        self.asked = []
        self.own = np.array([[1.0, 2.0], [1.0, 2.0], [3.0, 4.0]])

    def law(self, given, targets, seed):
        self.asked.append("law")
        order = TARGETS.index.get_indexer(targets.index)
        return (self.own + np.arange(1, 4)[:, None])[order] + np.zeros((5, 1, 1))

    def cells(self, given, targets, number, seed):
        self.asked.append("cells")
        order = TARGETS.index.get_indexer(targets.index)
        rng = np.random.default_rng(seed)
        return [self.own[t] + t + 1 + rng.normal(size=(n, 2)) for t, n in zip(order, number, strict=True)]


def test_frauds_do_what_their_names_say():
    honest, screen, number = Honest(), given(), np.array([6, 7, 8])
    law, cells = honest.law(screen, TARGETS, 0), honest.cells(screen, TARGETS, number, 0)
    honest.asked.clear()
    planted = frauds.planted(Predictor(honest.law, honest.cells), TARGETS)
    assert list(planted) == [frauds.HALF, frauds.DOUBLE, frauds.NARROW, frauds.COPIED, frauds.LABELS]
    np.testing.assert_allclose(
        planted[frauds.HALF].law(screen, TARGETS, 0), honest.own + (law - honest.own) / 2
    )
    doubled = planted[frauds.DOUBLE].cells(screen, TARGETS, number, 0)
    for t in range(3):
        np.testing.assert_allclose(doubled[t].mean(0) - honest.own[t], 2 * (cells[t].mean(0) - honest.own[t]))
        np.testing.assert_allclose(doubled[t].var(0), cells[t].var(0))
    narrow = planted[frauds.NARROW].cells(screen, TARGETS, number, 0)
    np.testing.assert_allclose(narrow[1].std(0), 0.6 * cells[1].std(0))
    np.testing.assert_allclose(narrow[1].mean(0), cells[1].mean(0))
    copied = planted[frauds.COPIED].cells(screen, TARGETS, number, 0)
    assert [len(x) for x in copied] == [6, 7, 8]
    np.testing.assert_array_equal(copied[1], cells[1][[0, 1, 2, 3, 0, 1, 2]])
    assert sorted(honest.asked) == ["cells", "law"], "asked once, whatever is done to the answers"
    moved = planted[frauds.LABELS]
    np.testing.assert_allclose(moved.law(screen, TARGETS, 0), law[:, [1, 0, 2]])
    other = moved.cells(screen, TARGETS, 500 * number, 0)
    effect = [x.mean() - own.mean() for x, own in zip(other, honest.own, strict=True)]
    np.testing.assert_allclose(effect, [2, 1, 3], atol=0.2)
    assert [len(x) for x in moved.cells(screen, TARGETS, number, 0)] == [6, 7, 8]
    alone = frauds.planted(Predictor(honest.law, honest.cells), TARGETS.iloc[[0, 2]])
    assert frauds.LABELS not in alone


def test_no_fraud_without_law_and_cells():
    with pytest.raises(ValueError, match="lacks one of them"):
        frauds.planted(Predictor(law=lambda *args: np.zeros((2, 3, 2))), TARGETS)


def record(shift, rng):
    names, batch = [f"u{i}" for i in range(8)], [f"d{i // 2}" for i in range(8)]
    noise = 0.01 * rng.normal(size=8)
    return {
        "law": {
            "targets": {"crps": (1 + shift + noise).tolist()}, "names": names, "context": ["B"] * 8, "batch": batch,
            "pit": [[0.5]] * 8, "residual": None,
        },
        "cells": {"units": {"mae": (2 + noise).tolist(), "called": [None] * 8}, "names": names, "batch": batch},
    }  # fmt: skip


def test_the_table_marks_what_moved():
    rng = np.random.default_rng(0)
    honest = record(0.0, rng)
    cells = [
        {"model": "mine", **honest, "checks": {"a fraud": record(0.5, rng), "none": honest}},
        {"model": "replicate ceiling", **record(-0.5, rng)},
        {"model": "other", **record(9.0, rng)},
    ]
    summary = summarise_frauds(cells, "mine")
    assert list(summary["scores"]) == ["mine", "a fraud", "none", FRESH]
    assert summary["batches"] == ["d0", "d1", "d2", "d3"]
    rows = fraud_rows(summary)
    for name, value in (("a fraud", 1.5), (FRESH, 0.5)):
        text = rows.loc[name, "CRPS"]
        assert text == f"**{text.strip('*')}**"
        assert float(text.strip("*")) == pytest.approx(value, abs=0.03)
    assert not rows.loc["none"].str.contains(r"\*").any()
    assert rows.loc["mine", "genes called"] == "-"
    assert summarise_frauds(cells, "other") == {}
