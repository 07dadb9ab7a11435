"""Predicted cells against held-out cells, unit by unit: point metrics, DE genes, energy distance, within variance."""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.analyses.differential_expression import de_summary
from hilbertcell.analyses.discrimination import NORMS, count_spearman, discrimination
from hilbertcell.analyses.law_summary import ratio_to
from hilbertcell.analyses.metrics import (
    energy_distance,
    mae_delta,
    mse_delta,
    pearson_delta,
    within_variance_ratio,
)
from hilbertcell.analyses.verdicts import verdicts

TRAINING_CELLS = "training cells"
RATIOS = ("pearson", "mae", "energy_distance", "overlap_at_N", "precision_at_N", "population_energy")
JUDGED = {
    "energy_distance": 1.0,
    "precision_at_N": -1.0,
}  # sign: verdicts take scores that are better when smaller


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


def score_groups(
    table: pd.DataFrame, units: pd.DataFrame, predicted: np.ndarray, true: np.ndarray, genes: np.ndarray
) -> pd.DataFrame:
    """`table` with scores over the perturbations of each (context, batch): nan where there is one only.

    `discrimination_l1`, `_l2`, `_cosine` of effects (units, G) and `count_spearman`, the same in every row of a group.
    Combinations keep all genes in the distances: no gene has their name.
    """
    table = table.copy()
    for norm in NORMS:
        table[f"discrimination_{norm}"] = np.nan
    table["count_spearman"] = np.nan
    place = np.arange(len(units))
    for _, rows in pd.Series(place).groupby([units["context"].to_numpy(), units["batch"].to_numpy()]):
        one = rows.to_numpy()
        if len(one) < 2:
            continue
        names = units["perturbation"].astype(str).iloc[one].tolist()
        for norm in NORMS:
            scores = discrimination(predicted[one], true[one], genes, names, norm)
            table.iloc[one, table.columns.get_loc(f"discrimination_{norm}")] = scores
        if "called" in table:
            called, known = (table[column].to_numpy()[one] for column in ("called", "true"))
            table.iloc[one, table.columns.get_loc("count_spearman")] = count_spearman(called, known)
    return table


def summarise_cells(
    units: Mapping[str, pd.DataFrame],
    batch: pd.Series,
    seed: int = 0,
    baseline: str = TRAINING_CELLS,
    bounds: Collection[str] = (),
) -> dict[str, Any]:
    """Compare models on units (rows), first averaged within batches: means, per batch, ratios to the baseline.

    `units` maps a model to its scores, a row per unit; `batch` gives the batch of each unit. `called_ratio` is that of
    the sums over all units (genes called over true DE genes), since a unit may have no true ones. Verdicts on the
    `JUDGED` metrics are against every other model that makes cells, on the batches where all have them; models named in
    `bounds` know the truth and take no part in them. `worst_unit` is the one with the largest energy distance.
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
            "verdicts": _verdicts(name, by_batch, bounds),
            "worst_unit": {
                "unit": str(units[name]["energy_distance"].idxmax()),
                "energy_distance": float(units[name]["energy_distance"].max()),
            },
        }
    return result


def _verdicts(
    name: str, by_batch: Mapping[str, pd.DataFrame], bounds: Collection[str]
) -> dict[str, dict[str, Any]]:
    judged = [other for other in by_batch if other not in bounds]
    found: dict[str, dict[str, Any]] = {}
    for column, sign in JUDGED.items():
        if name not in judged or len(judged) < 2 or any(column not in by_batch[other] for other in judged):
            continue
        scores = {other: sign * by_batch[other][column].to_numpy() for other in judged}
        known = np.isfinite(np.stack(list(scores.values()))).all(0)
        if known.any():
            against = {other: values[known] for other, values in scores.items() if other != name}
            found[column] = {
                other: vars(verdict) for other, verdict in verdicts(scores[name][known], against).items()
            }
    return found


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
