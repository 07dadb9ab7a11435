"""One source of cells, opened: its labels in memory, its matrix where it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp
from anndata import AnnData
from anndata.io import read_elem

from hilbertcell.data.matrices import FilePart, MemoryPart
from hilbertcell.data.stores import (
    UNREADABLE,
    Node,
    bytes_per_row,
    is_group,
    is_node,
    is_zarr,
    open_store,
    stored_as,
)
from hilbertcell.data.validation import Problems, choose_from

type Source = str | Path | AnnData


@dataclass(frozen=True, eq=False)
class Table:
    """Labels and matrix of one source: obs (indexed by cell name), genes (G,), part (N rows, G columns)."""

    name: str
    obs: pd.DataFrame
    genes: np.ndarray
    part: FilePart | MemoryPart


def open_table(problems: Problems, source: Source, layer: str | None) -> Table | None:
    """Open a file or an AnnData. What makes it unusable is noted in `problems`, and None returned."""
    if isinstance(source, AnnData):
        return _open_anndata(problems, source, layer)
    path = Path(source)
    if not path.is_file() and not is_zarr(path):
        what = "is a folder, and not a zarr store" if path.is_dir() else "does not exist"
        problems.add("source", str(source), what, "give the path of an .h5ad file or a .zarr folder")
        return None
    kind = "zarr" if path.is_dir() else "h5ad"
    try:
        with open_store(path) as store:
            return _open_file(problems, path, store, layer)
    # What read_elem raises depends on what is broken inside; whatever it is, the file is not sound.
    except UNREADABLE as error:
        whole = "an .h5ad file" if kind == "h5ad" else "a .zarr folder, all of its files copied"
        problems.add("source", str(path), f"cannot be read as {kind}: {error}", f"give {whole} that is whole")
    return None


def _open_file(problems: Problems, path: Path, file: Node, layer: str | None) -> Table | None:
    absent = [name for name in ("obs", "var") if name not in file]
    if absent:
        how = "write_zarr" if path.is_dir() else "write_h5ad"
        what = f"holds no {' and no '.join(absent)}"
        problems.add("source", str(path), what, f"write it with AnnData.{how}")
        return None
    obs, var = _read_frame(file["obs"]), _read_frame(file["var"])
    node = "X" if layer is None else f"layers/{layer}"
    if node not in file:
        _note_no_matrix(problems, str(path), layer, list(file.get("layers", ())))
        return None
    shape = _usable_shape(problems, str(path), layer, file[node], obs, var)
    if shape is None:
        return None
    part = FilePart(path.resolve(), node, *shape, is_group(file[node]), bytes_per_row(file[node]))
    return Table(str(path), obs, var.index.to_numpy().astype(str), part)


def _read_frame(group: Node) -> pd.DataFrame:
    frame = read_elem(group)
    if not isinstance(frame, pd.DataFrame):
        raise TypeError(f"{group.name} holds no table")
    return frame


def _open_anndata(problems: Problems, adata: AnnData, layer: str | None) -> Table | None:
    name = "AnnData"
    if adata.isbacked and adata.is_view:
        problems.add(
            "source", name, "is a view of a backed AnnData", "call to_memory(), or write it to a file"
        )
        return None
    if adata.isbacked and layer is None:
        matrix = adata.file["X"]
    else:
        if layer is not None and layer not in adata.layers:
            _note_no_matrix(problems, name, layer, _layer_names(adata))
            return None
        matrix = adata.X if layer is None else adata.layers[layer]
    if matrix is None:
        _note_no_matrix(problems, name, layer, _layer_names(adata))
        return None
    if sp.issparse(matrix):
        matrix = sp.csr_array(matrix)
    elif isinstance(matrix, np.ndarray):
        matrix = np.asarray(matrix)  # a view of AnnData is a subclass with its own rules
    shape = _usable_shape(problems, name, layer, matrix, adata.obs, adata.var)
    if shape is None:
        return None
    part = MemoryPart(matrix, *shape, is_sparse=sp.issparse(matrix) or (is_node(matrix) and is_group(matrix)))
    return Table(name, adata.obs.copy(), adata.var_names.to_numpy().astype(str), part)


def _layer_names(adata: AnnData) -> list[str]:
    names = list(adata.layers.keys())
    return [name for name in names if name is not None]  # AnnData calls X the layer None


def _note_no_matrix(problems: Problems, name: str, layer: str | None, layers: list[str]) -> None:
    if layer is None:
        problems.add("source", name, "holds no X", f"pass layer=; {choose_from('', layers)}")
    else:
        problems.add("layer", layer, f"is not a layer of {name}", choose_from(layer, layers))


def _usable_shape(
    problems: Problems, name: str, layer: str | None, matrix: Any, obs: pd.DataFrame, var: pd.DataFrame
) -> tuple[int, int] | None:
    """The shape of a CSR or dense matrix of numbers that fits its labels; else None, with the reason noted."""
    key, value = ("X", name) if layer is None else ("layer", layer)
    stored = type(matrix).__name__
    if is_node(matrix) and is_group(matrix):
        stored = stored_as(matrix)
        if stored in ("csr_matrix", "csc_matrix"):
            dtype, shape = matrix["data"].dtype, tuple(int(n) for n in matrix.attrs.get("shape", (0, 0)))
    elif is_node(matrix) or isinstance(matrix, np.ndarray | sp.csr_array):
        stored, dtype, shape = "csr_matrix" if sp.issparse(matrix) else "array", matrix.dtype, matrix.shape
    if stored not in ("csr_matrix", "array"):
        what = f"is stored as {stored}, which has no rows to read in blocks"
        problems.add(key, value, what, "store it as CSR or dense, e.g. adata.X = adata.X.tocsr()")
    elif dtype.kind not in "iufb":
        problems.add(key, value, f"holds {dtype} values, not numbers", "store numbers")
    elif shape != (len(obs), len(var)):
        what = f"has shape {shape}, but there are {len(obs)} cells and {len(var)} genes"
        problems.add(key, value, what, "write the file again")
    elif 0 in shape:
        problems.add(key, value, f"is empty: {len(obs)} cells and {len(var)} genes", "give a file with cells")
    elif obs.index.hasnans or var.index.hasnans:
        axis = "cells" if obs.index.hasnans else "genes"
        problems.add(f"{axis[:-1]} names", value, f"some {axis} have no name", f"name all {axis}")
    else:
        return shape
    return None
