"""From h5ad files, zarr stores or AnnData to `Populations`: the only place in the project that reads AnnData.

Everything that can be wrong with a file is looked for before anything is computed, and reported together.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData

from hilbertcell.data.grouping import group_cells, join_contexts, population_warnings
from hilbertcell.data.matrices import CellMatrix
from hilbertcell.data.perturbations import split_combination
from hilbertcell.data.populations import Keys, Populations
from hilbertcell.data.scan import Scan, check_scale, scan_matrix
from hilbertcell.data.tables import Source, Table, open_table
from hilbertcell.data.validation import (
    Labels,
    Problems,
    check_dose,
    check_features,
    check_labels,
    check_perturbation_labels,
    check_unique,
    choose_from,
    listing,
    missing_and_extra,
    number_of,
)


def read_populations(
    source: Source | Sequence[Source],
    *,
    perturbation: str,
    control: str,
    context: str | Sequence[str],
    batch: str,
    dose: str | None = None,
    library_size: str | None = None,
    layer: str | None = None,
    scale: str | None = None,
    perturbation_features: str | Path | pd.DataFrame | None = None,
    require: Sequence[str] = ("control", "perturbed"),
    progress: bool = False,
) -> Populations:
    """Read the labels of a screen, check the whole file once in blocks, and give access to its cells.

    Args:
        source: an .h5ad file or a .zarr folder (CSR or dense), an AnnData (in memory or backed), or a list of
            them, of any kinds, with the same genes, read as if concatenated.
        perturbation: obs column of what was done to the cell; 'A+B' is the combination of A and B.
        control: label of unperturbed cells in that column.
        context: obs column, or columns, of the observed kind of cell.
        batch: obs column of the donor, replicate or plate.
        dose: obs column of numbers; ignored for control cells.
        library_size: obs column of the total counts of each cell, for files that hold only some of the genes;
            row sums if None. For counts only.
        layer: read this layer instead of X.
        scale: "counts", "log1p" or "other"; may be left out only for whole, non-negative numbers (counts).
        perturbation_features: CSV file (first column: names of single perturbations) or such a data frame.
        require: kinds of cells that must be there, of "control" and "perturbed"; to predict, controls will do.
        progress: whether to show a progress bar.

    Raises:
        DataError: with all problems found, each with its key, its value and a cure.

    """
    contexts = (context,) if isinstance(context, str) else tuple(context)
    keys = Keys(perturbation, control, contexts, batch, dose, library_size, layer, scale or "counts")
    sources = [source] if isinstance(source, str | Path | AnnData) else list(source)
    tables = _open_all(sources, layer)
    problems = Problems(tables[0].name if len(tables) == 1 else f"{len(tables)} files from {tables[0].name}")

    matrix = _stack(problems, tables)
    cell_obs = tables[0].obs if len(tables) == 1 else pd.concat([table.obs for table in tables])
    cell_names = cell_obs.index.to_numpy().astype(str)
    genes = tables[0].genes
    cure = "make them unique, e.g. with obs_names_make_unique() or a prefix per file"
    check_unique(problems, "cell names", cell_obs.index.to_numpy(), cure)

    columns = _label_columns(problems, keys, tables, cell_obs, cell_names)
    perturbed = _check_kinds(problems, keys, columns.get(perturbation), require)
    doses = np.full(len(cell_obs), np.nan)
    if dose is not None and dose in cell_obs and perturbed is not None:
        doses = check_dose(problems, dose, cell_obs[dose], perturbed, cell_names)
    features = _read_features(problems, perturbation_features, columns.get(perturbation), control)

    scan, found = None, None
    if matrix is not None:
        scan = scan_matrix(matrix, progress=progress)
        found = check_scale(problems, layer or "X", scale, scan, cell_names, genes)
    library, library_warnings = _library_size(problems, keys, found, scan, cell_obs, cell_names)
    problems.raise_if_any()
    assert matrix is not None  # or there was a problem, as for the next two
    assert scan is not None
    assert found is not None

    joined = join_contexts(problems, contexts, [columns[key] for key in contexts])
    labels, cell_population = group_cells(
        problems, joined, columns[perturbation], columns[batch], doses, control
    )
    problems.raise_if_any()
    unused = {key: column.without_cells for key, column in columns.items()}
    return Populations(
        keys=replace(keys, scale=found),
        genes=genes,
        labels=labels,
        cell_population=cell_population,
        cell_names=cell_names,
        library_size=library,
        perturbation_features=features,
        warnings=(*_cell_warnings(scan), *library_warnings, *population_warnings(labels, unused)),
        matrix=matrix,
        cell_obs=cell_obs,
    )


def _open_all(sources: Sequence[Source], layer: str | None) -> list[Table]:
    """All sources, opened; those that cannot be are reported together."""
    problems = Problems(f"{len(sources)} sources")
    if not sources:
        problems.add("source", [], "names no file", "give at least one .h5ad file, .zarr folder or AnnData")
    tables = [open_table(problems, source, layer) for source in sources]
    problems.raise_if_any()
    return [table for table in tables if table is not None]


def _stack(problems: Problems, tables: Sequence[Table]) -> CellMatrix | None:
    """The matrices of all tables with the genes of the first; None (and why, in `problems`) if they do not fit."""
    before = len(problems.lines)
    genes = tables[0].genes
    for table in tables:
        where = "gene names" if len(tables) == 1 else f"gene names of {table.name}"
        check_unique(problems, where, table.genes, "make them unique, e.g. with var_names_make_unique()")
    if len(problems.lines) > before:
        return None
    columns: list[np.ndarray | None] = []
    for table in tables:
        differ = missing_and_extra(table.genes.tolist(), genes.tolist())
        if differ["missing"] or differ["extra"]:
            what = f"genes differ from {tables[0].name}: missing {listing(differ['missing'])}"
            problems.add(
                "source", table.name, f"{what}, extra {listing(differ['extra'])}", "use the same genes"
            )
            continue
        same = np.array_equal(table.genes, genes)
        columns.append(None if same else pd.Index(table.genes).get_indexer(genes))
    if len(problems.lines) > before:
        return None
    return CellMatrix(tuple(table.part for table in tables), tuple(columns))


def _label_columns(
    problems: Problems, keys: Keys, tables: Sequence[Table], cell_obs: pd.DataFrame, cell_names: np.ndarray
) -> dict[str, Labels]:
    """The label columns that are there, checked; notes the keys that are not, and keys used twice."""
    roles = [
        ("perturbation", keys.perturbation),
        *(("context", key) for key in keys.context),
        ("batch", keys.batch),
    ]
    if not keys.context:
        problems.add("context", (), "names no column", "name at least one column of obs")
    optional = [(role, key) for role in ("dose", "library_size") if (key := getattr(keys, role)) is not None]
    for table in tables:
        where = "" if len(tables) == 1 else f" of {table.name}"
        for role, key in [*roles, *optional]:
            if key not in table.obs:
                problems.add(role, key, f"is not a column of obs{where}", choose_from(key, table.obs.columns))
    seen: dict[str, str] = {}
    for role, key in [*roles, *optional]:
        if key in seen:
            problems.add(role, key, f"is already the {seen[key]} column", "name a column of its own")
        seen.setdefault(key, role)
    columns = {}
    for role, key in roles:
        if key in cell_obs and key not in columns:
            columns[key] = Labels(cell_obs[key])
            check_labels(problems, role, key, columns[key], cell_names)
    if keys.perturbation in columns:
        check_perturbation_labels(problems, keys.perturbation, columns[keys.perturbation].names, keys.control)
    return columns


def _check_kinds(
    problems: Problems, keys: Keys, labels: Labels | None, require: Sequence[str]
) -> np.ndarray | None:
    """Which cells are perturbed, (N,) bool; notes an absent control label and kinds of cells that are not there."""
    if labels is None:
        return None
    perturbed = (labels.texts != keys.control) & (labels.codes >= 0)
    if keys.control not in labels.names and "control" in require:
        what = f"no cell has this label in {keys.perturbation!r}"
        problems.add("control", keys.control, what, choose_from(keys.control, labels.names.tolist()))
    if "perturbed" in require and not perturbed.any():
        what = f"every cell is labelled {keys.control!r}: there are no perturbed cells"
        problems.add("perturbation", keys.perturbation, what, "add perturbed cells, or choose another column")
    return perturbed


def _read_features(
    problems: Problems,
    given: str | Path | pd.DataFrame | None,
    perturbations: Labels | None,
    control: str,
) -> pd.DataFrame | None:
    """Perturbation features from a CSV file or a data frame, checked against the perturbations of the cells."""
    if given is None:
        return None
    if isinstance(given, pd.DataFrame):
        source, table = "data frame", given
    else:
        source = str(given)
        try:
            # Genes may be called NA or NAN: only empty fields of the other columns are missing values.
            table = pd.read_csv(given, index_col=0, dtype={0: str}, keep_default_na=False)
        except (OSError, EOFError, ValueError) as error:
            problems.add(
                "perturbation_features", source, f"cannot be read: {error}", "give a CSV file with a header"
            )
            return None
    names = (
        [] if perturbations is None else [name for name in perturbations.names.tolist() if name != control]
    )
    components = {part for name in names for part in split_combination(name)}
    return check_features(problems, table, components, source)


def _library_size(
    problems: Problems,
    keys: Keys,
    scale: str | None,
    scan: Scan | None,
    cell_obs: pd.DataFrame,
    cell_names: np.ndarray,
) -> tuple[np.ndarray | None, list[str]]:
    """Total counts per cell (N,), None unless the scale is counts; and a warning if they are below the row sums."""
    column = keys.library_size
    if column is None or column not in cell_obs:
        return (scan.row_sums if scan is not None and scale == "counts" else None), []
    if scale in ("log1p", "other"):
        what = f"library sizes are for counts, the scale is {scale!r}"
        problems.add("library_size", column, what, "leave library_size out, or read the counts with layer=")
        return None, []
    if not pd.api.types.is_numeric_dtype(cell_obs[column].dtype):
        what = f"library sizes must be numbers, found {cell_obs[column].iloc[0]!r}"
        problems.add("library_size", column, what, "name a column of total counts")
        return None, []
    library = cell_obs[column].to_numpy(dtype=np.float64, na_value=np.nan)
    bad = ~np.isfinite(library) | (library < 0)
    if scan is not None:
        bad |= (library == 0) & (scan.row_sums > 0)
    if bad.any():
        first = int(np.argmax(bad))
        what = (
            f"{int(bad.sum())} cells have no positive library size (first: cell {str(cell_names[first])!r})"
        )
        problems.add(
            "library_size", column, f"{what}, found {library[first]:g}", "name a column of total counts"
        )
        return None, []
    below = 0 if scan is None else int(np.sum(library < scan.row_sums * (1 - 1e-6)))
    if below:
        return library, [
            f"library size {column!r} is below the sum of the counts: {number_of(below, 'cell')}"
        ]
    return library, []


def _cell_warnings(scan: Scan) -> list[str]:
    found = []
    if equal := scan.equal_rows():
        found.append(f"{number_of(equal, 'cell')} with the same values as another cell")
    if empty := scan.empty_rows():
        found.append(f"{number_of(empty, 'cell')} with only zeros")
    return found
