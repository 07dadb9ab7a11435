"""What draws say about every gene of every predicted population: effect, interval, evidence; and what to show of it."""

from typing import NamedTuple

import numpy as np
import pandas as pd
import xarray as xr

from hilbertcell.inference.gene_draws import gene_draws

INTERVAL = 0.9  # probability of every interval in figures and tables


class Condition(NamedTuple):
    """What was done to which kind of cell; `dose` is nan where there are no doses."""

    perturbation: str
    dose: float
    context: str

    @property
    def label(self) -> str:
        """For titles and axes."""
        at = "" if np.isnan(self.dose) else f" @ {self.dose:g}"
        return f"{self.perturbation}{at} in {self.context}"


def summarise_shifts(draws: xr.DataTree) -> xr.Dataset:
    """Posterior summaries with dims (population, gene), one population of draws in memory at a time.

    `mean`, `shift`: posterior means, scale of the draws. `lower`, `upper`: central 90 % interval of the shift.
    `direction`: probability that the shift has the sign of its posterior mean. `clear`: the interval excludes zero.
    `mean_width`: width of the 90 % interval of the mean. Draws that are not finite give nan, and False.
    Raises: KeyError if there is no group `predictions`.
    """
    predictions = draws["predictions"].dataset
    shape = predictions.sizes["population"], predictions.sizes["gene"]
    fields = ("mean", "shift", "lower", "upper", "direction", "mean_width")
    out = {name: np.empty(shape, np.float32) for name in fields}
    tails = (1 - INTERVAL) / 2, (1 + INTERVAL) / 2
    for p in range(shape[0]):
        name = str(predictions["population"].values[p])
        mean, shift = (gene_draws(draws, quantity, name) for quantity in ("mean", "shift"))
        out["mean"][p], out["shift"][p] = mean.mean(axis=0), shift.mean(axis=0)
        out["lower"][p], out["upper"][p] = np.quantile(shift, tails, axis=0)
        low, high = np.quantile(mean, tails, axis=0)
        out["mean_width"][p] = high - low
        same = (np.sign(shift) == np.sign(out["shift"][p])).mean(axis=0)
        out["direction"][p] = np.where(np.isfinite(out["shift"][p]), same, np.nan)
    names = [name for name in ("context", "perturbation", "dose", "batch") if name in predictions.coords]
    coords = {name: predictions.coords[name].load() for name in ("population", "gene", *names)}
    summary = xr.Dataset({name: (("population", "gene"), values) for name, values in out.items()}, coords)
    return summary.assign(clear=(summary["lower"] > 0) | (summary["upper"] < 0))


def certain_shift(summary: xr.Dataset) -> xr.DataArray:
    """Distance (population, gene) of the 90 % interval of the shift from zero; 0 where it holds zero or is nan.

    Genes are ranked by it: large and certain before large and vague.
    """
    nearest = xr.where(summary["lower"] > 0, summary["lower"], -summary["upper"])
    return nearest.where(summary["clear"], 0.0)


def conditions(summary: xr.Dataset) -> list[Condition]:
    """The predicted conditions, those with the largest certain shifts first, ties by name."""
    strength = certain_shift(summary).sum("gene").to_series().to_numpy()
    table = _labels(summary).assign(strength=strength, dose=lambda t: t["dose"].fillna(-1.0))
    ranked = table.groupby(["perturbation", "dose", "context"], sort=True)["strength"].mean()
    ranked = ranked.sort_values(ascending=False, kind="stable")
    return [Condition(p, np.nan if d < 0 else float(d), c) for p, d, c in ranked.index]


def populations_of(summary: xr.Dataset, condition: Condition) -> np.ndarray:
    """Positions of the populations of a condition, one per batch."""
    labels = _labels(summary)
    dose = labels["dose"].isna() if np.isnan(condition.dose) else labels["dose"] == condition.dose
    same = (
        (labels["perturbation"] == condition.perturbation) & (labels["context"] == condition.context) & dose
    )
    return np.flatnonzero(same)


def top_genes(summary: xr.Dataset, number: int) -> np.ndarray:
    """Positions of the genes with the largest certain shifts, averaged over the populations of `summary`.

    Ties, above all genes without any certain shift, go by the size of the mean shift.
    """
    certain = certain_shift(summary).mean("population").values
    size = np.nan_to_num(np.abs(summary["shift"].values)).mean(axis=0)
    return np.lexsort((-size, -certain))[:number]


def shift_table(draws: xr.DataTree, summary: xr.Dataset, number: int) -> pd.DataFrame:
    """The `number` (population, gene) with the largest certain shifts, one row each, as a table to read.

    Columns gene, perturbation, dose (if any), context, batch, mean, shift, lower, upper, direction, clear and
    training_shift (nan where no training batch had the condition).
    """
    certain, size = (
        certain_shift(summary).values.ravel(),
        np.nan_to_num(np.abs(summary["shift"].values)).ravel(),
    )
    chosen = np.lexsort((-size, -certain))[:number]
    p, g = np.divmod(chosen, summary.sizes["gene"])
    labels = _labels(summary).iloc[p].reset_index(drop=True)
    table = pd.DataFrame({"gene": summary["gene"].values[g].astype(str)}).join(labels)
    for name in ("mean", "shift", "lower", "upper", "direction", "clear"):
        table[name] = summary[name].values[p, g]
    table["training_shift"] = np.nan
    if has(draws, "constant_data", "training_shift"):
        training = draws["constant_data"]["training_shift"].sel(population=summary["population"])
        table["training_shift"] = training.values[p, g]
    return table if labels["dose"].notna().any() else table.drop(columns="dose")


def has(draws: xr.DataTree, group: str, variable: str) -> bool:
    """Whether the draws hold a variable, with at least one number in it."""
    return (
        group in draws.children
        and variable in draws[group].dataset.data_vars
        and draws[group].dataset[variable].size > 0
    )


def _labels(summary: xr.Dataset) -> pd.DataFrame:
    names = ("perturbation", "dose", "context", "batch")
    nothing = np.full(summary.sizes["population"], np.nan)
    return pd.DataFrame({name: summary[name].values if name in summary.coords else nothing for name in names})
