"""Predicted cells: real control cells of a batch, transported to a drawn population. AnnData again, at the edge."""

import hashlib
import json

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr

from hilbertcell.data.populations import Populations
from hilbertcell.data.validation import DataError
from hilbertcell.models.continuous_transport import transport_continuous
from hilbertcell.models.count_transport import fit_expression_state, transport_counts

PREDICTIVE_MEAN = -1


def sample_cells(
    draws: xr.DataTree,
    populations: Populations,
    *,
    cells_per_population: int | None = None,
    draw_index: int | None = None,
    num_draws: int | None = None,
    seed: int = 0,
) -> anndata.AnnData:
    """Cells of each predicted population, from the control cells of its (context, batch).

    The cells of one value of `obs["draw"]` are those of *one* population: -1 the predictive-mean one, by default;
    otherwise the draw's index. Their means match that population's; pooling draws would turn the spread between
    populations into spread within one.

    Args:
        draws: what `Fit.predict` returned.
        populations: the file with the control cells.
        cells_per_population: by default as many as there are controls; more are drawn with replacement.
        draw_index: one drawn population instead of the predictive mean.
        num_draws: R complete populations beside each other, evenly spaced among the draws, instead.
        seed: same seed, same cells, whatever the order of populations.

    Returns:
        AnnData in the file's own scale (counts in, counts out), with the file's obs columns: perturbation and dose are
        those predicted, the library size is that of the new counts; `source_cell` and `draw` are added.

    Raises:
        DataError: a predicted population without control cells; an impossible draw or number of cells.
    """
    predictions = draws["predictions"].dataset
    populations = populations.match_genes(predictions["gene"].values.astype(str))
    chosen = _chosen_draws(predictions.sizes["draw"], draw_index, num_draws)
    if cells_per_population is not None and cells_per_population < 1:
        raise DataError(f"cells_per_population = {cells_per_population}: ask for at least one cell")
    if draw_index is not None and num_draws is not None:
        raise DataError("draw_index and num_draws were both given; ask for one draw or for several")
    constant = draws["constant_data"].dataset
    matrices, tables = [], []
    for context, batch in sorted(
        {*zip(predictions["context"].values, predictions["batch"].values, strict=True)}
    ):
        here = (predictions["context"].values == context) & (predictions["batch"].values == batch)
        source = _Source(populations, str(context), str(batch), cells_per_population, seed)
        for p in np.flatnonzero(here):
            one, fixed = predictions.isel(population=p), constant.isel(population=p)
            mean = one["mean"].values.reshape(-1, predictions.sizes["gene"])
            for draw in chosen:
                target = mean.mean(axis=0) if draw == PREDICTIVE_MEAN else mean[draw]
                matrix, table = source.move(
                    str(one["population"].values), target.astype(np.float64), fixed, draw
                )
                table[populations.keys.perturbation] = str(one["perturbation"].values)
                if populations.keys.dose:
                    table[populations.keys.dose] = float(one["dose"].values)
                matrices.append(matrix)
                tables.append(table)
    stack = sp.vstack(matrices, format="csr") if sp.issparse(matrices[0]) else np.concatenate(matrices)
    cells = anndata.AnnData(
        X=stack, obs=pd.concat(tables), var=pd.DataFrame(index=pd.Index(populations.genes, dtype=str))
    )
    cells.uns["provenance"] = json.dumps(
        {
            "made_by": f"hilbertcell {draws.attrs['hilbertcell_version']}",
            "seed": seed,
            "keys": populations.keys.to_dict(),
        }
    )
    return cells


def _chosen_draws(available: int, draw_index: int | None, num_draws: int | None) -> list[int]:
    """Draws to make cells of; -1 is the predictive mean."""
    if draw_index is not None:
        if not 0 <= draw_index < available:
            raise DataError(
                f"draw_index = {draw_index}: there are {available} draws; ask for 0 to {available - 1}"
            )
        return [draw_index]
    if num_draws is not None:
        if not 1 <= num_draws <= available:
            raise DataError(f"num_draws = {num_draws}: there are {available} draws; ask for 1 to {available}")
        return np.linspace(0, available - 1, num_draws).round().astype(int).tolist()
    return [PREDICTIVE_MEAN]


class _Source:
    """The control cells of one (context, batch) that are moved, the same for all its targets."""

    def __init__(
        self, populations: Populations, context: str, batch: str, num_cells: int | None, seed: int
    ) -> None:
        labels = populations.labels
        found = labels.index[
            (labels["context"] == context) & (labels["batch"] == batch) & labels["is_control"]
        ]
        if len(found) == 0:
            raise DataError(
                f"context = {context!r} in batch {batch!r}: has no control cells in the file, so no cells can be made of "
                "it (its means are in the draws); leave it out of the targets or give its controls"
            )
        positions = populations.cells_of(found[0])
        # By name: the order of the rows in the file must not decide which cells are moved how.
        positions = positions[np.argsort(populations.cell_names[positions])]
        self.populations, self.seed = populations, seed
        num_cells = num_cells or len(positions)
        rng = _generator(seed, context, batch)
        if num_cells != len(positions):
            positions = np.sort(rng.choice(positions, num_cells, replace=num_cells > len(positions)))
        self.positions = positions
        self.cells = populations.read_cells(positions)
        self.counts = populations.library_size is not None
        if populations.library_size is not None:
            self.library = populations.library_size[positions]
            self.cells = sp.csr_matrix(self.cells)
            self.state = fit_expression_state(sp.csr_array(self.cells), self.library)

    def move(
        self, name: str, target: np.ndarray, fixed: xr.Dataset, draw: int
    ) -> tuple[sp.csr_matrix | np.ndarray, pd.DataFrame]:
        """Cells of one population with means `target` (G,), natural scale, and their obs."""
        keys = self.populations.keys
        table = self.populations.obs(self.positions).copy()
        source = self.populations.cell_names[self.positions]
        if self.counts:
            ratio = float(np.exp(fixed["library_log_ratio"]))
            rng = _generator(self.seed, name, str(draw))
            moved, library = transport_counts(self.cells, self.library, target, ratio, rng, self.state)
            if keys.library_size:
                table[keys.library_size] = library
        else:
            dense = self.cells.toarray() if sp.issparse(self.cells) else np.asarray(self.cells)
            moved = transport_continuous(dense.astype(np.float64), target, fixed["sd_log_ratio"].values)
            if keys.scale == "log1p":  # log1p of a count is never negative
                moved = np.maximum(moved, 0.0)
            moved = moved.astype(dense.dtype)
        table["source_cell"], table["draw"] = source, draw
        table.index = pd.Index([f"{name} | {draw} | {i}" for i in range(len(source))], dtype=str)
        return moved, table


def _generator(seed: int, *names: str) -> np.random.Generator:
    """A generator of its own for each thing that is drawn, whatever is drawn beside it."""
    text = "\x1f".join((str(seed), *names)).encode()
    return np.random.default_rng(int.from_bytes(hashlib.blake2b(text, digest_size=16).digest()))
