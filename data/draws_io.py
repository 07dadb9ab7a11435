"""Draws as one netCDF file that ArviZ and xarray open as well, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import h5netcdf
import numpy as np
import xarray as xr

from hilbertcell.data.validation import DataError


def write_draws(draws: xr.DataTree, path: str | Path) -> None:
    """Write every group of draws (the tree of `Fit.predict`) to netCDF 4; what `write_rows` wrote there stays."""
    for name, group in draws.children.items():
        group.to_dataset().to_netcdf(path, group=name, mode="a", engine="h5netcdf")
    with h5netcdf.File(path, "a") as file:
        file.attrs.update(draws.attrs)


def write_rows(
    path: str | Path,
    group: str,
    name: str,
    dims: Sequence[str],
    block: np.ndarray,
    sizes: Mapping[str, int],
    axis: str,
    rows: slice,
) -> None:
    """Write a piece of a variable of a netCDF file; file, group, dimensions and variable are made when missing.

    Args:
        path: the file.
        group: name of the group.
        name: name of the variable.
        dims: its dimensions.
        block: values, `rows` along `axis` and whole along the other dimensions.
        sizes: whole sizes of the dimensions.
        axis: the dimension that is written piece by piece.
        rows: which piece of it.
    """
    with h5netcdf.File(path, "a") as file:
        where = file[group] if group in file.groups else file.create_group(group)
        for dim in dims:
            if dim not in where.dimensions:
                where.dimensions[dim] = sizes[dim]
        if name not in where.variables:
            where.create_variable(name, tuple(dims), block.dtype)
        where.variables[name][tuple(rows if dim == axis else slice(None) for dim in dims)] = block


def read_draws(path: str | Path) -> xr.DataTree:
    """Draws that `Fit.predict` or `write_draws` wrote; values are read when they are used.

    Raises: DataError if the file is not there, not netCDF, or holds no predictions.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"draws = {str(path)!r}: there is no such file; make one with `hilbertcell predict`")
    try:
        draws = xr.open_datatree(path, engine="h5netcdf", phony_dims="access")
    # What the backend raises depends on how the file differs from netCDF.
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(
            f"draws = {str(path)!r}: is not a file of draws ({reason}); make one with `hilbertcell predict`"
        ) from None
    if "predictions" not in draws.children or "keys" not in draws.attrs:
        draws.close()
        raise DataError(f"draws = {str(path)!r}: holds no predictions; make one with `hilbertcell predict`")
    return draws
