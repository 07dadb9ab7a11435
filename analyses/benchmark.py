"""The first benchmark: hide populations, predict them from what is given, score laws and cells, judge against the null."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.progress import Progress

from hilbertcell.analyses.cell_summary import score_cells, score_groups, summarise_cells
from hilbertcell.analyses.gene_table import condition_names, natural_cells
from hilbertcell.analyses.law_summary import (
    LawScores,
    jsonable,
    score_targets,
    summarise_law,
)
from hilbertcell.analyses.population_scores import NUM_POPULATIONS, score_populations
from hilbertcell.analyses.predictors import (
    Fitter,
    Predictor,
    Screen,
    baseline_fitters,
    hilbertcell_fitter,
    sampled_populations,
    training_replicates,
)
from hilbertcell.data.populations import Populations
from hilbertcell.data.splits import (
    Split,
    check_no_leak,
    check_same_data,
    leave_one_batch_out,
    make_split,
    training_mask,
)
from hilbertcell.models.feature_maps import FeatureMap, fit_feature_map

if TYPE_CHECKING:
    from hilbertcell.inference.settings import Settings

MIN_PERTURBED = 20  # cells: below, DE tests and energy distances of a unit are noise
MIN_CONTROL = 40  # cells: half is transported, half is the reference
FEW_SHOT_CELLS = 20
MAX_PILOT = 5_000  # cells that fix the feature map of a fold
MODEL = "hilbertcell"
type Embedding = tuple[FeatureMap, np.ndarray]


def benchmark(
    populations: Populations,
    split: str = "unseen_batch",
    *,
    seed: int = 0,
    settings: "Settings | None" = None,
    num_samples: int = 500,
    with_cells: bool = True,
    progress: bool = False,
) -> dict[str, Any]:
    """Compare the hidden-factor program with the baselines on one split of `populations`; JSON-able.

    `unseen_batch` leaves one batch out after the other; the other splits of `data.splits` are made once with `seed`.
    Laws are scored on every hidden population, cells on the units that have enough of them (`cell_units`).
    Raises: SplitError if the split cannot be made with these labels.
    """
    screen = Screen(populations)
    splits = (
        leave_one_batch_out(populations.labels)
        if split == "unseen_batch"
        else [make_split(populations.labels, split, seed)]
    )
    fitters = baseline_fitters(num_samples) | {MODEL: hilbertcell_fitter(num_samples, seed, settings)}
    scale = populations.keys.scale
    unit = screen.table.total_sd() if scale == "other" else np.ones(len(populations.genes))
    laws: list[dict[str, LawScores]] = []
    cells: list[dict[str, pd.DataFrame]] = []
    targets: list[pd.DataFrame] = []
    with Progress(transient=True, disable=not progress) as bar:
        task = bar.add_task(f"benchmark, {len(splits)} folds", total=len(splits) * len(fitters))
        for fold in splits:
            source = training_source(screen, fold, seed)
            predictors = {}
            for name, fitter in fitters.items():
                predictors[name] = fit_fold(screen, fold, fitter, source)
                bar.advance(task)
            law, labels = law_fold(source, fold, predictors, unit, seed)
            laws.append(law)
            targets.append(labels)
            if with_cells:
                cells.append(cell_fold(screen, fold, predictors, seed))
    result: dict[str, Any] = {
        "split": split,
        "seed": seed,
        "scale": scale,
        "unit": "standard deviation of each gene over all cells" if scale == "other" else scale,
        "num_samples": num_samples,
        "law": summarise_law(concatenate_laws(laws), pd.concat(targets), seed),
    }
    units = concatenate_units(cells)
    if units:
        batch = next(iter(units.values()))["batch"]
        result["cells"] = summarise_cells(
            {name: table.drop(columns="batch") for name, table in units.items()}, batch, seed
        )
    return jsonable(result)


def fit_fold(screen: Screen, split: Split, fitter: Fitter, source: Screen | None = None) -> Predictor:
    """Fit on what the split leaves for training, of `source` (the same populations with fewer cells) if given.

    Raises: LeakError, SplitError if the split was made for other data than those of `screen`.
    """
    check_same_data(split, screen.populations.labels)
    training = (source or screen).select(training_mask(split, screen.populations.labels))
    check_no_leak(split, training.populations.labels.index)
    return fitter(training)


def given_mask(split: Split, labels: pd.DataFrame) -> np.ndarray:
    """Populations whose cells are given at prediction (P,) bool: the controls of the batches of the targets."""
    batches = labels.loc[list(split.held_out), "batch"].unique()
    return (labels["is_control"] & labels["batch"].isin(batches)).to_numpy()


def given_screen(screen: Screen, split: Split, seed: int) -> Screen:
    """What a predictor is given: controls of the targets' batches, and for few_shot some perturbed cells."""
    labels = screen.populations.labels
    mask = given_mask(split, labels)
    if not split.given:
        return screen.select(mask)
    few = screen.populations.select(mask | labels.index.isin(split.given))
    for name in split.given:
        few = few.keep_cells(name, min(FEW_SHOT_CELLS, int(few.labels.loc[name, "num_cells"])), seed)
    return Screen(few)


def law_fold(
    screen: Screen, split: Split, predictors: Mapping[str, Predictor], unit: np.ndarray, seed: int
) -> tuple[dict[str, LawScores], pd.DataFrame]:
    """Scores of every predictor that has a law, on the hidden populations of one split."""
    truth = screen.table.rows(pd.Index(split.held_out))
    given = given_screen(screen, split, seed)
    scores = {
        name: score_targets(predictor.law(given, truth.labels, seed), truth, unit, seed)
        for name, predictor in predictors.items()
        if predictor.law is not None
    }
    return scores, truth.labels


def cell_units(labels: pd.DataFrame, names: Sequence[str]) -> pd.DataFrame:
    """Hidden populations of >= 20 cells whose (context, batch) has >= 40 controls: rows of `labels`, with `control`."""
    controls = labels[labels["is_control"] & (labels["num_cells"] >= MIN_CONTROL)]
    place = dict(zip(zip(controls["context"], controls["batch"], strict=True), controls.index, strict=True))
    units = labels.loc[list(names)]
    units = units[units["num_cells"] >= MIN_PERTURBED]
    control = [place.get(key) for key in zip(units["context"], units["batch"], strict=True)]
    return units.assign(control=control)[np.array([name is not None for name in control], dtype=bool)]


def cell_fold(
    screen: Screen,
    split: Split,
    predictors: Mapping[str, Predictor],
    seed: int,
    embedding: Embedding | None = None,
) -> dict[str, pd.DataFrame]:
    """Scores of every predictor that makes cells, a row per unit of one split, and of the units of a (context, batch).

    The controls of each unit are cut in two by a hash of the cells' names: one half is given, the other is the
    reference of the tests on both sides. Prediction, truth and training cells are cut to the same number. Where a split
    leaves controls in training, predictors must have been fitted on `without_references`. With an `embedding`, whole
    populations are scored too (`score_populations`): those that the predictor draws, or cells of as many seeds.
    """
    populations = screen.populations
    units = cell_units(populations.labels, split.held_out)
    training = populations.labels[training_mask(split, populations.labels)]
    condition = condition_names(training)
    available = np.array(
        [
            training["num_cells"][training_replicates(training, condition, context, wanted)].sum()
            for context, wanted in zip(units["context"], condition_names(units), strict=True)
        ],
        dtype=int,
    )
    units, available = units[available >= MIN_PERTURBED], available[available >= MIN_PERTURBED]
    if not len(units):
        return {}
    given = _halved(given_screen(screen, split, seed).populations, units["control"], seed)
    half = given.labels.loc[units["control"], "num_cells"].to_numpy()
    number = np.minimum(np.minimum(units["num_cells"].to_numpy(), half), available)
    rng = np.random.default_rng(seed)
    truth = [
        natural_cells(populations, np.sort(rng.choice(populations.cells_of(name), n, replace=False)))
        for name, n in zip(units.index, number, strict=True)
    ]
    references = [
        natural_cells(populations, np.setdiff1d(populations.cells_of(name), given.cells_of(name)))
        for name in units["control"]
    ]
    scores = {}
    for name, predictor in predictors.items():
        if predictor.cells is not None:
            predicted = predictor.cells(Screen(given), units.drop(columns="control"), number, seed)
            rows = [score_cells(*cells) for cells in zip(predicted, truth, references, strict=True)]
            table = pd.DataFrame(rows, index=units.index)
            effect, true_effect = (
                np.array(
                    [cells.mean(0) - control.mean(0) for cells, control in zip(side, references, strict=True)]
                )
                for side in (predicted, truth)
            )
            table = score_groups(table, units, effect, true_effect, populations.genes)
            if embedding is not None:
                draw = predictor.populations or sampled_populations(predictor.cells)
                drawn = draw(Screen(given), units.drop(columns="control"), NUM_POPULATIONS, seed)
                observed = [natural_cells(populations, populations.cells_of(unit)) for unit in units.index]
                table = table.join(score_populations(drawn, observed, *embedding, units.index, seed))
            scores[name] = table.assign(batch=units["batch"])
    return scores


def shared_embedding(source: Screen, split: Split, unit: np.ndarray, seed: int) -> Embedding:
    """The feature map in which whole populations of a fold are scored, from its training cells, and the units of genes."""
    training = source.populations.select(training_mask(split, source.populations.labels))
    return fit_feature_map(training.pilot(MAX_PILOT, seed)[0], seed=seed), unit


def training_source(screen: Screen, split: Split, seed: int) -> Screen:
    """What fits of this split may read: without the references of `cell_fold` where controls of its units are in training."""
    labels = screen.populations.labels
    controls = cell_units(labels, split.held_out)["control"]
    seen = labels.index[training_mask(split, labels)]
    return without_references(screen, split, seed) if controls.isin(seen).any() else screen


def without_references(screen: Screen, split: Split, seed: int) -> Screen:
    """The same populations less the control cells that `cell_fold` keeps as references of this split's units."""
    labels = screen.populations.labels
    return Screen(_halved(screen.populations, cell_units(labels, split.held_out)["control"], seed))


def _halved(populations: Populations, controls: pd.Series, seed: int) -> Populations:
    for name in controls.unique():
        populations = populations.keep_cells(name, int(populations.labels.loc[name, "num_cells"]) // 2, seed)
    return populations


def concatenate_units(folds: Sequence[Mapping[str, pd.DataFrame]]) -> dict[str, pd.DataFrame]:
    """Scores of all folds that had units, one table per predictor."""
    folds = [fold for fold in folds if fold]
    return {name: pd.concat([fold[name] for fold in folds]) for name in (folds[0] if folds else {})}


def concatenate_laws(folds: Sequence[Mapping[str, LawScores]]) -> dict[str, LawScores]:
    """Scores of the targets of all folds, one table per predictor."""
    return {
        name: LawScores(
            pd.concat([fold[name].targets for fold in folds]),
            np.concatenate([fold[name].pit for fold in folds]),
            _stacked([fold[name].residual for fold in folds]),
        )
        for name in folds[0]
    }


def _stacked(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    known = [part for part in parts if part is not None]
    return np.concatenate(known) if len(known) == len(parts) else None
