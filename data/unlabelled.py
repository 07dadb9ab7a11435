"""Cells of which nothing is known but context and batch: populations for pretraining."""

from pathlib import Path
from typing import Any

import anndata

from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError

_COLUMN = "hilbertcell_unlabelled"
_LABEL = "unlabelled"


def read_unlabelled(
    path: Path, *, context: tuple[str, ...], batch: str, progress: bool = False, **options: Any
) -> Populations:
    """Populations of a file by (context, batch), whatever was done to the cells; all count as controls.

    Args:
        path: an .h5ad file; its matrix stays in the file.
        context: obs columns of the kind of cell.
        batch: obs column of the donor, replicate or plate.
        progress: whether to show a progress bar.
        options: `scale`, `library_size` and `layer` of `read_populations`.

    Raises:
        DataError: as `read_populations`, or the file is not h5ad.
    """
    try:
        cells = anndata.read_h5ad(path, backed="r")
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"source = {str(path)!r}: cannot be read as h5ad ({reason}); give an .h5ad file"
        ) from None
    cells.obs[_COLUMN] = _LABEL
    return read_populations(
        cells, perturbation=_COLUMN, control=_LABEL, context=context, batch=batch, require=("control",),
        progress=progress, **options,
    )  # fmt: skip
