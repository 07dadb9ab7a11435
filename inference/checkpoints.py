"""Fits as folders: safetensors for arrays, JSON for names and settings, netCDF for the course of inference; no pickle."""

import json
import os
import shutil
import tempfile
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hilbertcell.data.moments import Moments
from hilbertcell.data.populations import Keys
from hilbertcell.data.splits import labels_hash
from hilbertcell.inference.diffusion_law import DiffusionLaw
from hilbertcell.inference.fit import Fit
from hilbertcell.inference.law_choice import LawChoice
from hilbertcell.inference.settings import Settings
from hilbertcell.models.embedding import Coordinates
from hilbertcell.models.feature_maps import FeatureMap
from hilbertcell.models.within_covariance import WithinPrior

FORMAT = 3
_PARTS: dict[str, Any] = {
    "feature_map": FeatureMap,
    "prior": WithinPrior,
    "coordinates": Coordinates,
    "moments": Moments,
}
_PACKAGES = ("hilbertcell", "jax", "numpyro", "numpy")


def save_fit(fit: Fit, path: Path, *, force: bool = False) -> None:
    """Write a fit as the folder `path`, complete or not at all.

    Raises:
        FileExistsError: `path` exists and `force` is not set, or it is not a fit, which is never replaced.
    """
    if path.exists() and not force:
        raise FileExistsError(f"{path} exists; choose another folder or force its replacement")
    if path.exists() and not (path / "manifest.json").exists():
        raise FileExistsError(f"{path} exists and is not a fit; choose another folder")
    arrays = {"scores_center": fit.scores_center}
    for name in _PARTS:
        arrays |= {f"{name}.{key}": value for key, value in getattr(fit, name).to_arrays().items()}
    arrays |= {f"params.{key}": value for key, value in fit.params.items()}
    arrays |= {f"posterior.{key}": value for key, value in fit.posterior.items()}
    if fit.diffusion is not None:
        arrays |= {f"diffusion.{key}": value for key, value in fit.diffusion.to_arrays().items()}
    if fit.features is not None:
        arrays["features"] = fit.features.to_numpy(dtype=np.float64)
    manifest = {
        "format": FORMAT,
        "versions": {package: version(package) for package in _PACKAGES},
        "keys": fit.keys.to_dict(),
        "genes": fit.genes.astype(str).tolist(),
        "settings": fit.settings.model_dump(),
        "inference": dict(zip(("method", "reason"), fit.inference, strict=True)),
        "law": asdict(fit.choice),
        "seed": fit.seed,
        "split_hash": fit.split_hash,
        "held_out": list(fit.held_out),
        "labels_hash": labels_hash(fit.moments.labels),
        "populations": fit.moments.labels.index.tolist(),
        "feature_names": None if fit.features is None else list(map(str, fit.features.columns)),
        "feature_rows": None if fit.features is None else list(map(str, fit.features.index)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as scratch:
        folder = Path(scratch) / "fit"
        folder.mkdir()
        save_file(
            {name: np.ascontiguousarray(value) for name, value in arrays.items()},
            folder / "arrays.safetensors",
        )
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        xr.DataTree.from_dict({"sample_stats": fit.sample_stats}).to_netcdf(folder / "inference.nc")
        for file in folder.iterdir():
            shutil.copymode(folder / "manifest.json", file)  # safetensors writes for the owner alone
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if path.exists():
            shutil.rmtree(path)
        folder.rename(path)


def read_fit(path: Path) -> Fit:
    """Read a fit that `save_fit` wrote.

    Raises:
        ValueError: the folder is not a fit, is incomplete or damaged, or was written in another format.
    """
    manifest = read_manifest(path)
    try:
        arrays = load_file(path / "arrays.safetensors")
        with xr.open_datatree(path / "inference.nc") as tree:
            stats = {str(name): values.to_numpy() for name, values in tree["sample_stats"].data_vars.items()}
    except (OSError, SafetensorError, KeyError) as error:
        raise incomplete(path, error) from None
    parts: dict[str, Any] = {name: kind.from_arrays(_under(arrays, name)) for name, kind in _PARTS.items()}
    features = None
    if manifest["feature_rows"] is not None:
        features = pd.DataFrame(
            arrays["features"], index=manifest["feature_rows"], columns=manifest["feature_names"]
        )
    diffusion = None
    if manifest["law"]["name"] == "diffusion":
        diffusion = DiffusionLaw.from_arrays(_under(arrays, "diffusion"), parts["coordinates"].A.shape[1])
        stats = {name: values for name, values in stats.items() if name not in diffusion.sample_stats}
    return Fit(
        keys=Keys.from_dict(manifest["keys"]),
        genes=np.array(manifest["genes"], dtype=str),
        settings=Settings(**manifest["settings"]),
        seed=manifest["seed"],
        split_hash=manifest["split_hash"],
        held_out=tuple(manifest["held_out"]),
        scores_center=arrays["scores_center"],
        features=features,
        params=_under(arrays, "params"),
        losses=-stats.pop("elbo")[0] if "elbo" in stats else np.zeros(0),
        posterior=_under(arrays, "posterior"),
        sampling=stats,
        choice=LawChoice(**manifest["law"]),
        diffusion=diffusion,
        **parts,
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """Names and settings of the fit in the folder `path`.

    Raises:
        ValueError: there is none, or one of another format.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise incomplete(path, error) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(
            f"{path} was written in format {manifest.get('format')}, this version reads {FORMAT}; fit again"
        )
    return manifest


def incomplete(path: Path, error: Exception) -> ValueError:
    """What to raise where `error` was met in a folder that should hold a fit."""
    return ValueError(f"{path} is not a complete fit ({error}); make one with `hilbertcell fit`")


def _under(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(f"{prefix}."): value
        for name, value in arrays.items()
        if name.startswith(f"{prefix}.")
    }
