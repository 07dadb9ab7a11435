"""Figures of a diagnosis."""

import numpy as np
from matplotlib.figure import Figure

from hilbertcell.analyses.plots import BLUE, GREY, MAX_BATCH_ROWS, ORANGE, PALE, short, style
from hilbertcell.inference.diagnostics.held_out import HeldOut, pit_values
from hilbertcell.inference.diagnostics.result import Result

_GRID = np.linspace(0.0, 1.0, 101)


def course(elbo: np.ndarray) -> Figure:
    """The ELBO (steps,) of the last three quarters of the steps; before, it rises off the scale."""
    start = len(elbo) // 4
    with style():
        figure = Figure(figsize=(4.9, 2.8), layout="constrained")
        axes = figure.subplots()
        steps = np.arange(start, len(elbo))
        axes.plot(steps, elbo[start:], color=BLUE, linewidth=0.6)
        axes.axvspan(0.8 * len(elbo), 0.9 * len(elbo), color=PALE, alpha=0.5, linewidth=0)
        axes.axvspan(0.9 * len(elbo), len(elbo), color=PALE, linewidth=0)
        axes.set(xlabel="step", ylabel="ELBO (higher is better)", xlim=(start, len(elbo)))
    return figure


def by_batch(result: Result, expected: float | None, label: str) -> Figure:
    """One dot a batch; those that the check named in orange; a line at what is expected."""
    shown = list(result.details.items())[:MAX_BATCH_ROWS]
    with style():
        figure = Figure(figsize=(4.9, 0.9 + 0.24 * len(shown)), layout="constrained")
        axes = figure.subplots()
        if expected is not None:
            axes.axvline(expected, color=GREY, linewidth=0.8)
        for row, (name, value) in enumerate(shown):
            axes.plot(value, row, "o", color=ORANGE if name == result.culprit else BLUE, markersize=6)
        axes.set_yticks(range(len(shown)), [short(name) for name, _ in shown])
        axes.set(xlabel=label, ylim=(len(shown) - 0.4, -0.6))
    return figure


def pit(held: list[HeldOut]) -> Figure:
    """Distribution function of PIT values minus the uniform one: a line for each batch, a thick one for all."""
    with style():
        figure = Figure(figsize=(4.9, 3.2), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color=GREY, linewidth=0.8)
        for one in held:
            axes.plot(_GRID, _departure(pit_values([one])), color=GREY, linewidth=0.7, alpha=0.7)
        axes.plot(_GRID, _departure(pit_values(held)), color=BLUE, linewidth=2)
        axes.set(xlabel="PIT: share of draws below the measured mean", ylabel="observed minus uniform")
    return figure


def _departure(values: np.ndarray) -> np.ndarray:
    return np.searchsorted(np.sort(values), _GRID, side="right") / len(values) - _GRID
