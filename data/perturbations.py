"""Perturbations as structure: combinations of single perturbations, and features of these."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from hilbertcell.data.validation import DataError, choose_from, listing


def split_combination(label: str) -> tuple[str, ...]:
    """The single perturbations of a label, in its order: 'A+B' -> ('A', 'B').

    Raises: DataError if a part is empty or occurs twice.
    """
    parts = tuple(part.strip() for part in str(label).split("+"))
    if "" in parts or len(set(parts)) < len(parts):
        what = "has an empty part beside '+'" if "" in parts else "names one part twice"
        raise DataError(f"perturbation = {label!r}: {what}; write combinations as 'A+B', each part once")
    return parts


@dataclass(frozen=True, eq=False)
class PerturbationTable:
    """T perturbations made of U single ones.

    Attributes:
        names: (T,) labels, without the control label.
        singles: (U,) single perturbations that have a column in `design`.
        components: the single perturbations of each label.
        design: (T, U) float64, 1 where a label contains a single perturbation. A part that is not among
            `singles` has no column: such a label is known by its features only.
        features: (T, F) float64, summed over the components; None without features.
        known: (T,) bool, whether all components are among `singles`.

    """

    names: tuple[str, ...]
    singles: tuple[str, ...]
    components: tuple[tuple[str, ...], ...]
    design: np.ndarray
    features: np.ndarray | None
    known: np.ndarray


def perturbation_table(
    names: Sequence[str],
    control: str,
    *,
    features: pd.DataFrame | None = None,
    singles: Sequence[str] | None = None,
) -> PerturbationTable:
    """The structure of perturbation labels.

    Args:
        names: (T,) unique labels, without `control`.
        control: the label of unperturbed cells, which no label may contain.
        features: index = names of single perturbations, numeric columns.
        singles: the single perturbations a fit knows; by default those of `names`.

    Raises:
        DataError: if a label contains the control, or a part that is not among `singles` and has no features,
            or if features are given but lack a part.

    """
    names = tuple(str(name) for name in names)
    components = tuple(split_combination(name) for name in names)
    parts = sorted({part for parts in components for part in parts})
    if control in parts:
        raise DataError(f"control = {control!r}: is part of a perturbation label; leave controls out")
    columns = tuple(parts) if singles is None else tuple(str(single) for single in singles)
    if features is None:
        unknown = [part for part in parts if part not in columns]
        if unknown:
            cure = "give perturbation_features, with which the model can extrapolate"
            known = choose_from(unknown[0], columns)
            raise DataError(
                f"perturbation = {listing(unknown)}: unknown and without features ({known}); {cure}"
            )
    else:
        lacking = [part for part in parts if part not in features.index]
        if lacking:
            what = f"no features for {listing(lacking)}"
            raise DataError(f"perturbation_features = {len(features)} rows: {what}; add a row for each")
    place = {single: i for i, single in enumerate(columns)}
    design = np.zeros((len(names), len(columns)))
    for i, of_label in enumerate(components):
        design[i, [place[part] for part in of_label if part in place]] = 1.0
    summed = None
    if features is not None:
        table = features.to_numpy(dtype=np.float64)
        where = [features.index.get_indexer(list(of_label)) for of_label in components]
        summed = np.array([table[rows].sum(axis=0) for rows in where]).reshape(len(names), table.shape[1])
    is_known = np.array([all(part in place for part in of_label) for of_label in components], dtype=bool)
    return PerturbationTable(names, columns, components, design, summed, is_known)
