"""Scores on the terminal: the few columns one decides by, in 80 characters; the rest is in the JSON file."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hilbertcell.analyses.cell_summary import cell_rows
from hilbertcell.analyses.law_summary import VERDICT, law_rows

LAW = {
    "excess x null": "squared error",
    "CRPS x null": "CRPS",
    "cover of 90 %": "90 % cover",
    VERDICT: "verdict",
}
CELLS = {
    "energy distance": "energy distance",
    "DE precision": "DE precision",
    "Pearson": "Pearson of shift",
    "DE genes called / true": "DE genes called / true",
    "within-variance ratio": "variance within",
}
NOTE = (
    "Error and CRPS are multiples of the null, which adds the training batches' mean shift, with its spread, to the "
    "new controls. The verdict is on CRPS, batch by batch; it takes four batches."
)
COLOURS = {"wins": "green", "loses": "bold red", "undecided": "yellow"}


def print_scores(scores: Mapping[str, Any], console: Console) -> None:
    """Print what `evaluate` or `benchmark` returns: laws, as multiples of the null, then cells if there are any."""
    law = scores["law"]
    console.print(_table(f"{law['num_targets']} laws", law_rows(law), LAW))
    console.print(NOTE, style="dim", highlight=False)
    if "cells" in scores:
        console.print(_table("Cells", cell_rows(scores["cells"]), CELLS))


def _table(title: str, rows: pd.DataFrame, columns: Mapping[str, str]) -> Padding:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column(title, no_wrap=True)
    for name in columns.values():
        table.add_column(name, justify="right")
    for model, row in rows[list(columns)].iterrows():
        table.add_row(
            str(model), *(Text(value, style=COLOURS.get(value, ""), no_wrap=True) for value in map(str, row))
        )
    return Padding(table, (1, 0, 0, 0))
