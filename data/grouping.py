"""From one label per cell to a table of populations, and what is worth knowing about them."""

import json
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from hilbertcell.data.validation import Labels, Problems, listing, number_of

SMALL = 10  # populations with fewer cells are listed: their noise C/n is hardly Gaussian


def join_contexts(problems: Problems, keys: Sequence[str], columns: Sequence[Labels]) -> Labels:
    """The labels of several columns joined with ' | '; cells with a missing part are missing.

    Notes joined labels that two different contexts would share.
    """
    if len(columns) == 1:
        return columns[0]
    codes = np.stack([labels.codes for labels in columns], axis=1)
    complete = (codes >= 0).all(axis=1)
    tuples, inverse = np.unique(codes[complete], axis=0, return_inverse=True)
    names = [" | ".join(str(c.names[i]) for c, i in zip(columns, row, strict=True)) for row in tuples]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(
            "context", name, f"two contexts of {listing(keys)} share this name", "rename labels with ' | '"
        )
    texts = np.full(len(codes), None, dtype=object)
    texts[complete] = np.array(names, dtype=object)[inverse.reshape(-1)]
    return Labels(pd.Series(texts))


def group_cells(
    problems: Problems,
    context: Labels,
    perturbation: Labels,
    batch: Labels,
    dose: np.ndarray,
    control: str,
) -> tuple[pd.DataFrame, np.ndarray]:
    """The table of populations and the row of each cell in it.

    Args:
        problems: where two populations of one name are noted (doses that differ beyond six digits).
        context: of N cells, none missing; likewise perturbation and batch.
        perturbation: see context.
        batch: see context.
        dose: (N,) float64, nan for controls or where there are no doses.
        control: the label of unperturbed cells.

    Returns:
        `labels` as in `Populations.labels`, and cell_population (N,) int64.

    """
    doses, dose_codes = np.unique(dose, return_inverse=True)  # nan is one dose of its own
    sizes = (len(context.names), len(batch.names), len(perturbation.names), len(doses))
    key = np.ravel_multi_index((context.codes, batch.codes, perturbation.codes, dose_codes), sizes)
    used, inverse, counts = np.unique(key, return_inverse=True, return_counts=True)
    c, b, p, d = np.unravel_index(used, sizes)
    table = pd.DataFrame(
        {
            "context": context.names[c],
            "perturbation": perturbation.names[p],
            "dose": doses[d],
            "batch": batch.names[b],
            "num_cells": counts.astype(np.int64),
            "is_control": perturbation.names[p] == control,
        }
    )
    order = np.lexsort(
        (d, p, ~table["is_control"].to_numpy(), b, c)
    )  # names are sorted, so codes sort like them
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    table = table.iloc[order]
    table.index = pd.Index(
        [population_name(*row) for row in table.iloc[:, :4].itertuples(index=False)], name="population"
    )
    twice = table.index[table.index.duplicated()].unique()
    if len(twice):
        cure = "round the doses to six digits, or rename labels that hold ' | ' or ' @ '"
        problems.add("population", twice[0], f"{number_of(len(twice), 'name')} for several populations", cure)
    return table, rank[inverse.reshape(-1)]


def population_name(context: str, perturbation: str, dose: float, batch: str) -> str:
    """'context | perturbation | batch', with ' @ dose' after the perturbation unless the dose is nan."""
    return f"{context} | {perturbation}{'' if np.isnan(dose) else f' @ {dose:g}'} | {batch}"


def labels_to_json(labels: pd.DataFrame) -> str:
    """A table of populations as JSON text, without loss."""
    columns = {name: column.tolist() for name, column in labels.items()}
    if "dose" in columns:  # JSON has no nan
        columns["dose"] = [None if np.isnan(dose) else dose for dose in columns["dose"]]
    return json.dumps({"population": labels.index.tolist(), **columns})


def labels_from_json(text: str) -> pd.DataFrame:
    """The inverse of `labels_to_json`."""
    columns = json.loads(text)
    index = pd.Index(columns.pop("population"), name="population")
    labels = pd.DataFrame(columns, index=index)
    return labels.astype({"dose": np.float64}) if "dose" in labels else labels


def population_warnings(labels: pd.DataFrame, unused: Mapping[str, Sequence[str]]) -> list[str]:
    """Sentences on small populations, (context, batch) without controls, and categories without cells.

    Args:
        labels: the table of populations.
        unused: obs column -> its categories without cells.

    """
    found = []
    small = labels[labels["num_cells"] < SMALL]
    if len(small):
        shown = listing((f"{name} ({n})" for name, n in small["num_cells"].items()), 5)
        found.append(
            f"{len(small)} of {number_of(len(labels), 'population')} with fewer than {SMALL} cells: {shown}"
        )
    controlled = labels.groupby(["context", "batch"], sort=True)["is_control"].any()
    without = controlled.index[~controlled]
    if len(without):
        shown = listing((f"{context} | {batch}" for context, batch in without), 5)
        found.append(
            f"{len(without)} of {len(controlled)} (context, batch) without control cells: their control means are"
            f" inferred, and no cells can be sampled for them: {shown}"
        )
    for column, names in unused.items():
        if names:
            found.append(f"categories of {column!r} without cells: {listing(names, 5)}")
    return found
