"""What planted frauds did to the scores of a real benchmark: a small table beside that of the models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.analyses.bounds import CEILING
from hilbertcell.analyses.grid_store import law_scores, unit_scores

TITLES = {
    "crps": "CRPS",
    "excess": "excess",
    "covered_90": "cover of 90 %",
    "mae": "MAE",
    "pearson": "Pearson",
    "discrimination_l1": "discrimination",
    "energy_distance": "energy distance",
    "precision_at_N": "DE precision",
    "called": "genes called",
    "within_variance_ratio": "within",
}
FRESH = "truth with fresh cells"
MOVED = 2.0  # standard errors over batches of the paired difference


def summarise_frauds(
    cells: Sequence[Mapping[str, Any]], model: str, baseline: str = "training means"
) -> dict[str, Any]:
    """Scores per batch of the honest model, of each fraud, of a `baseline` that ignores controls, and of the truth itself.

    `cells` are the stored ones of one (data set, split). "Truth" is the replicate ceiling: half of the hidden cells against the
    other. Empty if the model has no checks. Every score keeps its batches, nan where one has none.
    """
    own = [cell for cell in cells if cell["model"] == model and "checks" in cell]
    if not own:
        return {}
    records: dict[str, list[Mapping[str, Any]]] = {model: list(own)}
    for cell in own:
        for name, record in cell["checks"].items():
            records.setdefault(name, []).append(record)
    for name, title in ((baseline, baseline), (CEILING, FRESH)):
        if found := [cell for cell in cells if cell["model"] == name]:
            records[title] = list(found)
    tables = {name: _by_batch(parts) for name, parts in records.items()}
    batches = tables[model].index
    return {
        "batches": [str(name) for name in batches],
        "scores": {
            name: {score: table[score].reindex(batches).tolist() for score in TITLES if score in table}
            for name, table in tables.items()
        },
    }


def _by_batch(records: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """Mean scores (batches x scores) of stored records, laws and cells beside each other."""
    laws = [law_scores(record["law"]) for record in records if "law" in record]
    units = [unit_scores(record["cells"]) for record in records if "cells" in record]
    parts = [
        pd.concat([scores.targets.assign(batch=labels["batch"]) for scores, labels in laws])
        if laws
        else None,
        pd.concat([table.assign(batch=batch) for table, batch in units]) if units else None,
    ]
    means = [part.groupby("batch").mean() for part in parts if part is not None]
    return pd.concat(means, axis=1)


def fraud_rows(summary: Mapping[str, Any]) -> pd.DataFrame:
    """The table as text, the honest model first; in bold what differs from it by more than two standard errors over batches."""
    honest, *others = summary["scores"]
    rows = {}
    for name in (honest, *others):
        row = {}
        for score, title in TITLES.items():
            values = _floats(summary["scores"][name].get(score))
            text = "-" if not np.isfinite(values).any() else f"{np.nanmean(values):.3f}"
            if name != honest and _moved(values, _floats(summary["scores"][honest].get(score))):
                text = f"**{text}**"
            row[title] = text
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _floats(values: Sequence[float | None] | None) -> np.ndarray:
    return np.array([] if values is None else values, dtype=np.float64)


def _moved(values: np.ndarray, honest: np.ndarray) -> bool:
    if values.shape != honest.shape:
        return False
    difference = (values - honest)[np.isfinite(values - honest)]
    if len(difference) < 2 or np.abs(difference).max() < 1e-9:
        return False
    return bool(abs(difference.mean()) > MOVED * difference.std(ddof=1) / np.sqrt(len(difference)))
