"""Scores on the terminal: one row per score, one column per model, so that both fit the width of a page."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hilbertcell.analyses.cell_summary import cell_rows
from hilbertcell.analyses.law_summary import VERDICT, law_rows

COLOURS = {"wins": "green", "loses": "bold red", "undecided": "yellow"}


def print_scores(scores: Mapping[str, Any], console: Console) -> None:
    """Print what `evaluate` or `benchmark` returns: laws first, then cells if there are any."""
    law = scores["law"]
    console.print(_table(f"Laws of {law['num_targets']} hidden populations", law_rows(law)))
    if "cells" in scores:
        console.print(
            _table(f"Cells of {scores['cells']['num_units']} hidden populations", cell_rows(scores["cells"]))
        )


def _table(title: str, rows: pd.DataFrame) -> Padding:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold cyan")
    table.add_column(title)
    for model in rows.index:
        table.add_column(str(model), justify="right")
    for name, values in rows.items():
        style = COLOURS if name == VERDICT else {}
        table.add_row(str(name), *(Text(str(value), style=style.get(str(value), "")) for value in values))
    return Padding(table, (1, 0, 0, 0))
