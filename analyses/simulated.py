"""Simulated donors as AnnData: counts, labels, and the truth behind them."""

import json
from dataclasses import asdict
from itertools import product

import anndata
import jax
import numpy as np
import pandas as pd
import scipy.sparse

from hilbertcell.models.simulator import (
    CONTROL,
    SimulatorSettings,
    World,
    cells,
    draw_environments,
    draw_world,
    generator,
    population_means,
    populations,
)


def simulate(seed: int = 0, settings: SimulatorSettings | None = None) -> anndata.AnnData:
    """Cells of simulated donors with known microenvironments; the same seed gives the same bits.

    X holds counts (CSR); obs `perturbation` ("control", "A", ..., "A+B"), `cell_type`, `donor`, `dose` when the
    settings have doses, and `responds` (the hidden truth of each cell). `uns["truth"]` can be written to h5ad:

    - `population`, `context`, `perturbation`, `batch`, `dose` name P populations; `mean` (P, G) are their true
      means on the log1p-CP10k scale (Monte Carlo over 1,000 cells each), `responder_fraction` is (P,);
    - `microenvironment` (B, K), in the order of `batches`; `features` (M, F), in the order of `perturbations`;
    - `settings` as JSON, and `seed`.
    """
    settings = settings or SimulatorSettings()
    keys = jax.random.split(jax.random.key(seed), 4)
    world = simulated_world(seed, settings)
    environments = draw_environments(keys[1], settings, settings.num_batches)
    table = _populations_table(settings)
    codes = (
        table["context"].map(settings.contexts.index).to_numpy(),
        table["perturbation"].map(settings.labels.index).to_numpy(),
        table["batch"].map(settings.batches.index).to_numpy(),
        table["dose"].fillna(0.0).to_numpy() if settings.doses else None,
    )
    rates = jax.device_get(populations(settings, world, environments, *codes))

    rng = generator(keys[2])
    size = rng.lognormal(
        np.log(settings.cells_per_population), settings.batch_size_scale, settings.num_batches
    )
    num_cells = np.maximum(rng.poisson(table["batch"].map(dict(zip(settings.batches, size, strict=True)))), 5)
    emitted = [cells(rng, settings, world, rates, p, n) for p, n in enumerate(num_cells)]
    counts = scipy.sparse.vstack(
        [scipy.sparse.csr_matrix(x, dtype=np.float32) for x, _ in emitted], format="csr"
    )
    order = rng.permutation(counts.shape[0])  # so that nothing can rely on cells lying together
    obs = table.rename(columns={"context": "cell_type", "batch": "donor"}).iloc[
        np.repeat(np.arange(len(table)), num_cells)[order]
    ]
    obs = obs[["perturbation", "cell_type", "donor", *(["dose"] if settings.doses else [])]]
    obs = obs.astype(dict.fromkeys(("perturbation", "cell_type", "donor"), "category"))
    obs["responds"] = np.concatenate([responds for _, responds in emitted])[order]
    obs.index = pd.Index([f"cell{i:06d}" for i in range(len(obs))], dtype=str)
    width = len(str(settings.num_genes))
    genes = pd.Index([f"gene{g + 1:0{width}d}" for g in range(settings.num_genes)], dtype=str)
    result = anndata.AnnData(X=counts[order], obs=obs, var=pd.DataFrame(index=genes))
    result.uns["truth"] = {
        "population": table.index.to_numpy(object),
        **{name: table[name].to_numpy(object) for name in ("context", "perturbation", "batch")},
        "dose": table["dose"].to_numpy(float),
        "mean": population_means(generator(keys[3]), settings, world, rates),
        "responder_fraction": np.asarray(rates.fraction),
        "batches": np.array(settings.batches, object),
        "microenvironment": np.asarray(environments.microenvironment),
        "perturbations": np.array(settings.perturbations, object),
        "features": np.asarray(world.features),
        "settings": json.dumps(asdict(settings)),
        "seed": int(seed),
    }
    return result


def simulated_world(seed: int, settings: SimulatorSettings) -> World:
    """The world behind `simulate(seed, settings)`: what an oracle may know."""
    return draw_world(jax.random.split(jax.random.key(seed), 4)[0], settings)


def _populations_table(settings: SimulatorSettings) -> pd.DataFrame:
    """Every (context, perturbation, dose, batch): controls once, without a dose."""
    rows = []
    for context, batch, perturbation in product(settings.contexts, settings.batches, settings.labels):
        for dose in (settings.doses if perturbation != CONTROL else ()) or (np.nan,):
            at = "" if np.isnan(dose) else f" @ {dose:g}"
            rows.append((f"{context} | {perturbation}{at} | {batch}", context, perturbation, dose, batch))
    columns = ["population", "context", "perturbation", "dose", "batch"]
    return pd.DataFrame(rows, columns=columns).set_index("population")
