"""One figure of a benchmark: CRPS relative to the null, coloured by verdicts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from hilbertcell.analyses.benchmark import MODEL
from hilbertcell.analyses.bounds import BOUNDS
from hilbertcell.analyses.grid_summary import COLOURS, outcome_against
from hilbertcell.analyses.law_summary import NULL

PALE = {"loses": "#ef9a9a", "undecided": "#e0e0e0", "wins": "#a5d6a7"}
BLANK = "#ffffff"


def grid_figure(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write a PNG: a row per (data set, split), a column per model, each cell its CRPS as a multiple of the null.

    Colours: how hilbertcell does against that model on CRPS; its own column has its worst verdict. Without hilbertcell,
    how each model does against the null. White: no verdict, for what knows the truth.
    """
    rows = [row for row in rows if "law" in row]
    names = list(dict.fromkeys(name for row in rows for name in row["law"]["models"]))
    names.sort(key=lambda name: (name != MODEL, name in BOUNDS))
    subject = MODEL if MODEL in names else None
    figure = Figure(figsize=(2.95 + 1.02 * len(names), 1.45 + 0.5 * len(rows)), dpi=150)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set_axis_off()
    width, height = figure.get_size_inches()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    top, left = 1.35, 2.85
    for j, name in enumerate(names):
        weight = "bold" if name == subject else "normal"
        axes.text(
            left + 1.02 * (j + 0.5), top - 0.08, name.replace(" ", "\n").replace("-b", "-\nb"), ha="center",
            va="bottom", fontsize=9, fontweight=weight,
        )  # fmt: skip
    for i, row in enumerate(rows):
        y = top + 0.5 * i
        axes.text(left - 0.1, y + 0.16, row["data_set"], ha="right", va="center", fontsize=9)
        axes.text(
            left - 0.1, y + 0.34, row["split"].replace("_", " "), ha="right", va="center", fontsize=7.5, color="#616161"
        )  # fmt: skip
        for j, name in enumerate(names):
            model = row["law"]["models"].get(name)
            colour = PALE.get(_outcome(row, name, subject, names), BLANK)
            x = left + 1.02 * j
            axes.add_patch(Rectangle((x, y), 1.0, 0.48, facecolor=colour, edgecolor="#bdbdbd", linewidth=0.5))
            ratio = model["relative_to_null"].get("crps", {}).get("ratio") if model else None
            label = f"{ratio:.3f}" if ratio is not None and np.isfinite(ratio) else "-"
            weight = "bold" if name == subject else "normal"
            axes.text(x + 0.5, y + 0.25, label, ha="center", va="center", fontsize=9, fontweight=weight)
    words = f"{subject} against it" if subject else "against the null"
    handles = [Patch(facecolor=PALE[key], edgecolor=COLOURS[key], label=key) for key in COLOURS]
    axes.legend(
        handles=handles, ncols=3, loc="upper left", bbox_to_anchor=(0.02, 1 - 0.08 / height), fontsize=8,
        frameon=False, title=f"CRPS, multiples of the null; colour: {words}", title_fontsize=9, alignment="left",
        bbox_transform=axes.transAxes, borderpad=0,
    )  # fmt: skip
    temporary = path.with_name(f"{path.stem}.part.png")
    figure.savefig(temporary)
    temporary.replace(path)


def _outcome(row: Mapping[str, Any], name: str, subject: str | None, names: Sequence[str]) -> str:
    if subject is None:
        return outcome_against(row, "crps", name, NULL) or ""
    if name != subject:
        return outcome_against(row, "crps", subject, name) or ""
    own = [outcome_against(row, "crps", subject, other) for other in names]
    return next((outcome for outcome in COLOURS if outcome in own), "")
