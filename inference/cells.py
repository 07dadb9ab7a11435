"""Predicted cells: real control cells of a batch, transported to predicted populations. AnnData again, at the edge."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scipy.sparse as sp
import xarray as xr

from hilbertcell.data.populations import Keys, Populations, natural_scale
from hilbertcell.data.validation import DataError, listing
from hilbertcell.inference.gene_draws import gene_draws
from hilbertcell.models.continuous_transport import transport_continuous, transport_nonnegative
from hilbertcell.models.count_transport import HIGHEST_MEAN, transport_counts
from hilbertcell.models.expression_state import ExpressionState, fit_expression_state

PREDICTIVE_MEAN = -1  # obs["draw"] of the cells of the predictive-mean population
ADDED = ("population", "draw", "source_cell")  # columns of obs beside the keys of the file


def sample_cells(
    draws: xr.DataTree,
    populations: Populations,
    *,
    cells_per_population: int | Mapping[str, int] | None = None,
    draw_index: int | None = None,
    num_draws: int | None = None,
    seed: int = 0,
) -> anndata.AnnData:
    """Cells of predicted populations, each made from a real control cell of the same context and batch.

    Cells are always cells of one population: by default of the predictive-mean one, whose gene means are the means
    of the draws. `draw_index` asks for one drawn population, `num_draws` for that many, evenly spaced among the
    draws and complete each; `obs["draw"]` says which draw a cell belongs to, -1 for the predictive mean. Cells of
    several draws must not be pooled: that turns uncertainty about the population into spread between cells.

    The means of a sample are those of its population, without the sampling error that as many real cells would
    have; all other spread between cells comes from the controls (`models.count_transport`). Samples of few cells
    are therefore best asked for as such: a random part of a larger sample has that error again. Means that no counts
    can have (the tails of a Gaussian law) are met as far as counts go, which `mean_error` tells.

    Args:
        draws: what `Fit.predict` returned.
        populations: the controls, same genes (in any order) and scale as the draws; other cells are not touched.
        cells_per_population: number of cells, for all or by population name; as many as there are controls if not
            given. No control is used twice unless more cells are asked for than there are controls.
        draw_index: index of one draw, chains joined.
        num_draws: number of drawn populations.
        seed: the cells of a population depend on it, on the population's name and on its controls, not on other
            populations or on the order of the cells in the file.

    Returns:
        AnnData in the file's own scale (counts in, counts out; sparse or dense as read). obs: the columns that the keys
        name, with the perturbation (and dose) that is predicted and the new library size; `population`, `draw`, and
        `source_cell`, the name of the control, through which all else that the file says of it can be found.
        uns["provenance"]: version, keys, seeds, and by (`population`, `draw`) `mean_error`, the largest deviation
        over genes of the recomputed mean from its target, natural scale.

    Raises:
        DataError: targets without control cells, another scale or other genes, draws or numbers that cannot be.

    """
    predictions, constants = draws["predictions"].dataset, draws["constant_data"].dataset
    labels, keys = _targets(predictions), populations.keys
    _check_keys(Keys.from_dict(json.loads(draws.attrs["keys"])), keys)
    populations = populations.match_genes(predictions["gene"].values.astype(str))
    chosen = _chosen_draws(predictions.sizes["chain"] * predictions.sizes["draw"], draw_index, num_draws)
    controls = _controls(labels, populations)
    number = _numbers(labels, controls, cells_per_population)

    samples: dict[str, list[_Sample]] = {}
    for (context, batch), targets in labels.groupby(["context", "batch"], sort=False):
        source = _Source.read(populations, controls[context, batch])
        for name, target in targets.iterrows():
            means = gene_draws(draws, "mean", str(name))
            given = constants.sel(population=name)
            ratios = float(given["library_log_ratio"]), given["sd_log_ratio"].values
            samples[str(name)] = [
                source.sample(
                    str(name), target, draw, _mean_of(means, draw), *ratios, number[str(name)], seed
                )
                for draw in chosen
            ]
    ordered = [sample for name in labels.index for sample in samples[name]]
    return _assemble(ordered, populations, draws.attrs, seed)


@dataclass(frozen=True, eq=False)
class _Sample:
    """The cells of one population and draw: positions of their controls, new values, new library sizes."""

    name: str
    target: pd.Series
    draw: int
    cells: np.ndarray
    values: Any
    library: np.ndarray | None
    mean_error: float


@dataclass(frozen=True, eq=False)
class _Source:
    """The control cells of one (context, batch), ordered by name: positions, values, library sizes, rates."""

    cells: np.ndarray
    values: Any
    scale: str
    library: np.ndarray | None = None
    state: ExpressionState | None = None

    @classmethod
    def read(cls, populations: Populations, cells: np.ndarray) -> "_Source":
        values, scale = populations.read_cells(cells), populations.keys.scale
        if populations.library_size is None:
            return cls(cells, values.toarray() if sp.issparse(values) else values, scale)
        library = populations.library_size[cells]
        return cls(cells, values, scale, library, fit_expression_state(sp.csr_array(values), library))

    def sample(
        self,
        name: str,
        target: pd.Series,
        draw: int,
        mean: np.ndarray,
        library_log_ratio: float,
        sd_log_ratio: np.ndarray,
        number: int,
        seed: int,
    ) -> _Sample:
        """`number` cells of the population whose means (G,), natural scale, are `mean`."""
        rng = _generator(seed, name, draw)
        rows = _choose(len(self.cells), number, rng)
        values, library = self.values[rows], None
        if self.library is not None and self.state is not None:
            sparse = sp.issparse(values)
            ratio = float(np.exp(library_log_ratio))
            # A law is Gaussian beyond what counts can be, above as below; what is lost shows in the error.
            possible = np.minimum(mean, HIGHEST_MEAN)
            values, library = transport_counts(
                sp.csr_array(values), self.library[rows], possible, ratio, rng, self.state.select(rows)
            )
            values = values if sparse else values.toarray()
        elif self.scale == "log1p":
            values = transport_nonnegative(values, mean)
        else:
            values = transport_continuous(values, mean, sd_log_ratio)
        aim = mean if self.scale == "other" else np.maximum(mean, 0.0)  # expression has no negative means
        error = np.abs(natural_scale(values, self.scale, library).mean(0) - aim).max()
        return _Sample(name, target, draw, self.cells[rows], values, library, float(error))


def _targets(predictions: xr.Dataset) -> pd.DataFrame:
    columns = {name: predictions[name].values for name in ("context", "perturbation", "dose", "batch")}
    return pd.DataFrame(columns, index=pd.Index(predictions["population"].values.astype(str)))


def _check_keys(fitted: Keys, keys: Keys) -> None:
    if fitted.scale != keys.scale:
        raise DataError(
            f"scale = {keys.scale!r}: the draws are on scale {fitted.scale!r}; give controls of that scale"
        )
    columns = {keys.perturbation, keys.batch, *keys.context, keys.dose, keys.library_size}
    if taken := columns.intersection(ADDED):
        raise DataError(
            f"obs columns {listing(name for name in ADDED if name in taken)} of the file: predicted cells need these names for themselves; rename them"
        )


def _chosen_draws(available: int, draw_index: int | None, num_draws: int | None) -> list[int]:
    """Draws to make cells of; -1 is the predictive mean."""
    if draw_index is not None and num_draws is not None:
        raise DataError(
            f"draw_index = {draw_index}, num_draws = {num_draws}: ask for one drawn population or for several, not both"
        )
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


def _mean_of(means: np.ndarray, draw: int) -> np.ndarray:
    """Target means (G,) of one drawn population, or of the predictive-mean one; of draws (S, G)."""
    return means.mean(0, dtype=np.float64) if draw == PREDICTIVE_MEAN else means[draw].astype(np.float64)


def _controls(labels: pd.DataFrame, populations: Populations) -> dict[tuple[str, str], np.ndarray]:
    """Positions of the control cells of each (context, batch), ordered by the cells' names."""
    found: dict[tuple[str, str], np.ndarray] = {}
    for name, row in populations.labels[populations.labels["is_control"]].iterrows():
        cells = populations.cells_of(str(name))
        found[row["context"], row["batch"]] = cells[np.argsort(populations.cell_names[cells], kind="stable")]
    pairs = list(zip(labels["context"], labels["batch"], strict=True))
    lacking = [name for name, pair in zip(labels.index, pairs, strict=True) if pair not in found]
    if lacking:
        where = listing(dict.fromkeys(" | ".join(pair) for pair in pairs if pair not in found))
        raise DataError(
            f"targets = {listing(lacking)}: cells are made from control cells, and there are none of {where}; give them, "
            "or leave these targets out when you ask for cells (their means are in the draws)"
        )
    return found


def _numbers(
    labels: pd.DataFrame,
    controls: dict[tuple[str, str], np.ndarray],
    asked: int | Mapping[str, int] | None,
) -> dict[str, int]:
    """How many cells of each population."""
    if isinstance(asked, Mapping):
        lacking = [name for name in labels.index if name not in asked]
        if lacking:
            raise DataError(
                f"cells_per_population = {listing(asked)}: no number for {listing(lacking)}; give one"
            )
        number = {name: int(asked[name]) for name in labels.index}
    elif asked is not None:
        number = dict.fromkeys(labels.index, int(asked))
    else:
        pairs = zip(labels["context"], labels["batch"], strict=True)
        number = {name: len(controls[pair]) for name, pair in zip(labels.index, pairs, strict=True)}
    if min(number.values()) < 1:
        raise DataError(f"cells_per_population = {min(number.values())}: ask for at least one cell")
    return number


def _generator(seed: int, name: str, draw: int) -> np.random.Generator:
    """A generator of its own for each population and draw, whatever is sampled beside it."""
    digest = hashlib.blake2b(json.dumps([seed, name, draw]).encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


def _choose(available: int, wanted: int, rng: np.random.Generator) -> np.ndarray:
    """`wanted` rows, sorted, of `available`; how often each is used differs by one at most."""
    whole, rest = divmod(wanted, available)
    rows = np.repeat(np.arange(available), whole)
    return np.sort(np.concatenate([rows, rng.choice(available, rest, replace=False)]))


def _obs(sample: _Sample, populations: Populations) -> pd.DataFrame:
    keys, source = populations.keys, populations.obs(sample.cells)
    obs = pd.DataFrame({keys.perturbation: [str(sample.target["perturbation"])] * len(source)})
    for column in (*keys.context, keys.batch):
        obs[column] = source[column].astype(str).to_numpy()
    if keys.dose is not None:
        obs[keys.dose] = float(sample.target["dose"])
    if keys.library_size is not None and sample.library is not None:
        whole = (sample.library == np.rint(sample.library)).all()
        kind = source[keys.library_size].dtype
        obs[keys.library_size] = sample.library.astype(kind if whole or kind.kind == "f" else np.float64)
    of_draw = "" if sample.draw == PREDICTIVE_MEAN else f" | draw {sample.draw}"
    added = (sample.name, sample.draw, populations.cell_names[sample.cells].astype(str))
    for column, values in zip(ADDED, added, strict=True):
        obs[column] = values
    obs.index = pd.Index([f"{sample.name}{of_draw} | {i}" for i in range(len(obs))], dtype=str)
    return obs


def _assemble(
    samples: list[_Sample], populations: Populations, attrs: Mapping[str, Any], seed: int
) -> anndata.AnnData:
    from hilbertcell import __version__

    keys = populations.keys
    obs = pd.concat([_obs(sample, populations) for sample in samples])
    obs = obs.astype(dict.fromkeys([keys.perturbation, *keys.context, keys.batch, "population"], "category"))
    values = [sample.values for sample in samples]
    cells = anndata.AnnData(
        X=sp.vstack(values, format="csr") if sp.issparse(values[0]) else np.concatenate(values),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(populations.genes, dtype=str)),
    )
    cells.uns["provenance"] = {
        "made_by": f"hilbertcell {__version__}",
        "made_from": "control cells of the same context and batch, named in obs['source_cell']",
        "keys": json.dumps(keys.to_dict()),
        "seed": int(seed),
        "seed_of_draws": int(attrs.get("seed", -1)),
        "population": np.array([sample.name for sample in samples], dtype=object),
        "draw": np.array([sample.draw for sample in samples]),
        "mean_error": np.array([sample.mean_error for sample in samples]),
    }
    return cells
