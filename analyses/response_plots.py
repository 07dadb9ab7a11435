"""Figures of predicted responses: which genes move, by how much, how surely, and what more cells would buy."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gaussian_kde

from hilbertcell.analyses.plots import (
    BATCH_COLOURS,
    BLUE,
    GREY,
    INK,
    ORANGE,
    PALE,
    short,
    styled,
    units,
)
from hilbertcell.analyses.shift_summary import (
    Condition,
    conditions,
    populations_of,
    summarise_shifts,
    top_genes,
)
from hilbertcell.inference.gene_draws import gene_draws

FOREST_GENES = 10
POSTERIOR_GENES = 8


@styled
def shift_overview(
    draws: xr.DataTree, summary: xr.Dataset | None = None, num_genes: int = 24, num_conditions: int = 16
) -> Figure:
    """Dots: predicted shift of the leading genes (columns) in the leading conditions (rows), mean over batches.

    Large dots are clear in every batch (90 % interval without zero), small ones are not.
    """
    summary = summarise_shifts(draws) if summary is None else summary
    chosen = conditions(summary)[:num_conditions]
    genes = top_genes(summary, num_genes)
    cells = [summary.isel(population=populations_of(summary, c), gene=genes) for c in chosen]
    shift = np.stack([cell["shift"].mean("population").values for cell in cells])
    clear = np.stack([cell["clear"].all("population").values for cell in cells])
    limit = float(np.nanmax(np.abs(shift), initial=1e-6))
    figure = Figure(figsize=(10.2, 1.5 + 0.29 * len(chosen)), layout="constrained")
    axes = figure.subplots()
    rows, columns = np.indices(shift.shape)
    dots = axes.scatter(
        columns, rows, s=np.where(clear, 130, 14), c=shift, cmap="PuOr_r", vmin=-limit, vmax=limit,
        edgecolors=np.where(clear, INK, "#9AA0A6").ravel(), linewidths=0.5,
    )  # fmt: skip
    axes.set_yticks(np.arange(len(chosen)), [short(c.label, 34) for c in chosen])
    axes.set_xticks(np.arange(len(genes)), [short(g, 16) for g in summary["gene"].values[genes]], rotation=60)
    for label in axes.get_xticklabels():
        label.set(horizontalalignment="right", rotation_mode="anchor")
    axes.set(xlim=(-0.7, len(genes) - 0.3), ylim=(len(chosen) - 0.4, -0.6))
    axes.tick_params(length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    bar = figure.colorbar(dots, ax=axes, pad=0.01, aspect=14, shrink=0.9)
    bar.set_label(f"shift ({units(draws)})")
    bar.outline.set_visible(False)
    return figure


@styled
def shift_forest(
    draws: xr.DataTree,
    condition: Condition,
    summary: xr.Dataset | None = None,
    limits: tuple[float, float] | None = None,
) -> Figure:
    """Shifts of the leading genes of one condition: 90 % interval per predicted batch, beside the training mean.

    Up to four batches; the grey bar is the mean of the training batches, +- their noise-corrected spread. `limits` of
    the axis make figures of several conditions comparable (`forest_limits`).
    """
    summary = summarise_shifts(draws) if summary is None else summary
    here = _forest_part(summary, condition)
    names = [str(batch) for batch in here["batch"].values]
    genes = here["gene"].values
    rows = np.arange(len(genes), dtype=float)[::-1]
    figure = Figure(figsize=(4.9, 1.1 + 0.14 * len(genes) * (1.2 + len(names))), layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=0.8)
    if "constant_data" in draws.children and "training_shift" in draws["constant_data"].dataset:
        known = draws["constant_data"].dataset.sel(population=here["population"].values[0], gene=genes)
        centre, spread = known["training_shift"].values, np.nan_to_num(known["training_shift_sd"].values)
        axes.barh(rows, 2 * spread, left=centre - spread, height=0.78, color=PALE)
        axes.vlines(centre, rows - 0.39, rows + 0.39, color=GREY, linewidth=1.4)
    offsets = np.linspace(0.26, -0.26, len(names)) if len(names) > 1 else np.zeros(1)
    for i, (offset, colour) in enumerate(zip(offsets, BATCH_COLOURS, strict=False)):
        one = here.isel(population=i)
        axes.hlines(rows + offset, one["lower"], one["upper"], color=colour, linewidth=1.8)
        axes.plot(one["shift"], rows + offset, "o", color=colour, markersize=3.8)
    axes.set_yticks(rows, [short(g, 18) for g in genes])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.6, len(genes) - 0.4)
    axes.set_xlim(limits)
    axes.set_xlabel(f"shift ({units(draws)})")
    _name_batches(axes, names)
    axes.set_title(short(condition.label, 44), pad=20)
    return figure


def _forest_part(summary: xr.Dataset, condition: Condition) -> xr.Dataset:
    """The batches and genes that the forest of a condition shows."""
    here = summary.isel(population=populations_of(summary, condition)[: len(BATCH_COLOURS)])
    return here.isel(gene=top_genes(here, FOREST_GENES))


def forest_limits(summary: xr.Dataset, chosen: Sequence[Condition]) -> tuple[float, float]:
    """An axis that holds zero and every interval of the forests of these conditions."""
    parts = [_forest_part(summary, condition) for condition in chosen]
    low = min((float(np.nanmin(part["lower"], initial=0.0)) for part in parts), default=0.0)
    high = max((float(np.nanmax(part["upper"], initial=0.0)) for part in parts), default=0.0)
    margin = 0.05 * max(high - low, 1e-6)
    return low - margin, high + margin


def _name_batches(axes: Axes, names: list[str]) -> None:
    """Names of the batches above the axes, in their colours: shorter to read than a legend."""
    handles: list[Any] = [
        matplotlib.lines.Line2D(
            [], [], color=colour, marker="o", markersize=3.8, linewidth=1.8, label=short(name, 16)
        )
        for name, colour in zip(names, BATCH_COLOURS, strict=False)
    ]
    handles.append(matplotlib.patches.Patch(color=PALE, label="training"))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=len(handles), frameon=False,
        borderpad=0, handlelength=1.3, columnspacing=1.2, handletextpad=0.4, fontsize=8.5,
    )  # fmt: skip


@styled
def width_by_controls(draws: xr.DataTree, summary: xr.Dataset | None = None) -> Figure:
    """Width of the 90 % interval of the predicted mean (median over genes) against the number of control cells.

    The line is the width that the sampling noise of the controls alone would give.
    """
    summary = summarise_shifts(draws) if summary is None else summary
    constant = draws["constant_data"].dataset.sel(population=summary["population"])
    number = constant["control_n"].values.astype(float)
    width = summary["mean_width"].median("gene").values
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    least, most = (number[number > 0].min(), number.max()) if (number > 0).any() else (1.0, 10.0)
    steps = np.array([step * 10.0**power for power in range(9) for step in (1, 2, 5)])
    ticks = steps[(steps > least / 2.5) & (steps < most * 2.5)]
    nowhere = ticks[0] / 2  # where populations without controls stand on the logarithmic axis
    place = np.where(number > 0, number, nowhere)
    seen = constant["target_observed"].values.astype(bool)
    for kind, colour, marker, label in (
        (~seen, BLUE, "o", "predicted from controls"),
        (seen, ORANGE, "D", "own perturbed cells were seen"),
    ):
        if kind.any():
            axes.plot(
                place[kind], width[kind], marker, color=colour, alpha=0.75, label=label, mew=0, markersize=5
            )
    if (number > 0).any():
        variance = constant["control_variance"].median("gene").values[number > 0].mean()
        grid = np.geomspace(ticks[0], ticks[-1], 50)
        noise = 2 * 1.6449 * np.sqrt(variance / grid)  # a normal 90 % interval is 2 x 1.6449 deviations wide
        axes.plot(grid, noise, color=GREY, linewidth=1.2, label="sampling noise of the controls alone")
    axes.set_xscale("log")
    nobody = [nowhere] if (number == 0).any() else []
    axes.set_xticks([*nobody, *ticks], [*("none" for _ in nobody), *(f"{tick:g}" for tick in ticks)])
    axes.set_xticks([], minor=True)
    axes.set_ylim(0, 1.1 * np.nanmax(width, initial=1e-6))
    axes.set_xlabel("control cells of the population's batch and context")
    axes.set_ylabel(f"interval width ({units(draws)})")
    axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=2, borderpad=0)
    return figure


@styled
def gene_posteriors(draws: xr.DataTree, condition: Condition, summary: xr.Dataset) -> Figure:
    """The drawn shifts of the leading genes of one condition as densities, one line per predicted batch.

    Bars below are 90 % intervals; the title says how probable the direction is, in the least certain batch shown.
    """
    here = _forest_part(summary, condition).isel(gene=slice(POSTERIOR_GENES))
    names, genes = [str(name) for name in here["population"].values], here["gene"].values
    places = summary["gene"].to_index().get_indexer(genes)
    drawn = [gene_draws(draws, "shift", name)[:, places] for name in names]
    columns = 4
    num_rows = -(-len(genes) // columns)
    figure = Figure(figsize=(10.2, 0.8 + 1.75 * num_rows), layout="constrained")
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for g, axes in enumerate(panels[: len(genes)]):
        axes.axvline(0, color=INK, linewidth=0.8)
        top = 0.0
        for i, colour in zip(range(len(names)), BATCH_COLOURS, strict=False):
            values = drawn[i][:, g]
            if not np.isfinite(values).all() or values.std() == 0:
                continue
            grid = np.linspace(values.min(), values.max(), 60)
            density = gaussian_kde(values)(grid)
            axes.fill_between(grid, density, color=colour, alpha=0.12, linewidth=0)
            axes.plot(grid, density, color=colour, linewidth=1.4)
            top = max(top, float(density.max()))
        for i, colour in zip(range(len(names)), BATCH_COLOURS, strict=False):
            one = here.isel(population=i, gene=g)
            at = -(0.1 + 0.1 * i) * (top or 1.0)
            axes.hlines(at, one["lower"], one["upper"], color=colour, linewidth=2.4)
            axes.plot(one["shift"], at, "o", color=colour, markersize=3.8)
        one = here.isel(gene=g)
        way = "up" if float(one["shift"].mean()) > 0 else "down"
        axes.set_title(f"{short(genes[g], 14)}: {way} {_probability(float(one['direction'].min()))}")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    for axes in panels[len(genes) :]:
        axes.set_axis_off()
    handles = [
        matplotlib.lines.Line2D([], [], color=colour, linewidth=2, label=short(name, 24))
        for name, colour in zip(here["batch"].values, BATCH_COLOURS, strict=False)
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), frameon=False, fontsize=8.5)
    figure.supxlabel(f"shift ({units(draws)})", fontsize=9)
    return figure


def _probability(value: float) -> str:
    """Per cent, never rounded to a certainty that finitely many draws cannot give."""
    return "> 99 %" if value > 0.99 else f"{100 * value:.0f} %"
