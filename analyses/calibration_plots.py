"""Figures of calibration: measured values among the draws that were made for them."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hilbertcell.analyses.calibration_curves import (
    Curve,
    checks_of,
    coverage_by_batch,
    coverage_curve,
    ecdf_curve,
    pit,
)
from hilbertcell.analyses.plots import BLUE, GREY, INK, MAX_BATCH_ROWS, ORANGE, PALE, short, styled
from hilbertcell.analyses.shift_summary import INTERVAL

_SIZE = (4.9, 3.3)
# What `evaluate` wrote of the predicted law of one model: `covered_90` and its like, overall and per batch, `pit_counts`.
HeldOut = dict[str, Any]


def coverage(draws: xr.DataTree) -> tuple[float, int]:
    """Share of the checked training means inside their predictive 90 % interval, and how many were checked."""
    measured, _ = pit(checks_of(draws))
    return float((np.abs(2 * measured - 1) <= INTERVAL).mean()), len(measured)


@styled
def predictive_pit(draws: xr.DataTree, held_out: HeldOut | None = None) -> Figure:
    """Where measured training means fall within their predictive laws: distribution function minus the uniform one.

    The band holds the whole line of a right law with 95 % probability (`calibration_curves`). Orange: populations
    hidden from training, from the counts of their PIT in tenths.
    """
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    curve = ecdf_curve(*pit(checks_of(draws)))
    _draw_band(axes, curve)
    axes.axhline(0, color=GREY, linewidth=1, linestyle="--")
    axes.plot(curve.x, curve.value, color=BLUE, linewidth=1.8, label="training")
    if held_out is not None:
        counts = np.asarray(held_out["pit_counts"], float)
        ends = np.linspace(0, 1, len(counts) + 1)[1:-1]
        share = counts.cumsum()[:-1] / counts.sum()
        axes.plot(ends, share - ends, "D-", color=ORANGE, markersize=4, linewidth=1.4, label="hidden")
    axes.set_xlabel("share of draws below the measured mean (PIT)")
    axes.set_ylabel("measured minus promised share")
    axes.set_xlim(0, 1)
    _legend(axes)
    return figure


@styled
def coverage_by_level(draws: xr.DataTree, held_out: HeldOut | None = None) -> Figure:
    """How many measured means lie inside intervals that promise 10 % ... 95 %; on the diagonal they keep it."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    curve = coverage_curve(*pit(checks_of(draws)))
    percent = Curve(*(100 * np.asarray(field) for field in curve))
    _draw_band(axes, percent)
    axes.plot([0, 100], [0, 100], color=GREY, linewidth=1, linestyle="--")
    axes.plot(percent.x, percent.value, "o-", color=BLUE, markersize=4, linewidth=1.4, label="training")
    if held_out is not None:
        mean = held_out["mean"]
        levels = sorted(int(name.removeprefix("covered_")) for name in mean if name.startswith("covered_"))
        for level in levels:
            own = 100 * np.asarray(held_out["per_batch"][f"covered_{level}"], float)
            axes.vlines(level, own.min(), own.max(), color=ORANGE, linewidth=1)
        covered = [100 * mean[f"covered_{level}"] for level in levels]
        axes.plot(
            levels, covered, "D", color=ORANGE, markersize=5, label="hidden (line: from worst to best batch)"
        )
    axes.set(xlim=(0, 100), ylim=(0, 100))
    axes.set_xlabel("promised: level of the interval (%)")
    axes.set_ylabel("kept: measured means inside (%)")
    _legend(axes)
    return figure


@styled
def coverage_of_batches(draws: xr.DataTree) -> Figure:
    """One row per training batch: share of its measured means inside their 90 % intervals, and the band of chance.

    Raises: ValueError where the draws do not say which batch a check is of.
    """
    checks = checks_of(draws)
    if checks.batch is None:
        raise ValueError("posterior_predictive has no coordinate batch_name")
    names, curve = coverage_by_batch(*pit(checks), checks.batch, INTERVAL)
    order = np.argsort(curve.value, kind="stable")[:MAX_BATCH_ROWS]  # the worst first
    rows = np.arange(len(order))[::-1]
    figure = Figure(figsize=(_SIZE[0], 1.1 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.hlines(rows, 100 * curve.low[order], 100 * curve.high[order], color=PALE, linewidth=9)
    axes.axvline(100 * INTERVAL, color=GREY, linewidth=1, linestyle="--")
    odd = (curve.value < curve.low) | (curve.value > curve.high)
    for kind, colour in ((~odd[order], BLUE), (odd[order], ORANGE)):
        axes.plot(100 * curve.value[order][kind], rows[kind], "o", color=colour, markersize=5)
    axes.set_yticks(rows, [f"{short(names[i], 20)} ({curve.x[i]})" for i in order])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.7, len(order) - 0.3)
    axes.set_xlabel(f"measured means inside their {100 * INTERVAL:.0f} % interval (%)")
    return figure


@styled
def predictive_distribution(draws: xr.DataTree) -> Figure:
    """ArviZ's posterior predictive check: distribution of standardised training means, drawn (blue) and measured."""
    import arviz
    from matplotlib import pyplot

    checks = checks_of(draws)
    tree = xr.DataTree.from_dict(
        {
            "posterior_predictive": xr.Dataset(
                {"mean": (("chain", "draw", "observation"), checks.drawn[None])}
            ),
            "observed_data": xr.Dataset({"mean": ("observation", checks.observed)}),
        }
    )
    collection = arviz.plot_ppc_dist(
        tree,
        kind="ecdf",
        num_samples=min(40, len(checks.drawn)),
        backend="matplotlib",
        visuals={
            "predictive_dist": {"color": BLUE, "alpha": 0.15},
            "observed_dist": {"color": INK},
            "title": False,
        },
    )
    figure = collection.viz["figure"].item()
    pyplot.close(figure)  # it is no window of pyplot's
    figure.set_size_inches(_SIZE)
    figure.set_layout_engine("constrained")
    axes = figure.axes[0]
    axes.set(xlabel="mean of a population (standardised)", ylabel="share of populations below")
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_size(9)
    return figure


def _draw_band(axes: Axes, curve: Curve) -> None:
    axes.fill_between(curve.x, curve.low, curve.high, color=PALE, linewidth=0, label="chance")


def _legend(axes: Axes) -> None:
    axes.legend(
        frameon=False, fontsize=8.5, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderpad=0,
        handlelength=1.4, columnspacing=1.2, handletextpad=0.5,
    )  # fmt: skip
