"""Figures of draws: small functions from a DataTree (what `Fit.predict` returns) to a matplotlib Figure.

They read the file only, choose nothing at random and touch no global matplotlib state. Units on axes are those of
the draws. All raise KeyError when the group they show is absent.
"""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hilbertcell.analyses.shift_summary import INTERVAL

# Okabe and Ito's colours, told apart by all common kinds of colour vision; grey for what is not predicted.
BLUE, ORANGE, GREEN, PURPLE, GREY, PALE = "#0072B2", "#D55E00", "#009E73", "#AA4499", "#5F6368", "#DADCE0"
INK = "#202124"
ORANGE_TEXT = "#B84A00"  # the orange of text: dark enough to read on white
BATCH_COLOURS = (BLUE, ORANGE, GREEN, PURPLE)
MAX_BATCH_ROWS = 40
MAX_FACTORS = 4
EXPLANATIONS = {
    "perturbation": "what the perturbation does everywhere",
    "context": "what all perturbations share in one kind of cell",
    "interaction": "what one perturbation does in one kind of cell only",
    "own baseline": "what follows, gene by gene, from where the untreated cells stand",
    "microenvironment": "what a batch does to all its responses together",
    "residual": "real differences between populations that nothing above explains",
    "sampling noise": "what comes from having measured finitely many cells",
}
TAILS = ((1 - INTERVAL) / 2, (1 + INTERVAL) / 2)


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


def styled(plot: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw in `style`."""

    @wraps(plot)
    def drawn(*args: Any, **kwargs: Any) -> Figure:
        with style():
            return plot(*args, **kwargs)

    return drawn


def short(name: object, length: int = 26) -> str:
    """A label that fits beside a figure."""
    text = str(name)
    return text if len(text) <= length else text[: length - 1] + "…"


def units(draws: xr.DataTree) -> str:
    """What shifts are measured in."""
    attrs = draws["predictions"].attrs
    return {"log1p_cp10k": "log1p CP10k"}.get(attrs.get("scale", ""), attrs.get("units", "units of the data"))


def words(draws: xr.DataTree) -> dict[str, str]:
    """What the user's own file calls a batch (and several), a context and a perturbation, and its control label."""
    keys = json.loads(draws.attrs.get("keys", "{}"))
    context, batch = keys.get("context", "context"), str(keys.get("batch", "batch"))
    return {
        "batch": batch,
        "batches": f"{batch}es" if batch.endswith(("ch", "s", "sh", "x")) else f"{batch}s",
        "context": context if isinstance(context, str) else " | ".join(context),
        "perturbation": str(keys.get("perturbation", "perturbation")),
        "control": str(keys.get("control", "control")),
    }


@styled
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


@styled
def microenvironments(draws: xr.DataTree) -> Figure:
    """One row per batch, one column per factor: posterior mean and 90 % interval of the microenvironment."""
    u = draws["posterior"]["microenvironment"].load()
    shown = u.isel(batch=batches_to_show(u), factor=slice(MAX_FACTORS))
    mean = shown.mean(("chain", "draw")).transpose("factor", "batch").values
    low, high = shown.quantile(TAILS, ("chain", "draw")).transpose("quantile", "factor", "batch").values
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
        label.set_color(INK if kind else ORANGE_TEXT)
    figure.supxlabel("position along the factor (standard deviations between batches)", fontsize=9)
    return figure


def batches_to_show(u: xr.DataArray) -> np.ndarray:
    """All predicted batches and as many training batches as fit."""
    trained = u["in_training"].values if "in_training" in u.coords else np.ones(u.sizes["batch"], bool)
    order = np.concatenate([np.flatnonzero(~trained), np.flatnonzero(trained)])[:MAX_BATCH_ROWS]
    return np.concatenate([order[trained[order]], order[~trained[order]]])
