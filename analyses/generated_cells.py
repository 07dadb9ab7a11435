"""Generated cells of a PerturbDiff fit as AnnData, labelled as a file of cells is."""

import json
from typing import TYPE_CHECKING, Any

import anndata
import numpy as np
import pandas as pd

from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError

if TYPE_CHECKING:
    from hilbertcell.inference.perturbdiff.fit import PerturbDiffFit


def target_labels(targets: pd.DataFrame) -> pd.DataFrame:
    """Targets (columns context, perturbation, batch, perhaps dose) as a table of populations, named.

    Raises:
        DataError: a column is missing, or a target is asked for twice.
    """
    missing = [name for name in ("context", "perturbation", "batch") if name not in targets]
    if missing:
        raise DataError(
            f"targets = {list(targets.columns)}: columns {', '.join(missing)} are missing; add them"
        )
    table = targets.assign(dose=targets.get("dose", np.nan)).reset_index(drop=True)
    table = table[["context", "perturbation", "dose", "batch"]]
    dose = table["dose"].map(lambda value: "" if np.isnan(value) else f" @ {value:g}")
    table.index = pd.Index(table["context"] + " | " + table["perturbation"] + dose + " | " + table["batch"])
    if table.index.has_duplicates:
        raise DataError(
            f"targets = {table.index[table.index.duplicated()][0]!r}: is asked for twice; name it once"
        )
    return table


def generated_cells(
    fitted: "PerturbDiffFit",
    populations: Populations,
    targets: pd.DataFrame,
    cells_per_population: int,
    seed: int,
    **changes: Any,
) -> anndata.AnnData:
    """Cells on the natural scale (log1p of counts per 10,000 where the fit read counts), float32.

    obs: `population`, and the columns that the fit's keys name. uns["provenance"]: version, keys, seed, network
    evaluations per cell.

    Raises:
        DataError: see `target_labels` and `PerturbDiffFit.generate`.
    """
    from hilbertcell import __version__

    wanted = target_labels(targets)
    number = np.full(len(wanted), cells_per_population)
    cells = fitted.generate(populations, wanted, number, seed=seed, **changes)
    keys = fitted.keys
    assert keys is not None  # the command has looked
    assert fitted.genes is not None  # generate has
    rows = wanted.loc[wanted.index.repeat(number)]
    obs = pd.DataFrame(
        {"population": rows.index.to_numpy(), keys.perturbation: rows["perturbation"].to_numpy()}
    )
    for i, name in enumerate(keys.context):
        obs[name] = [context.split(" | ")[i] for context in rows["context"]]
    obs[keys.batch] = rows["batch"].to_numpy()
    if keys.dose is not None:
        obs[keys.dose] = rows["dose"].to_numpy()
    obs.index = pd.Index([f"generated{i}" for i in range(len(obs))])
    evaluations = type(fitted.settings)(**(fitted.settings.model_dump() | changes)).evaluations
    provenance = {
        "hilbertcell_version": __version__,
        "keys": json.dumps(keys.to_dict()),
        "seed": seed,
        "scale": "other" if keys.scale == "other" else "log1p",
        "evaluations_per_cell": evaluations,
    }
    return anndata.AnnData(
        np.concatenate(cells).astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(fitted.genes.astype(str))),
        uns={"provenance": provenance},
    )
