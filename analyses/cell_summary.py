"""Predicted cells against held-out cells, unit by unit: point metrics, DE genes, energy distance, within variance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.analyses.differential_expression import de_summary
from hilbertcell.analyses.law_summary import ratio_to
from hilbertcell.analyses.metrics import (
    energy_distance,
    mae_delta,
    mse_delta,
    pearson_delta,
    within_variance_ratio,
)

TRAINING_CELLS = "training cells"
RATIOS = ("pearson", "mae", "energy_distance", "overlap_at_N", "precision_at_N")


def score_cells(prediction: np.ndarray, truth: np.ndarray, reference: np.ndarray | None) -> dict[str, float]:
    """All metrics of predicted cells (n, G) for true cells (n, G), natural scale.

    `reference` (k, G) are real control cells of the same (context, batch) that the prediction was not made from; without
    them the metrics that need controls are nan. Raises: ValueError unless there are equally many cells.
    """
    if len(prediction) != len(truth):
        raise ValueError(
            f"got {len(prediction)} predicted and {len(truth)} true cells; the number of DE genes and the noise of the "
            "means depend on it: draw equally many"
        )
    mean, true_mean = prediction.mean(0), truth.mean(0)
    scores = {
        "mae": mae_delta(mean, true_mean),
        "mse": mse_delta(mean, true_mean),
        "energy_distance": energy_distance(prediction, truth),
        "within_variance_ratio": within_variance_ratio(prediction, truth),
    }
    if reference is not None:
        scores["pearson"] = pearson_delta(mean, true_mean, reference.mean(0))
        scores |= de_summary(prediction, truth, reference)
    return scores


def summarise_cells(
    units: Mapping[str, pd.DataFrame], batch: pd.Series, seed: int = 0, baseline: str = TRAINING_CELLS
) -> dict[str, Any]:
    """Compare models on units (rows), first averaged within batches: means, per batch, ratios to the baseline.

    `units` maps a model to its scores, a row per unit; `batch` gives the batch of each unit. `called_ratio` is that of
    the sums over all units (genes called over true DE genes), since a unit may have no true ones.
    """
    by_batch = {name: table.groupby(batch.to_numpy(), sort=True).mean() for name, table in units.items()}
    result: dict[str, Any] = {
        "num_units": len(batch),
        "batches": [str(name) for name in next(iter(by_batch.values())).index],
        "models": {},
    }
    for name, table in by_batch.items():
        mean = table.mean().to_dict()
        if "called" in units[name]:
            true = units[name]["true"].sum()
            mean["called_ratio"] = units[name]["called"].sum() / true if true else np.nan
        relative = {}
        for column in RATIOS:
            both = [column in by_batch[key] for key in (name, baseline) if key in by_batch]
            if len(both) == 2 and all(both):
                pair = np.stack([table[column], by_batch[baseline][column]])
                known = np.isfinite(pair).all(0)
                if known.any():
                    relative[column] = ratio_to(pair[0, known], pair[1, known], seed)
        result["models"][name] = {
            "mean": mean,
            "per_batch": {column: table[column].tolist() for column in table},
            f"relative_to_{baseline.replace(' ', '_')}": relative,
        }
    return result


def cell_rows(summary: Mapping[str, Any], baseline: str = TRAINING_CELLS) -> pd.DataFrame:
    """The comparison of `summarise_cells` as text, one row per model; ratios are to the real training cells."""
    key = f"relative_to_{baseline.replace(' ', '_')}"
    titles = {
        "pearson": "Pearson",
        "mae": "MAE",
        "energy_distance": "energy distance",
        "overlap_at_N": "overlap@N",
        "precision_at_N": "DE precision",
    }
    rows = {}
    for name, model in summary["models"].items():
        mean = model["mean"]
        row = {}
        for column, title in titles.items():
            row[title] = _text(mean.get(column))
            ratio = model[key].get(column)
            row[f"{title}, x"] = (
                f"{_text(ratio['ratio'])} ± {_text(ratio['standard_error'])}" if ratio else "-"
            )
        row["DE genes called / true"] = _text(mean.get("called_ratio"), 2)
        row["within-variance ratio"] = _text(mean.get("within_variance_ratio"), 2)
        row["LFC Spearman"] = _text(mean.get("lfc_spearman"))
        rows[name] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _text(value: float | None, digits: int = 3) -> str:
    return "-" if value is None or not np.isfinite(value) else f"{value:.{digits}f}"
