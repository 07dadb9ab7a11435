"""The cells of a benchmark's table as files: one per (data set, split, seed, fold, model), named by what it depends on."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from hilbertcell.analyses.law_summary import LawScores, jsonable

DIGITS = 4  # of stored PIT values and residuals: a thousandth of a rank is below any use of them
INFINITE = 1e30  # stands for the residual of an interval of no width: JSON knows no infinity
_SOURCES = ("models", "data", "inference", "analyses")


def cell_path(folder: Path, key: Mapping[str, Any]) -> Path:
    """Where the cell with these settings is stored, whether it exists or not."""
    text = json.dumps(key, sort_keys=True, default=str)
    return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def code_hash() -> str:
    """SHA-256 of the package's own source: the version alone would not notice a change under development.

    Of `analyses` only what makes scores counts; a new figure or table must not repeat a night of fits.
    """
    root = Path(__file__).parent.parent
    scoring = {
        "benchmark", "benchmark_grid", "bounds", "cell_summary", "conformal", "differential_expression",
        "discrimination", "gene_table", "law_scores", "law_summary", "metrics", "planted_frauds",
        "population_scores", "predictors", "shuffled",
    }  # fmt: skip
    digest = hashlib.sha256()
    for source in _SOURCES:
        for path in sorted((root / source).glob("*.py")):
            if source != "analyses" or path.stem in scoring:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def write_cell(path: Path, cell: Mapping[str, Any]) -> None:
    """Write one cell, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.part")
    with temporary.open("w") as file:
        json.dump(jsonable(cell), file, ensure_ascii=False, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def law_record(scores: LawScores, labels: pd.DataFrame) -> dict[str, Any]:
    """The scores of a law on its targets (rows of `labels`), to be stored."""
    return {
        "targets": _columns(scores.targets),
        "names": scores.targets.index.tolist(),
        "context": labels["context"].astype(str).tolist(),
        "batch": labels["batch"].astype(str).tolist(),
        "pit": np.round(scores.pit, DIGITS),
        "residual": None if scores.residual is None else _rounded(scores.residual),
    }


def law_scores(record: Mapping[str, Any]) -> tuple[LawScores, pd.DataFrame]:
    """The inverse of `law_record`: scores, and labels (context, batch)."""
    residual = None if record["residual"] is None else _floats(record["residual"])
    if residual is not None:
        residual[residual >= INFINITE] = np.inf
    targets = _table(record["targets"], record["names"])
    labels = pd.DataFrame({"context": record["context"], "batch": record["batch"]}, index=targets.index)
    return LawScores(targets, _floats(record["pit"]), residual), labels


def unit_record(table: pd.DataFrame) -> dict[str, Any]:
    """The scores of cells of the units (rows), to be stored."""
    return {
        "units": _columns(table.drop(columns="batch")),
        "names": table.index.tolist(),
        "batch": table["batch"].astype(str).tolist(),
    }


def unit_scores(record: Mapping[str, Any]) -> tuple[pd.DataFrame, pd.Series]:
    """The inverse of `unit_record`: scores, and the batch of each unit."""
    table = _table(record["units"], record["names"])
    return table, pd.Series(record["batch"], index=table.index)


def read_cells(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    """The stored cells."""
    for path in paths:
        yield json.loads(path.read_text())


def _columns(table: pd.DataFrame) -> dict[str, list[float]]:
    return {str(name): table[name].astype(float).tolist() for name in table}


def _table(columns: Mapping[str, Sequence[float | None]], names: Sequence[str]) -> pd.DataFrame:
    return pd.DataFrame({name: _floats(values) for name, values in columns.items()}, index=pd.Index(names))


def _floats(values: Sequence[Any]) -> np.ndarray:
    return np.array(values, dtype=np.float64)  # None becomes nan


def _rounded(residual: np.ndarray) -> np.ndarray:
    return np.round(np.minimum(residual, INFINITE), DIGITS)
