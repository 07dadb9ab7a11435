"""`hilbertcell inspect`: which populations a file holds, which are missing, and what is suspicious, at a glance."""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from hilbertcell.data.populations import Populations

MOST_ROWS = 20
NATURAL_SCALE = {
    "counts": "raw counts, analysed as log1p(1e4 count / library size)",
    "log1p": "log1p values, analysed as they are",
    "other": "values of the file's own scale, analysed as they are",
}


def print_summary(populations: Populations, source: str, console: Console) -> None:
    """Print size and scale, one table each of contexts, perturbations and batches, the gaps, and the warnings."""
    labels, keys = populations.labels, populations.keys
    num_cells = int(labels["num_cells"].sum())
    console.print(source, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(
        f"{num_cells:,} cells x {len(populations.genes):,} genes, {NATURAL_SCALE[keys.scale]}",
        highlight=False,
    )
    sizes = labels["num_cells"]
    console.print(
        f"{len(labels):,} populations ({int(labels['is_control'].sum()):,} of controls) of "
        f"{sizes.min():,} to {sizes.max():,} cells, median {sizes.median():,.0f}",
        highlight=False,
    )
    for table in (_contexts(labels), _perturbations(labels), _batches(labels)):
        console.print(Padding(table, (1, 0, 0, 0)))
    complete = "none: every context has every perturbation in every batch"
    _section(console, "Gaps in the design", "cyan", gaps(labels), complete)
    _section(console, "Warnings", "yellow", populations.warnings, "none")


def gaps(labels: pd.DataFrame) -> list[str]:
    """One line per kind of gap in the design (context x perturbation x batch); labels as in `Populations`.

    Pairs of context and batch without controls are not among them: they are warnings of the file.
    """
    lines = []
    pairs = labels.groupby(["context", "batch"], sort=True)["is_control"].all()
    if pairs.any():
        lines.append(f"control cells only: {_some(_compressed(pairs))}")
    perturbed = labels[~labels["is_control"]]
    what = _what(perturbed)
    batches = perturbed.assign(what=what).groupby(["context", "what"], sort=True)["batch"].nunique()
    thin = [f"{' | '.join(pair)} (in {n})" for pair, n in batches.items() if n < perturbed["batch"].nunique()]
    if thin:
        lines.append(f"not in all {perturbed['batch'].nunique()} batches with perturbed cells: {_some(thin)}")
    contexts, num_contexts = (
        perturbed.groupby(what, sort=True)["context"].nunique(),
        labels["context"].nunique(),
    )
    absent = [f"{name} (in {n})" for name, n in contexts.items() if n < num_contexts]
    if absent:
        lines.append(f"not in all {num_contexts} contexts: {_some(absent)}")
    return lines


def _compressed(pairs: pd.Series) -> list[str]:
    """The (context, batch) pairs that are true; a batch or context that is true throughout is said once."""
    names = []
    for level, other in (("batch", "contexts"), ("context", "batches")):
        whole = pairs.groupby(level=level, sort=True).all()
        num = pairs.groupby(level=level, sort=True).size()
        names += [f"{name} (in all {num[name]} {other})" for name in whole.index[whole]]
        pairs = pairs[~pairs.index.get_level_values(level).isin(whole.index[whole])]
    return names + [" | ".join(pair) for pair in pairs.index[pairs]]


def _what(perturbed: pd.DataFrame) -> pd.Series:
    """Perturbation with its dose, as one label."""
    dose = perturbed["dose"].map(lambda value: "" if np.isnan(value) else f" @ {value:g}")
    return perturbed["perturbation"] + dose


def _contexts(labels: pd.DataFrame) -> Table:
    rows = [
        (context, *_cells(part), f"{part['batch'].nunique():,}", f"{_num_perturbations(part):,}")
        for context, part in labels.groupby("context", sort=True)
    ]
    return _table(("Context", "control cells", "perturbed cells", "batches", "perturbations"), rows)


def _perturbations(labels: pd.DataFrame) -> Table:
    perturbed = labels[~labels["is_control"]]
    rows: list[tuple[str, ...]] = []
    for name, part in perturbed.groupby("perturbation", sort=True):
        doses = ", ".join(f"{dose:g}" for dose in sorted(part["dose"].dropna().unique()))
        row = (name, f"{part['num_cells'].sum():,}", f"{len(part):,}", f"{part['context'].nunique():,}")
        rows.append((*row, f"{part['batch'].nunique():,}", doses))
    heads = ["Perturbation", "cells", "populations", "contexts", "batches", "doses"]
    shown = slice(0, -1 if perturbed["dose"].isna().all() else None)
    return _table(heads[shown], [row[shown] for row in rows])


def _batches(labels: pd.DataFrame) -> Table:
    rows = [
        (batch, *_cells(part), f"{part['context'].nunique():,}", f"{_num_perturbations(part):,}")
        for batch, part in labels.groupby("batch", sort=True)
    ]
    return _table(("Batch", "control cells", "perturbed cells", "contexts", "perturbations"), rows)


def _cells(part: pd.DataFrame) -> tuple[str, str]:
    controls = part.loc[part["is_control"], "num_cells"].sum()
    return f"{controls:,}", f"{part['num_cells'].sum() - controls:,}"


def _num_perturbations(part: pd.DataFrame) -> int:
    return part.loc[~part["is_control"], "perturbation"].nunique()


def _table(heads: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="bold cyan")
    for i, head in enumerate(heads):
        table.add_column(head, justify="left" if i == 0 or head == "doses" else "right", overflow="fold")
    for row in rows[:MOST_ROWS]:
        table.add_row(*(Text(cell) for cell in row))
    if len(rows) > MOST_ROWS:
        table.add_row(Text(f"... and {len(rows) - MOST_ROWS:,} more", style="dim"))
    return table


def _section(console: Console, title: str, colour: str, lines: Iterable[str], empty: str) -> None:
    console.print(Text(f"\n{title}", style=f"bold {colour}"))
    for line in lines or [empty]:
        bullet = Table.grid(padding=(0, 1))
        bullet.add_row("-", Text(line))
        console.print(bullet)


def _some(items: list[str], most: int = 6) -> str:
    return ", ".join(items[:most]) + (f" and {len(items) - most:,} more" if len(items) > most else "")
