"""Figures of draws: small functions from a DataTree (what `Fit.predict` returns) to a matplotlib Figure.

They read the file only, choose nothing at random and touch no global matplotlib state. Units on axes are those of
the draws. All raise KeyError when the group they show is absent.
"""

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hilbertcell.analyses.shift_summary import (
    INTERVAL,
    Condition,
    conditions,
    populations_of,
    summarise_shifts,
    top_genes,
)

# Okabe and Ito's colours, told apart by all common kinds of colour vision; grey for what is not predicted.
BLUE, ORANGE, GREEN, PURPLE, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#5F6368", "#DADCE0"
BATCH_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MAX_BATCH_ROWS = 40
MAX_FACTORS = 4
FOREST_GENES = 10
EXPLANATIONS = {
    "perturbation": "what the perturbation does everywhere",
    "context": "what all perturbations share in one kind of cell",
    "interaction": "what one perturbation does in one kind of cell only",
    "own baseline": "what follows, gene by gene, from where the untreated cells stand",
    "microenvironment": "what a batch does to all its responses together",
    "residual": "real differences between populations that nothing above explains",
    "sampling noise": "what comes from having measured finitely many cells",
}
_TAILS = ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2)


def style() -> AbstractContextManager[None]:
    """The look of every figure; names of genes are text, never mathematics."""
    return matplotlib.rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.labelcolor": "#202124",
            "axes.titlesize": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "xtick.color": GREY,
            "ytick.color": GREY,
            "xtick.labelcolor": "#202124",
            "ytick.labelcolor": "#202124",
            "axes.axisbelow": True,
            "text.parse_math": False,
        }
    )


def _styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(plot)
    def styled(*args: Any, **kwargs: Any) -> Figure:
        with style():
            return plot(*args, **kwargs)

    return styled


def short(name: object, length: int = 26) -> str:
    """A label that fits beside a figure."""
    text = str(name)
    return text if len(text) <= length else text[: length - 1] + "…"


def units(draws: xr.DataTree) -> str:
    """What shifts are measured in."""
    attrs = draws["predictions"].attrs
    return {"log1p_cp10k": "log1p CP10k"}.get(attrs.get("scale", ""), attrs.get("units", "units of the data"))


def words(draws: xr.DataTree) -> dict[str, str]:
    """What the user's own file calls a batch, a context and a perturbation, and its control label."""
    keys = json.loads(draws.attrs.get("keys", "{}"))
    context = keys.get("context", "context")
    return {
        "batch": str(keys.get("batch", "batch")),
        "context": context if isinstance(context, str) else " | ".join(context),
        "perturbation": str(keys.get("perturbation", "perturbation")),
        "control": str(keys.get("control", "control")),
    }


@_styled
def variance_decomposition(draws: xr.DataTree) -> Figure:
    """Bars: what the measured responses of the training populations are made of, in percent."""
    shares = draws["constant_data"]["variance_decomposition"].load()
    names, percent = [str(c) for c in shares["component"].values], 100 * shares.values
    figure = Figure(figsize=(10.2, 0.6 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))[::-1]
    colours = [GREY if name in ("residual", "sampling noise") else BLUE for name in names]
    axes.barh(rows, percent, color=colours, height=0.68)
    for row, name, value in zip(rows, names, percent, strict=True):
        at: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
        axes.annotate(f"{value:.0f} %", (value, row), (4, 0), weight="bold", **at)
        axes.annotate(EXPLANATIONS.get(name, ""), (value, row), (38, 0), color=GREY, **at)
    axes.set_yticks(rows, names)
    axes.tick_params(axis="y", length=0)
    longest = max(float(np.nanmax(percent)), 1.0)
    axes.set_xlim(0, 2.1 * longest)  # the explanations stand on the right
    ticks = [tick for tick in axes.get_xticks() if tick <= 1.1 * longest]
    axes.set_xticks(ticks)
    axes.spines["bottom"].set_bounds(0, ticks[-1])
    axes.set_xlabel("share of the squared response (%), mean over genes", loc="left")
    return figure


@_styled
def microenvironments(draws: xr.DataTree) -> Figure:
    """One row per batch, one column per factor: posterior mean and 90 % interval of the microenvironment."""
    u = draws["posterior"]["microenvironment"].load()
    shown = u.isel(batch=_batches_to_show(u), factor=slice(MAX_FACTORS))
    mean = shown.mean(("chain", "draw")).transpose("factor", "batch").values
    low, high = shown.quantile(_TAILS, ("chain", "draw")).transpose("quantile", "factor", "batch").values
    names = [str(name) for name in shown["batch"].values]
    trained = shown["in_training"].values if "in_training" in shown.coords else np.ones(len(names), bool)
    figure = Figure(figsize=(1.6 + 2.6 * len(mean), 1.0 + 0.24 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(mean), sharex=True, sharey=True, squeeze=False)[0]
    rows = np.arange(len(names))[::-1]
    for k, axes in enumerate(panels):
        axes.axvline(0, color=PALE, linewidth=1)
        for kind, marker, colour in ((trained, "o", GREY), (~trained, "D", ORANGE)):
            axes.hlines(rows[kind], low[k, kind], high[k, kind], color=colour, linewidth=1.6)
            axes.plot(mean[k, kind], rows[kind], marker, color=colour, markersize=5)
        axes.set_title(f"factor {k + 1}")
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks(rows, [short(name) for name in names])
    panels[0].set_ylim(-0.6, len(names) - 0.4)
    for label, kind in zip(panels[0].get_yticklabels(), trained, strict=True):
        label.set_color("#202124" if kind else ORANGE)
    figure.supxlabel("position along the factor (standard deviations between batches)", fontsize=9)
    return figure


def _batches_to_show(u: xr.DataArray) -> np.ndarray:
    """All predicted batches and as many training batches as fit."""
    trained = u["in_training"].values if "in_training" in u.coords else np.ones(u.sizes["batch"], bool)
    order = np.concatenate([np.flatnonzero(~trained), np.flatnonzero(trained)])[:MAX_BATCH_ROWS]
    return np.concatenate([order[trained[order]], order[~trained[order]]])


@_styled
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
        edgecolors=np.where(clear, "#202124", "#9AA0A6").ravel(), linewidths=0.5,
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


@_styled
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
    axes.axvline(0, color="#202124", linewidth=0.8)
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


def _checks(draws: xr.DataTree) -> xr.DataTree:
    """The one-dimensional summaries that ArviZ's predictive checks take, alone in their groups."""
    predicted = draws["posterior_predictive"].dataset[["population_mean"]].load()
    observed = draws["observed_data"].dataset[["population_mean"]].load().reset_coords(drop=True)
    known = np.isfinite(observed["population_mean"].values)
    return xr.DataTree.from_dict(
        {
            "posterior_predictive": predicted.reset_coords(drop=True).isel(observation=known),
            "observed_data": observed.isel(observation=known),
        }
    )


def coverage(draws: xr.DataTree) -> tuple[float, int]:
    """Share of the checked training means inside their predictive 90 % interval, and how many were checked."""
    checks = _checks(draws)
    low, high = checks["posterior_predictive"]["population_mean"].quantile(_TAILS, ("chain", "draw")).values
    observed = checks["observed_data"]["population_mean"].values
    return float(((observed >= low) & (observed <= high)).mean()), len(observed)


def _arviz_figure(collection: Any, size: tuple[float, float]) -> Figure:
    """The figure of an ArviZ PlotCollection, taken out of pyplot's list of open figures."""
    from matplotlib import pyplot

    figure = collection.viz["figure"].item()
    pyplot.close(figure)
    figure.set_size_inches(size)
    figure.set_layout_engine("constrained")
    for axes in figure.axes:
        axes.xaxis.label.set_size(9)
        axes.yaxis.label.set_size(9)
    return figure


@_styled
def predictive_pit(draws: xr.DataTree) -> Figure:
    """ArviZ's PIT plot: where measured training means fall within their predictive distributions.

    The line is the empirical distribution function of the PIT values minus the uniform one. Orange points are
    where a test of uniformity fails (`pot_c`: it allows for values that depend on one another, as genes of one
    population do).
    """
    import arviz

    collection = arviz.plot_ppc_pit(
        _checks(draws),
        method="pot_c",
        backend="matplotlib",
        visuals={
            "ecdf_lines": {"color": BLUE},
            "suspicious_points": {"color": ORANGE},
            "title": False,
            "p_value_text": False,
            "xlabel": {"text": "PIT: share of draws below the measured mean"},
            "ylabel": {"text": "observed minus uniform"},
        },
    )
    return _arviz_figure(collection, (4.9, 3.2))


@_styled
def predictive_distribution(draws: xr.DataTree) -> Figure:
    """ArviZ's posterior predictive check: distribution of standardised training means, drawn (blue) and measured."""
    import arviz

    checks = _checks(draws)
    drawn = checks["posterior_predictive"].sizes
    collection = arviz.plot_ppc_dist(
        checks,
        kind="ecdf",
        num_samples=min(40, drawn["chain"] * drawn["draw"]),
        backend="matplotlib",
        visuals={
            "predictive_dist": {"color": BLUE, "alpha": 0.15},
            "observed_dist": {"color": "#202124"},
            "title": False,
        },
    )
    figure = _arviz_figure(collection, (4.9, 3.2))
    figure.axes[0].set(xlabel="mean of a population (standardised)", ylabel="share of populations below")
    return figure


@_styled
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
    axes.legend(frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderpad=0)
    return figure
