"""The first benchmark: hide populations, predict them from what is given, score laws and cells, judge against the null."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.progress import Progress

from hilbertcell.analyses.cell_summary import score_cells, summarise_cells
from hilbertcell.analyses.gene_table import natural_cells
from hilbertcell.analyses.law_summary import (
    LawScores,
    jsonable,
    score_targets,
    summarise_law,
)
from hilbertcell.analyses.predictors import Fitter, Predictor, Screen, baseline_fitters, hilbertcell_fitter
from hilbertcell.data.populations import Populations
from hilbertcell.data.splits import (
    Split,
    check_no_leak,
    check_same_data,
    leave_one_batch_out,
    make_split,
    training_mask,
)

if TYPE_CHECKING:
    from hilbertcell.inference.settings import Settings

MIN_PERTURBED = 20  # cells: below, DE tests and energy distances of a unit are noise
MIN_CONTROL = 40  # cells: half is transported, half is the reference
FEW_SHOT_CELLS = 20
MODEL = "hilbertcell"


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
            predictors = {}
            for name, fitter in fitters.items():
                predictors[name] = fit_fold(screen, fold, fitter)
                bar.advance(task)
            law, labels = law_fold(screen, fold, predictors, unit, seed)
            laws.append(law)
            targets.append(labels)
            if with_cells and fold.name == "unseen_batch":
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


def fit_fold(screen: Screen, split: Split, fitter: Fitter) -> Predictor:
    """Fit on what the split leaves for training. Raises: LeakError, SplitError if it was made for other data."""
    check_same_data(split, screen.populations.labels)
    training = screen.select(training_mask(split, screen.populations.labels))
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
    screen: Screen, split: Split, predictors: Mapping[str, Predictor], seed: int
) -> dict[str, pd.DataFrame]:
    """Scores of every predictor that makes cells, a row per unit of one split.

    The controls of each unit are cut in two by a hash of the cells' names: one half is given, the other is the
    reference of the tests on both sides. Prediction, truth and training cells are cut to the same number.
    """
    populations = screen.populations
    units = cell_units(populations.labels, split.held_out)
    training = populations.labels[training_mask(split, populations.labels)]
    pool = training[~training["is_control"]].groupby(["context", "perturbation"])["num_cells"].sum()
    pairs = list(zip(units["context"], units["perturbation"], strict=True))
    available = np.array([int(pool.get(pair, 0)) for pair in pairs], dtype=int)
    units, available = units[available >= MIN_PERTURBED], available[available >= MIN_PERTURBED]
    if not len(units):
        return {}
    given = populations.select(given_mask(split, populations.labels))
    for name in units["control"].unique():
        given = given.keep_cells(name, int(given.labels.loc[name, "num_cells"]) // 2, seed)
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
            scores[name] = pd.DataFrame(rows, index=units.index).assign(batch=units["batch"])
    return scores


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
        )
        for name in folds[0]
    }
