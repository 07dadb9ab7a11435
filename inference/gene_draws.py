"""Draws of genes from a tree of predictions, stored or made on demand from the embedding."""

import hashlib

import numpy as np
import xarray as xr


def gene_draws(draws: xr.DataTree, population: str) -> tuple[np.ndarray, np.ndarray]:
    """Draws (S, G) of the latent mean and of the shift of one predicted population, chains joined.

    Large predictions hold coordinates only (docs: "The draws"). Genes are then `offset + back_map v + rest`: what the
    coordinates leave out is drawn as independent noise of the mean and sd that it had, the same for every call.
    """
    here = draws["predictions"].to_dataset().sel(population=population)

    def flat(values: xr.DataArray) -> np.ndarray:
        return values.to_numpy().reshape(-1, values.shape[-1]).astype(np.float64)

    if "mean" in here:
        return flat(here["mean"]), flat(here["shift"])
    back = here["back_map"].to_numpy().T
    coordinates, control = flat(here["embedding"]), flat(here["control_embedding"])
    seed = int.from_bytes(hashlib.blake2b(population.encode(), digest_size=8).digest())
    noise = np.random.default_rng(seed).standard_normal((len(coordinates), back.shape[1]))
    mean, shift = (
        here[f"{name}_offset"].to_numpy() + moved @ back + here[f"{name}_rest"].to_numpy() * noise
        for name, moved in (("mean", coordinates), ("shift", coordinates - control))
    )
    return mean, shift
