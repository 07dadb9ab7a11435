"""Draws as one netCDF file that ArviZ and xarray open as well, and back."""

from pathlib import Path

import xarray as xr

from hilbertcell.data.validation import DataError


def write_draws(draws: xr.DataTree, path: str | Path) -> None:
    """Write every group of draws (the tree of `Fit.predict`) to netCDF 4."""
    draws.to_netcdf(path, engine="h5netcdf")


def read_draws(path: str | Path) -> xr.DataTree:
    """Draws that `write_draws` wrote; values are read when they are used.

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
