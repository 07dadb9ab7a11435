"""Figures of what batches share and what they do not: one population put into every batch."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from hilbertcell.analyses.plots import (
    BLUE,
    GREY,
    INK,
    ORANGE,
    ORANGE_TEXT,
    TAILS,
    batches_to_show,
    short,
    styled,
    units,
)
from hilbertcell.analyses.shift_summary import has

_GENES = 4
_LABELS = 6
_APART = np.array([0.13, 0.06])  # names nearer than this, in shares of the axes, would cover one another
_RATIOS = (0.1, 0.5)


@styled
def one_population_in_every_batch(draws: xr.DataTree, condition: str) -> Figure:
    """One row per batch, one column per gene: the expected shift of the same condition under every batch's latents.

    The first row, blue, is the part that all batches share. Crosses are measured shifts, where the draws hold them. `condition` is one of
    `leading_condition`; raises KeyError if it is not.
    """
    posterior = draws["posterior"].dataset
    own = posterior["batch_response"].sel(leading_condition=condition).isel(leading_gene=slice(_GENES)).load()
    own = own.isel(batch=batches_to_show(own))
    shared = (
        posterior["fixed_response"].sel(leading_condition=condition).isel(leading_gene=slice(_GENES)).load()
    )
    measured = None
    if has(draws, "constant_data", "measured_response"):
        measured = draws["constant_data"]["measured_response"].sel(leading_condition=condition)
    names = [str(name) for name in own["batch"].values]
    trained = own["in_training"].values
    mean = own.mean(("chain", "draw")).transpose("leading_gene", "batch").values
    low, high = own.quantile(TAILS, ("chain", "draw")).transpose("quantile", "leading_gene", "batch").values
    figure = Figure(figsize=(10.2, 1.25 + 0.25 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(mean), sharey=True, squeeze=False)[0]
    rows = np.arange(len(names))[::-1]
    top = len(names) + 0.4
    place = {name: row for name, row, known in zip(names, rows, trained, strict=True) if known}
    for g, axes in enumerate(panels):
        fixed = shared.isel(leading_gene=g)
        ends = fixed.quantile(TAILS, ("chain", "draw")).values
        axes.axvspan(*ends, color=BLUE, alpha=0.12, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.hlines(top, *ends, color=BLUE, linewidth=2.4)
        axes.plot(float(fixed.mean()), top, "s", color=BLUE, markersize=5.5)
        for kind, marker, colour in ((trained, "o", GREY), (~trained, "D", ORANGE)):
            axes.hlines(rows[kind], low[g, kind], high[g, kind], color=colour, linewidth=1.6)
            axes.plot(mean[g, kind], rows[kind], marker, color=colour, markersize=4.5)
        if measured is not None:
            values = measured.sel(training_batch=list(place)).isel(leading_gene=g).values
            axes.plot(values, list(place.values()), "x", color=INK, markersize=5, mew=1.2)
        axes.set_title(short(fixed["gene_name"].item(), 18))
        axes.tick_params(axis="y", length=0)
    panels[0].set_yticks([*rows, top], [*(short(name) for name in names), "shared by all"])
    panels[0].set_ylim(-0.7, top + 0.6)
    for label, colour in zip(
        panels[0].get_yticklabels(),
        [*(INK if known else ORANGE_TEXT for known in trained), BLUE],
        strict=True,
    ):
        label.set_color(colour)
    figure.supxlabel(f"expected shift ({units(draws)})", fontsize=9)
    return figure


@styled
def fixed_and_random(draws: xr.DataTree) -> Figure:
    """One dot per gene of a leading condition: what batches share of its response, and how much they differ in it.

    Vertical: standard deviation between training batches of the expected shift, posterior mean. Dashed: such
    differences that are a tenth, or half, of the shared response.
    """
    posterior = draws["posterior"].dataset
    shared = abs(posterior["fixed_response"].mean(("chain", "draw"))).values
    response = posterior["batch_response"].isel(batch=np.flatnonzero(posterior["in_training"].values))
    differs = response.std("batch").mean(("chain", "draw"))
    differs = differs.transpose("leading_condition", "leading_gene").values
    genes = posterior["gene_name"].values.astype(str)
    figure = Figure(figsize=(6.4, 3.5), layout="constrained")
    axes = figure.subplots()
    limit = 1.12 * float(max(shared.max(), 1e-6))
    top = max(1.25 * float(differs.max()), 0.02 * limit)
    for ratio in _RATIOS:
        end = min(limit, top / ratio)
        axes.plot([0, end], [0, ratio * end], color=GREY, linewidth=1, linestyle="--")
        place: dict[str, Any] = (
            {"ha": "left", "va": "center"} if end == limit else {"ha": "center", "va": "bottom"}
        )
        axes.annotate(
            f"{100 * ratio:.0f} %", (end, ratio * end), (3, 0) if end == limit else (0, 2),
            textcoords="offset points", color=GREY, fontsize=8, annotation_clip=False, **place,
        )  # fmt: skip
    axes.plot(shared.ravel(), differs.ravel(), "o", color=BLUE, alpha=0.6, mew=0, markersize=5)
    labelled: dict[str, np.ndarray] = {}
    for i in np.argsort(-differs.ravel()):
        name, point = genes.ravel()[i], np.array([shared.ravel()[i] / limit, differs.ravel()[i] / top])
        apart = all((abs(point - other) > _APART).any() for other in labelled.values())
        if name not in labelled and apart and len(labelled) < _LABELS:
            axes.annotate(
                short(name, 14), (shared.ravel()[i], differs.ravel()[i]), (5, 0), textcoords="offset points",
                va="center", fontsize=8,
            )  # fmt: skip
            labelled[name] = point
    axes.set(xlim=(0, limit), ylim=(0, top))
    axes.set_xlabel(f"size of the shared shift ({units(draws)})")
    axes.set_ylabel("standard deviation between batches")
    return figure
