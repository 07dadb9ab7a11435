"""Frauds done to a model's own predictions beside a real benchmark: a score that none of them moves says nothing there."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.analyses.gene_table import controls_of
from hilbertcell.analyses.predictors import CellPredictor, LawPredictor, Predictor, Screen

HALF, DOUBLE = "effect x 0.5", "effect x 2"
NARROW = "spread of cells x 0.6"
COPIED = "half the cells, each twice"
LABELS = "perturbation labels moved on"
SHUFFLED = "batch labels shuffled"  # fitted anew, by whoever has the fitter
SHRINK = 0.6


def planted(predictor: Predictor, targets: pd.DataFrame) -> dict[str, Predictor]:
    """The predictor with each fraud; moved labels only if a (context, batch) of the targets has several perturbations.

    What the honest predictor says is asked for once, whatever is done to it. Raises: ValueError unless it has a law and cells.
    """
    if predictor.law is None or predictor.cells is None:
        raise ValueError("frauds are planted in a law and in cells, and this predictor lacks one of them")
    law, cells = _once(predictor.law), _once(predictor.cells)
    found = {
        HALF: Predictor(_scaled_law(law, 0.5), _scaled_cells(cells, 0.5)),
        DOUBLE: Predictor(_scaled_law(law, 2.0), _scaled_cells(cells, 2.0)),
        NARROW: Predictor(None, _changed(cells, lambda x: x.mean(0) + SHRINK * (x - x.mean(0)))),
        COPIED: Predictor(None, _changed(cells, lambda x: np.resize(x[: (len(x) + 1) // 2], x.shape))),
    }
    if (_moved_on(targets) != np.arange(len(targets))).any():

        def moved_law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
            return law(given, targets, seed)[:, _moved_on(targets)]

        def moved_cells(
            given: Screen, targets: pd.DataFrame, number: np.ndarray, seed: int
        ) -> list[np.ndarray]:
            others = targets.iloc[_moved_on(targets)]
            return predictor.cells(given, others, number, seed)  # type: ignore[misc]

        found[LABELS] = Predictor(moved_law, moved_cells)
    return found


def _moved_on(targets: pd.DataFrame) -> np.ndarray:
    """For each target (T,) the next one of its (context, batch), the first after the last."""
    order = np.arange(len(targets))
    for rows in (
        pd.Series(order).groupby([targets["context"].to_numpy(), targets["batch"].to_numpy()]).groups.values()
    ):
        order[rows] = np.roll(rows, -1)
    return order


def _scaled_law(law: LawPredictor, factor: float) -> LawPredictor:
    def scaled(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
        control, _, _ = controls_of([given.table], targets)
        return control + factor * (law(given, targets, seed) - control)

    return scaled


def _scaled_cells(cells: CellPredictor, factor: float) -> CellPredictor:
    def scaled(given: Screen, targets: pd.DataFrame, number: np.ndarray, seed: int) -> list[np.ndarray]:
        control, _, _ = controls_of([given.table], targets)
        honest = cells(given, targets, number, seed)
        return [x + (factor - 1) * (x.mean(0) - own) for x, own in zip(honest, control, strict=True)]

    return scaled


def _changed(cells: CellPredictor, change: Callable[[np.ndarray], np.ndarray]) -> CellPredictor:
    return lambda given, targets, number, seed: [change(x) for x in cells(given, targets, number, seed)]


def _once(predict: Callable[..., Any]) -> Callable[..., Any]:
    """The same function, which answers a question (targets, seed) that it was asked before from memory."""
    known: dict[tuple[Any, ...], Any] = {}

    def remembered(given: Screen, targets: pd.DataFrame, *rest: Any) -> Any:
        key = (tuple(targets.index), *(tuple(np.atleast_1d(one).tolist()) for one in rest))
        if key not in known:
            known[key] = predict(given, targets, *rest)
        return known[key]

    return remembered
