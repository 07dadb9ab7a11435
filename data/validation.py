"""Refusing bad input at the door: every problem of a file in one error, one line each, with its cure.

A reader collects `Problems` for as long as it can go on, and raises once. Anything that is legal but worth
knowing (small populations, equal rows) goes to `Populations.warnings` instead; nothing is dropped or repaired.
"""

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches

import numpy as np
import pandas as pd

MISSING_TEXTS = ("", "nan", "<na>")  # what str() makes of a missing label, and the empty one


class DataError(ValueError):
    """Input that hilbertcell refuses: one line per problem, each with the key, the value and the cure."""


class Problems:
    """The problems of one input, reported together.

    Example:
        >>> problems = Problems("cells.h5ad")
        >>> problems.add("batch", "donr", "is not a column of obs", "choose 'donor'")
        >>> try:
        ...     problems.raise_if_any()
        ... except DataError as error:
        ...     print(error)
        1 problem in cells.h5ad:
          batch = 'donr': is not a column of obs; choose 'donor'
    """

    def __init__(self, source: str):
        """Collect problems of `source`, whose name begins the message."""
        self.source = source
        self.lines: list[str] = []

    def add(self, key: str, value: object, what: str, cure: str) -> None:
        """Note one problem: the argument or key it is about, its value, what is wrong, what to do."""
        self.lines.append(f"{key} = {value!r}: {what}; {cure}")

    def raise_if_any(self) -> None:
        """Raise one `DataError` that lists all problems noted so far, if there are any."""
        if self.lines:
            raise DataError(
                f"{number_of(len(self.lines), 'problem')} in {self.source}:\n"
                + "\n".join(f"  {line}" for line in self.lines)
            )


def number_of(count: int, noun: str) -> str:
    """'1 cell', '2 cells'."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def listing(names: Iterable[object], limit: int = 10) -> str:
    """Names in quotes, the first `limit` of them, and how many more there are."""
    names = list(names)
    shown = ", ".join(repr(str(name)) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown or "none"


def choose_from(wanted: str, names: Sequence[object]) -> str:
    """The cure for a name that is not there: the closest names first, else all of them."""
    texts = [str(name) for name in names]
    close = get_close_matches(wanted, texts, n=3)
    return (
        f"did you mean {listing(close)}? there are {listing(texts)}"
        if close
        else f"there are {listing(texts)}"
    )


def check_unique(problems: Problems, key: str, names: np.ndarray, cure: str) -> None:
    """Note names (N,) of genes or cells that are missing or occur more than once."""
    index = pd.Index(names)
    missing = int(index.isna().sum())
    if missing:
        problems.add(key, None, f"{number_of(missing, 'name')} missing", cure)
    twice = index[index.duplicated() & ~index.isna()].unique()
    if len(twice):
        problems.add(
            key, str(twice[0]), f"{number_of(len(twice), 'name')} more than once: {listing(twice, 5)}", cure
        )


class Labels:
    """One obs column as text: `codes` (N,) int64 into `names` (unique str; -1 where the label is missing)."""

    def __init__(self, column: pd.Series):
        """Read the labels (strings, numbers or categories) of a column of N cells."""
        categorical = column if isinstance(column.dtype, pd.CategoricalDtype) else column.astype("category")
        texts = np.array([str(name) for name in categorical.cat.categories], dtype=object)
        codes = np.asarray(categorical.cat.codes, dtype=np.int64)
        counts = np.bincount(codes[codes >= 0], minlength=len(texts))
        missing = np.array([text.strip().casefold() in MISSING_TEXTS for text in texts], dtype=bool)
        self.without_cells = sorted(texts[(counts == 0) & ~missing])
        used = (counts > 0) & ~missing
        # Two categories of different type can print alike (1 and "1"): `alike` tells, `names` stays unique.
        self.names, inverse = np.unique(texts[used].astype(str), return_inverse=True)
        self.printed_alike = sorted({str(t) for t in texts[used] if (texts[used] == t).sum() > 1})
        remap = np.full(len(texts) + 1, -1, dtype=np.int64)
        remap[np.flatnonzero(used)] = inverse
        self.codes = remap[codes]

    @property
    def texts(self) -> np.ndarray:
        """The labels of all cells, (N,) str; the empty text where a label is missing."""
        return np.append(self.names, "")[self.codes]


def check_labels(problems: Problems, key: str, column: str, labels: Labels, cell_names: np.ndarray) -> None:
    """Note missing labels, and labels that differ only by case, surrounding spaces or type."""
    missing = np.flatnonzero(labels.codes < 0)
    if len(missing):
        problems.add(
            key,
            column,
            f"{number_of(len(missing), 'cell')} without a label (first: {str(cell_names[missing[0]])!r})",
            "label these cells or remove them",
        )
    groups: dict[str, list[str]] = {}
    for name in labels.names:
        groups.setdefault(str(name).strip().casefold(), []).append(str(name))
    for group in groups.values():
        if len(group) > 1:
            problems.add(
                key, column, f"{listing(group)} differ only by case or surrounding spaces", "use one"
            )
    for name in labels.printed_alike:
        problems.add(key, column, f"labels of different types are all written {name!r}", "use one type")


def check_perturbation_labels(problems: Problems, column: str, names: Iterable[str], control: str) -> None:
    """Note perturbation labels whose parts around '+' are empty, repeated, the control, or near-doubles."""
    spellings: dict[str, set[str]] = {}
    combinations: dict[tuple[str, ...], list[str]] = {}
    for name in (str(name) for name in names if name != control):
        parts = [part.strip() for part in name.split("+")]
        if "" in parts:
            problems.add(
                "perturbation",
                column,
                f"label {name!r} has an empty part beside '+', which joins the parts of a combination",
                "write 'A+B', or rename a perturbation whose own name holds a '+'",
            )
            continue
        if len(set(parts)) < len(parts) or (len(parts) > 1 and control in parts):
            culprit = "the control label" if control in parts else "one part twice"
            problems.add(
                "perturbation", column, f"combination {name!r} holds {culprit}", "name each part once"
            )
            continue
        combinations.setdefault(tuple(sorted(parts)), []).append(name)
        if len(parts) > 1:
            for part in parts:
                spellings.setdefault(part.casefold(), set()).add(part)
    for name in (str(name) for name in names if name != control and "+" not in str(name)):
        if name.strip().casefold() in spellings:
            spellings[name.strip().casefold()].add(name)
    for variants in spellings.values():
        if len(variants) > 1:
            what = (
                f"parts {listing(sorted(variants))} of combinations differ only by case or surrounding spaces"
            )
            problems.add("perturbation", column, what, "use one")
    for group in combinations.values():
        if len(group) > 1:
            problems.add("perturbation", column, f"{listing(group)} name the same combination", "use one")


def check_dose(
    problems: Problems, column: str, dose: pd.Series, perturbed: np.ndarray, cell_names: np.ndarray
) -> np.ndarray:
    """Doses (N,) float64 of the perturbed cells, nan for the others; notes doses that are no numbers.

    The dose of a control cell is ignored, whatever it is.
    """
    result = np.full(len(dose), np.nan)
    values = dose[perturbed]
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = values.astype(values.cat.categories.dtype)
    if not pd.api.types.is_numeric_dtype(values.dtype) or pd.api.types.is_bool_dtype(values.dtype):
        numeric = pd.to_numeric(values, errors="coerce")
        text = values[numeric.isna() & values.notna()]
        example = text.iloc[0] if len(text) else values.iloc[0] if len(values) else None
        if example is not None:
            problems.add(
                "dose", column, f"doses must be numbers, found {example!r}", "store numbers in this column"
            )
        return result
    numbers = values.to_numpy(dtype=np.float64, na_value=np.nan)
    if values.dtype in (np.float16, np.float32):  # 0.005 in single precision is 0.005, not 0.00499999989
        unique, inverse = np.unique(values.to_numpy(), return_inverse=True)
        numbers = np.array([float(str(dose)) for dose in unique])[inverse]
    result[perturbed] = numbers
    bad = np.flatnonzero(perturbed)[~np.isfinite(numbers)]
    if len(bad):
        what = f"{number_of(len(bad), 'perturbed cell')} without a finite dose (first: {str(cell_names[bad[0]])!r})"
        problems.add("dose", column, what, "give every perturbed cell a number")
    return result


def check_features(
    problems: Problems, features: pd.DataFrame, components: Iterable[str], source: str
) -> pd.DataFrame | None:
    """The feature table as float64 with a str index; notes doubles, texts, nan and missing perturbations."""
    table = features.copy()
    table.index = pd.Index([str(name) for name in table.index], name="perturbation")
    key = "perturbation_features"
    twice = table.index[table.index.duplicated()].unique()
    if len(twice):
        problems.add(
            key, source, f"rows {listing(twice, 5)} occur more than once", "keep one row per perturbation"
        )
        return None
    texts = [str(c) for c in table.columns if not pd.api.types.is_numeric_dtype(table[c].dtype)]
    if texts:
        problems.add(key, source, f"columns {listing(texts, 5)} are not numbers", "drop or encode them")
        return None
    table = table.astype(np.float64)
    bad = table.index[~np.isfinite(table.to_numpy()).all(axis=1)]
    if len(bad):
        problems.add(key, source, f"rows {listing(bad, 5)} hold nan or inf", "fill in these features")
    absent = sorted(set(components) - set(table.index))
    if absent:
        cure = "add a row for each, or read without perturbation_features"
        problems.add(key, source, f"no features for {listing(absent)}", cure)
    return table


def missing_and_extra(found: Sequence[str], wanted: Sequence[str]) -> Mapping[str, list[str]]:
    """Names in `wanted` but not `found` ("missing"), and the reverse ("extra"), in their own order."""
    have, want = set(found), set(wanted)
    return {"missing": [n for n in wanted if n not in have], "extra": [n for n in found if n not in want]}
