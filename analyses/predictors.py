"""What a benchmark compares: things that learn from training populations and then predict from a batch's controls.

A `Fitter` turns training populations into a `Predictor`; that one is asked for draws of means (`law`), for cells
(`cells`), or both, given populations of batches it has not seen: their controls, and a few perturbed cells where the
benchmark gives them. It never sees a held-out population: what is not in its arguments cannot leak.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import xarray as xr
from anndata import AnnData

from hilbertcell.analyses.gene_table import (
    GeneTable,
    baseline_inputs,
    condition_names,
    condition_rows,
    controls_of,
    gene_table,
    natural_cells,
)
from hilbertcell.analyses.population_scores import DrawnPopulations
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.perturbations import perturbation_table
from hilbertcell.data.populations import Populations
from hilbertcell.models import baselines, linear_baselines

if TYPE_CHECKING:
    from hilbertcell.inference.settings import Settings

LawPredictor = Callable[["Screen", pd.DataFrame, int], np.ndarray]
CellPredictor = Callable[["Screen", pd.DataFrame, np.ndarray, int], list[np.ndarray]]
PopulationPredictor = Callable[["Screen", pd.DataFrame, int, int], DrawnPopulations]

_MAX_POOL = 256  # cells that stand for a drawn population
_SAMPLED = 64  # of a model that can only make cells, whose cost this is


@dataclass(frozen=True, eq=False)
class Screen:
    """Populations with the table of their gene means, which is streamed from the cells when first asked for."""

    populations: Populations
    known_table: GeneTable | None = None

    @cached_property
    def table(self) -> GeneTable:
        """Gene means, variances and cell numbers of all populations."""
        return self.known_table or gene_table(self.populations)

    def select(self, mask: np.ndarray) -> "Screen":
        """Only the populations where `mask` (P,) is true."""
        return Screen(self.populations.select(mask), self.table.select(mask))


@dataclass(frozen=True)
class Predictor:
    """What a model can answer.

    `law(given, targets, seed)` returns draws (S, T, G) of the latent means of T targets (rows of labels);
    `cells(given, targets, num_cells (T,), seed)` one array (num_cells, G) of cells per target;
    `populations(given, targets, num_draws, seed)` so many whole populations per target, drawn from the law. Natural scale.
    """

    law: LawPredictor | None = None
    cells: CellPredictor | None = None
    populations: PopulationPredictor | None = None


Fitter = Callable[[Screen], Predictor]


def baseline_fitters(num_draws: int = 500) -> dict[str, Fitter]:
    """The baselines of evaluation, by the names that tables show; 'null' is the (context, perturbation) mean shift."""
    return {
        "null": _from_table(baselines.mean_shift_null, num_draws, moves_controls=True),
        "no change": no_change_fitter(num_draws),
        "training means": _from_table(baselines.perturbation_mean, num_draws),
        "training cells": training_cells_fitter(num_draws),
        "Student-t null": _from_table(baselines.student_t_null, num_draws),
        "own-baseline slope": _from_table(baselines.own_baseline_slope, num_draws, moves_controls=True),
        "additive": _from_table(linear_baselines.additive, num_draws, moves_controls=True),
        "ridge": _from_table(linear_baselines.ridge, num_draws, moves_controls=True, features=True),
    }


def no_change_fitter(num_draws: int) -> Fitter:
    """The given controls: their mean with its noise, and their cells."""

    def law(given: Screen, targets: pd.DataFrame, seed: int, training: GeneTable) -> np.ndarray:
        _, wanted = baseline_inputs(training, given.table, targets)
        return baselines.no_change(wanted, num_draws, np.random.default_rng(seed))

    def fitter(training: Screen) -> Predictor:
        def own_law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
            return law(given, targets, seed, training.table)

        return Predictor(own_law, _control_cells, _moved_controls(own_law))

    return fitter


def training_cells_fitter(num_draws: int) -> Fitter:
    """Real perturbed cells of the training batches, same context and condition, pooled (see `training_replicates`).

    As a law it is one population, with the sampling noise of as many cells as the batch has controls: all the
    spread that a model of one population has.
    """

    def fitter(training: Screen) -> Predictor:
        labels = training.populations.labels
        condition = condition_names(labels)

        def replicates(context: str, wanted: str) -> np.ndarray:
            return training_replicates(labels, condition, context, wanted)

        def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
            _, _, number = controls_of([given.table, training.table], targets)
            shape = (len(targets), len(training.populations.genes))
            mean, noise = np.full(shape, np.nan), np.full(shape, np.nan)
            for t, pair in enumerate(zip(targets["context"], condition_names(targets), strict=True)):
                rows = replicates(*pair)
                if rows.any():
                    pool = training.table.select(rows)
                    weight = pool.n / pool.n.sum()
                    mean[t] = weight @ pool.mean
                    noise[t] = weight @ (pool.variance + (pool.mean - mean[t]) ** 2) / number[t]
            rng = np.random.default_rng(seed)
            return mean + np.sqrt(noise) * rng.standard_normal((num_draws, *shape))

        def cells(given: Screen, targets: pd.DataFrame, num_cells: np.ndarray, seed: int) -> list[np.ndarray]:
            rng = np.random.default_rng(seed)
            pairs = zip(targets["context"], condition_names(targets), strict=True)
            return [
                cells_of_populations(training.populations, labels.index[replicates(*pair)], number, rng)
                for pair, number in zip(pairs, num_cells, strict=True)
            ]

        def populations(given: Screen, targets: pd.DataFrame, num_draws: int, seed: int) -> DrawnPopulations:
            sizes = [
                min(_MAX_POOL, int(labels["num_cells"][replicates(*pair)].sum()))
                for pair in zip(targets["context"], condition_names(targets), strict=True)
            ]
            pools = cells(given, targets, np.array(sizes), seed)
            return DrawnPopulations(
                [np.broadcast_to(one, (num_draws, *one.shape)) for one in pools], whole=True
            )

        return Predictor(law, cells, populations)

    return fitter


def hilbertcell_fitter(
    num_draws: int = 500, seed: int = 0, settings: "Settings | None" = None, cells: bool = True
) -> Fitter:
    """The suite's own hidden-factor program; perturbed cells among the given ones are conditioned on."""

    def fitter(training: Screen) -> Predictor:
        from hilbertcell.inference.fit import fit  # imports jax, which baselines do not need

        fitted = fit(training.populations, seed=seed, settings=settings)

        def draw(given: Screen, targets: pd.DataFrame, seed: int) -> xr.DataTree:
            observe = not given.populations.labels["is_control"].all()
            columns = [name for name in ("context", "perturbation", "dose", "batch") if name in targets]
            return fitted.predict(
                given.populations,
                targets=targets[columns].reset_index(drop=True),
                num_samples=num_draws,
                seed=seed,
                observe=bool(observe),
            )

        def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
            mean = draw(given, targets, seed)["predictions"]["mean"]
            return np.asarray(mean.sel(population=list(targets.index)).values[0], dtype=np.float64)

        def made(draws: xr.DataTree, given: Screen, **options: Any) -> tuple[AnnData, Populations]:
            predicted = fitted.sample_cells(draws, given.populations, **options)
            keys = replace(training.populations.keys, layer=None)  # predicted cells stand in X
            return predicted, read_populations(predicted, **vars(keys), require=("perturbed",))

        def sample(
            given: Screen, targets: pd.DataFrame, num_cells: np.ndarray, seed: int
        ) -> list[np.ndarray]:
            # as many as are wanted: a part of a larger sample would have a sampling error of its own
            number = dict(zip(targets.index, num_cells.tolist(), strict=True))
            options = {"cells_per_population": number, "seed": seed}
            _, populations = made(draw(given, targets, seed), given, **options)
            return [natural_cells(populations, populations.cells_of(name)) for name in targets.index]

        def drawn(given: Screen, targets: pd.DataFrame, num_draws: int, seed: int) -> DrawnPopulations:
            _, _, controls = controls_of([given.table], targets)
            number = dict(
                zip(targets.index, np.minimum(controls, _MAX_POOL).astype(int).tolist(), strict=True)
            )
            options = {"cells_per_population": number, "num_draws": num_draws, "seed": seed}
            predicted, populations = made(draw(given, targets, seed), given, **options)
            of = predicted.obs["draw"].to_numpy()
            found = []
            for name in targets.index:
                cells = populations.cells_of(name)
                cells = cells[np.argsort(of[cells], kind="stable")]
                found.append(natural_cells(populations, cells).reshape(num_draws, number[name], -1))
            return DrawnPopulations(found, whole=True)

        return Predictor(law, sample, drawn) if cells else Predictor(law)

    return fitter


def training_replicates(labels: pd.DataFrame, condition: pd.Series, context: str, wanted: str) -> np.ndarray:
    """Training populations (P,) bool that stand for a target: same context and condition.

    For a pair that was never seen its condition in other contexts; for an unseen condition all of its context.
    """
    perturbed = ~labels["is_control"]
    choices = (
        perturbed & (condition == wanted) & (labels["context"] == context),
        perturbed & (condition == wanted),
        perturbed & (labels["context"] == context),
    )
    return next((rows for rows in choices if rows.any()), choices[-1]).to_numpy(dtype=bool)


def _from_table(
    baseline: Callable[..., np.ndarray], num_draws: int, moves_controls: bool = False, features: bool = False
) -> Fitter:
    """A baseline that needs the table of means only, and with `features` the inputs of `condition_features`.

    With `moves_controls` it also makes cells: those given controls, each moved by the predicted mean shift. On log1p
    values a moved cell may be negative; it is what such a baseline predicts, and metrics see it as it is.
    """

    def fitter(training: Screen) -> Predictor:
        def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
            table, wanted = baseline_inputs(training.table, given.table, targets)
            inputs = [condition_features(training.populations, targets)] if features else []
            return baseline(table, wanted, num_draws, np.random.default_rng(seed), *inputs)

        def cells(given: Screen, targets: pd.DataFrame, num_cells: np.ndarray, seed: int) -> list[np.ndarray]:
            control, _, _ = controls_of([given.table], targets)
            shift = law(given, targets, seed).mean(0) - control
            chosen = _control_cells(given, targets, num_cells, seed)
            return [own + moved for own, moved in zip(chosen, shift, strict=True)]

        return Predictor(law, cells, _moved_controls(law)) if moves_controls else Predictor(law)

    return fitter


def condition_features(training: Populations, targets: pd.DataFrame) -> np.ndarray:
    """Inputs (K, F) of each condition of `baseline_inputs`: which one it is, its dose, and features if there are any.

    Which one it is is known of training conditions only. The three blocks have equal weight in training.
    """
    rows = condition_rows(training.labels, targets)
    known = rows.index.isin(condition_rows(training.labels, targets[:0]).index)
    dose = np.log(rows["dose"].where(rows["dose"] > 0))
    blocks = [
        np.where(known[:, None], np.eye(len(rows)), 0.0),
        (dose - dose[known].mean()).fillna(0.0).to_numpy()[:, None],
    ]
    if training.perturbation_features is not None:
        names = list(dict.fromkeys(rows["perturbation"].astype(str)))
        table = perturbation_table(names, training.keys.control, features=training.perturbation_features)
        assert table.features is not None
        blocks.append(table.features[[names.index(name) for name in rows["perturbation"].astype(str)]])
    scales = [np.sqrt(block[known].var(0).sum()) for block in blocks]
    return np.hstack([block / (scale or 1.0) for block, scale in zip(blocks, scales, strict=True)])


def _moved_controls(law: LawPredictor) -> PopulationPredictor:
    """Whole populations: the given controls (at most 256), moved to each of the drawn means."""

    def populations(given: Screen, targets: pd.DataFrame, num_draws: int, seed: int) -> DrawnPopulations:
        control, _, number = controls_of([given.table], targets)
        shift = law(given, targets, seed)[:num_draws] - control
        pools = _control_cells(given, targets, np.minimum(number, _MAX_POOL).astype(int), seed)
        moved = [own + shift[:, t, None] for t, own in enumerate(pools)]
        return DrawnPopulations(moved, whole=True)

    return populations


def sampled_populations(cells: CellPredictor) -> PopulationPredictor:
    """Populations of a model that only makes cells: 64 cells of a seed of its own for each draw, all there is of them."""

    def populations(given: Screen, targets: pd.DataFrame, num_draws: int, seed: int) -> DrawnPopulations:
        number = np.full(len(targets), _SAMPLED)
        made = [cells(given, targets, number, seed + 1 + draw) for draw in range(num_draws)]
        return DrawnPopulations([np.stack(one) for one in zip(*made, strict=True)], whole=False)

    return populations


def _control_cells(
    given: Screen, targets: pd.DataFrame, num_cells: np.ndarray, seed: int
) -> list[np.ndarray]:
    """For each target that many given control cells of its (context, batch)."""
    rng = np.random.default_rng(seed)
    labels = given.populations.labels
    control = labels["is_control"].to_numpy(dtype=bool)
    return [
        cells_of_populations(
            given.populations,
            labels.index[
                control & (labels["context"] == context).to_numpy() & (labels["batch"] == batch).to_numpy()
            ],
            number,
            rng,
        )
        for context, batch, number in zip(targets["context"], targets["batch"], num_cells, strict=True)
    ]


def cells_of_populations(
    populations: Populations, names: Sequence[str] | pd.Index, number: int, rng: np.random.Generator
) -> np.ndarray:
    """`number` cells (number, G) of the pooled populations, without replacement. Raises: ValueError if too few."""
    positions = (
        np.concatenate([populations.cells_of(name) for name in names]) if len(names) else np.empty(0, int)
    )
    if len(positions) < number:
        raise ValueError(f"{number} cells were asked for, populations {list(names)} have {len(positions)}")
    return natural_cells(populations, np.sort(rng.choice(positions, number, replace=False)))
