"""Draws of genes that are too many to store: a regression on the coordinates of each draw, and what it leaves out.

A draw of a population has Q coordinates `v` and G genes, Q << G. What genes and coordinates share over the draws is a
linear map `B`, fitted on the draws themselves (the fixed back-map of the embedding will not do: under the posterior
what the coordinates leave out is correlated with them). The rest of a gene is drawn from a normal law that keeps its
standard deviation and, between a population's mean and its shift, its correlation:

    gene = center + B^T (v - mean of v) + sd e,    e ~ N(0, 1), independent between genes.

Means and standard deviations of every gene are those of the draws; of correlations between genes, the part that the
coordinates express.
"""

import hashlib
import json
from typing import NamedTuple

import numpy as np
import xarray as xr

QUANTITIES = ("mean", "shift")


class GeneMap(NamedTuple):
    """Draws (S, T, G) of two quantities of T populations in terms of their coordinates (S, T, Q)."""

    maps: np.ndarray  # (2, Q, G) B of mean and of shift, shared by the populations
    center: np.ndarray  # (2, T, G) mean over the draws
    sd: np.ndarray  # (2, T, G) of the rest
    correlation: np.ndarray  # (T, G) between the rests of mean and of shift


def fit_gene_map(mean: np.ndarray, shift: np.ndarray, embedding: np.ndarray) -> GeneMap:
    """Regress draws of genes, mean and shift (S, T, G), on coordinates (S, T, Q); one population in memory at a time."""
    num_targets, num_genes, size = mean.shape[1], mean.shape[2], embedding.shape[2]
    square, cross = np.zeros((size, size)), np.zeros((2, size, num_genes))
    center = np.empty((2, num_targets, num_genes))
    for t in range(num_targets):
        v = _centred(embedding[:, t])
        square += v.T @ v
        for q, draws in enumerate((mean, shift)):
            center[q, t] = draws[:, t].mean(axis=0, dtype=np.float64)
            cross[q] += v.T @ (draws[:, t] - center[q, t])
    maps = np.stack([np.linalg.lstsq(square, one)[0] for one in cross])
    sd, correlation = np.empty_like(center), np.zeros((num_targets, num_genes))
    for t in range(num_targets):
        v = _centred(embedding[:, t])
        rest = [draws[:, t] - center[q, t] - v @ maps[q] for q, draws in enumerate((mean, shift))]
        sd[:, t] = [np.sqrt((one**2).mean(axis=0)) for one in rest]
        scale = sd[0, t] * sd[1, t]
        np.divide((rest[0] * rest[1]).mean(axis=0), scale, out=correlation[t], where=scale > 0)
    return GeneMap(maps, center, sd, correlation)


def gene_draws(draws: xr.DataTree, quantity: str, population: str) -> np.ndarray:
    """Draws (S, G), float64, of `quantity` ("mean" or "shift") of one population, chains one after the other.

    Read where they are stored; made where the file holds coordinates and gene maps: the same call, the same draws.
    """
    predictions = draws["predictions"].dataset
    if quantity in predictions:
        values = predictions[quantity].sel(population=population).transpose("chain", "draw", "gene").values
        return values.reshape(-1, values.shape[-1]).astype(np.float64)
    one = predictions.sel(population=population)
    v = one["embedding"].transpose("chain", "draw", "coordinate").values
    v = _centred(v.reshape(-1, v.shape[-1]))
    num_genes = one.sizes["gene"]
    rng = np.random.default_rng(_seed(int(draws.attrs["seed"]), population))
    noise = rng.standard_normal((2, len(v), num_genes))
    if quantity == "shift":
        correlation = np.clip(one["rest_correlation"].values.astype(np.float64), -1.0, 1.0)
        unit = correlation * noise[0] + np.sqrt(1.0 - correlation**2) * noise[1]
    else:
        unit = noise[0]
    back = one[f"{quantity}_map"].isel(map=int(one["map_index"])).transpose("coordinate", "gene").values
    return one[f"{quantity}_center"].values + v @ back + one[f"{quantity}_rest_sd"].values * unit


def _centred(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values - values.mean(axis=0)


def _seed(seed: int, population: str) -> int:
    """A seed of its own for each population, whatever else is read."""
    digest = hashlib.blake2b(json.dumps([seed, population]).encode(), digest_size=16).digest()
    return int.from_bytes(digest, "little")
