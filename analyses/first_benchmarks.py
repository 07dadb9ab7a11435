"""The figures of docs/benchmarks.md: `python -m hilbertcell.analyses.first_benchmarks` writes its tables.

Bodenmiller: laws of donors of whom the controls are known, then also 20 stimulated cells of one cell type. Kang:
cells, from one half of a donor's controls, against real stimulated cells of the training donors.
"""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.progress import Progress

from hilbertcell.analyses.benchmark import (
    FEW_SHOT_CELLS,
    MODEL,
    cell_fold,
    concatenate_laws,
    concatenate_units,
    fit_fold,
    given_mask,
    law_fold,
)
from hilbertcell.analyses.cell_summary import cell_rows, summarise_cells
from hilbertcell.analyses.gene_table import gene_table
from hilbertcell.analyses.law_summary import (
    NULL,
    LawScores,
    jsonable,
    law_rows,
    score_targets,
    summarise_law,
)
from hilbertcell.analyses.predictors import (
    Fitter,
    Predictor,
    Screen,
    baseline_fitters,
    hilbertcell_fitter,
)
from hilbertcell.analyses.shuffled import shuffle_batches
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.data.splits import Split, leave_one_batch_out

FEW_SHOT_DRAWS = 20  # choices of the 20 cells, per donor and cell type
SHUFFLED = "{}, batch labels shuffled"
Report = Callable[[str], None]


def data_folder() -> Path:
    """The folder of real data sets: HILBERTCELL_DATA, or `../shared/data` beside the repository."""
    return Path(os.environ.get("HILBERTCELL_DATA", Path(__file__).parent.parent / "../shared/data")).resolve()


def bodenmiller(folder: Path) -> tuple[Populations, np.ndarray]:
    """Mass cytometry of six donors without `Other`, and each marker's standard deviation (G,) over all cells."""
    everything = read_populations(
        folder / "bodenmiller_bcrxl_cytof.h5ad",
        perturbation="perturbation",
        control="control",
        context="cell_type",
        batch="donor",
        scale="other",
    )
    unit = gene_table(everything).total_sd()
    return everything.select((everything.labels["context"] != "Other").to_numpy()), unit


def kang(folder: Path) -> Populations:
    """PBMC of six donors under interferon beta, counts."""
    return read_populations(
        folder / "kang_ifnb_wide.h5ad",
        perturbation="perturbation",
        control="control",
        context="cell_type",
        batch="donor",
        scale="counts",
    )


def law_targets(
    populations: Populations,
    unit: np.ndarray,
    fitters: Mapping[str, Fitter],
    *,
    few_shot: str | None = None,
    few_shot_draws: int = FEW_SHOT_DRAWS,
    shuffled: str | None = None,
    seed: int = 0,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Leave one batch out, laws only; JSON-able: `plain`, and `few_shot` and for the named models.

    Args:
        populations: of all batches.
        unit: (G,) by which genes are divided before scoring.
        fitters: what is compared; must hold `NULL`.
        few_shot: the model that is also given 20 perturbed cells of one context, and scored on the other contexts.
        few_shot_draws: choices of those cells, per batch and context.
        shuffled: the model that is also fitted and tested with batch labels shuffled; its row stands beside the null
            with the true labels, which is what its gain must not survive.
        seed: of draws.
        report: told a line per fold.

    """
    screen = Screen(populations)
    mixed = Screen(shuffle_batches(populations, seed)) if shuffled else None
    plain, few, labels = [], [], []
    for split in leave_one_batch_out(populations.labels):
        predictors = {name: fit_fold(screen, split, fitter) for name, fitter in fitters.items()}
        scores, targets = law_fold(screen, split, predictors, unit, seed)
        if few_shot is not None:
            told = few_shot_fold(screen, split, predictors[few_shot], unit, few_shot_draws)
            few.append({NULL: scores[NULL], f"{few_shot}, controls only": scores[few_shot], few_shot: told})
        if mixed is not None and shuffled is not None:
            same = next(
                s for s in leave_one_batch_out(mixed.populations.labels) if s.held_out == split.held_out
            )
            predictor = fit_fold(mixed, same, fitters[shuffled])
            scores |= {
                SHUFFLED.format(shuffled): law_fold(mixed, same, {shuffled: predictor}, unit, seed)[0][
                    shuffled
                ]
            }
        plain.append(scores)
        labels.append(targets)
        crps = ", ".join(f"{name} {model.targets['crps'].mean():.4f}" for name, model in scores.items())
        report(f"{targets['batch'].iloc[0]}: CRPS {crps}")
    every = pd.concat(labels)
    result = {"plain": summarise_law(concatenate_laws(plain), every, seed)}
    if few:
        result["few_shot"] = summarise_law(concatenate_laws(few), every, seed)
    return jsonable(result)


def few_shot_fold(
    screen: Screen, split: Split, predictor: Predictor, unit: np.ndarray, num_draws: int
) -> LawScores:
    """Scores of the hidden populations of one batch, given 20 cells of another one: mean over which and over the cells."""
    if predictor.law is None:
        raise ValueError("few-shot scores need a predictor with a law")
    populations = screen.populations
    truth = screen.table.rows(pd.Index(split.held_out))
    mask = given_mask(split, populations.labels)
    tables, pits = [], []
    for name in split.held_out:
        labels = truth.labels
        others = truth.rows(labels.index[labels["context"] != labels.loc[name, "context"]])
        number = min(FEW_SHOT_CELLS, int(populations.labels.loc[name, "num_cells"]))
        for draw in range(num_draws):
            given = populations.select(mask | (populations.labels.index == name))
            given = given.keep_cells(name, number, draw)
            scores = score_targets(predictor.law(Screen(given), others.labels, draw), others, unit, draw)
            tables.append(scores.targets)
            pits.append(pd.DataFrame(scores.pit, index=scores.targets.index))
    # every target is scored with each other population as the known one
    pit = pd.concat(pits).groupby(level=0)
    return LawScores(
        pd.concat(tables).groupby(level=0).mean().loc[truth.labels.index],
        np.stack([pit.get_group(name).to_numpy().ravel() for name in truth.labels.index]),
    )


def cell_targets(
    populations: Populations,
    fitters: Mapping[str, Fitter],
    *,
    num_splits: int = 3,
    seed: int = 0,
    report: Report = lambda line: None,
) -> dict[str, Any]:
    """Leave one batch out, cells only; JSON-able. Scores of a unit are means over `num_splits` halvings of its controls."""
    screen = Screen(populations)
    folds = []
    for split in leave_one_batch_out(populations.labels):
        predictors = {name: fit_fold(screen, split, fitter) for name, fitter in fitters.items()}
        for repeat in range(num_splits):
            folds.append(cell_fold(screen, split, predictors, seed + repeat))
        if folds[-1]:
            distance = ", ".join(f"{name} {t['energy_distance'].mean():.3f}" for name, t in folds[-1].items())
            report(f"{next(iter(folds[-1].values()))['batch'].iloc[0]}: energy distance {distance}")
    units = concatenate_units(folds)
    batch = next(iter(units.values())).groupby(level=0)["batch"].first()
    means = {name: table.drop(columns="batch").groupby(level=0).mean() for name, table in units.items()}
    return jsonable(summarise_cells(means, batch, seed))


def law_markdown(summary: Mapping[str, Any]) -> str:
    """The table of a law benchmark, and the ratios per batch."""
    return f"{markdown(law_rows(summary))}\n{_per_batch(summary, 'relative_to_null', ('excess', 'crps'))}"


def cell_markdown(summary: Mapping[str, Any]) -> str:
    """The table of a cell benchmark, and the ratios per batch."""
    columns = ("energy_distance", "precision_at_N", "pearson", "mae")
    return f"{markdown(cell_rows(summary))}\n{_per_batch(summary, 'relative_to_training_cells', columns)}"


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown, the index as its first column."""
    lines = [["model", *table.columns], ["---"] * (table.shape[1] + 1)]
    lines += [
        [str(name), *(str(value).replace("|", "/") for value in row)] for name, *row in table.itertuples()
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _per_batch(summary: Mapping[str, Any], key: str, columns: tuple[str, ...]) -> str:
    rows = {
        f"{name}, {column}": [
            "-" if ratio is None else f"{ratio:.3f}" for ratio in model[key][column]["per_batch"]
        ]
        for name, model in summary["models"].items()
        for column in columns
        if column in model[key] and len(model[key][column]["per_batch"]) == len(summary["batches"])
    }
    return markdown(pd.DataFrame.from_dict(rows, orient="index", columns=summary["batches"])) if rows else ""


def main() -> None:
    """Run the benchmarks and write one Markdown part and one JSON file per benchmark."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.first_benchmarks", description=__doc__)
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder of the real data sets")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    parser.add_argument("--only", choices=["bodenmiller", "kang"], help="run one of the two")
    parser.add_argument("--few-shot-draws", type=int, default=FEW_SHOT_DRAWS, help="choices of the 20 cells")
    parser.add_argument("--baselines", action="store_true", help="baselines only, in seconds")
    options = parser.parse_args()
    fitters = baseline_fitters() | ({} if options.baselines else {MODEL: hilbertcell_fitter()})
    model = None if options.baselines else MODEL
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)

    def write(name: str, text: str, results: Mapping[str, Any]) -> None:
        (options.out / f"{name}.md").write_text(text)
        (options.out / f"{name}.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")

    with Progress(console=console, transient=True) as progress:
        if options.only in (None, "bodenmiller"):
            progress.add_task("bodenmiller_bcrxl_cytof", total=None)
            populations, unit = bodenmiller(options.data)
            results = law_targets(
                populations,
                unit,
                fitters,
                few_shot=model,
                few_shot_draws=options.few_shot_draws,
                shuffled=model or "own-baseline slope",
                report=console.print,
            )
            for part, summary in results.items():
                write(f"bodenmiller_{part}", law_markdown(summary), summary)
        if options.only in (None, "kang"):
            progress.add_task("kang_ifnb_wide", total=None)
            summary = cell_targets(
                kang(options.data),
                {name: fitters[name] for name in ("no change", "training cells", MODEL) if name in fitters},
                report=console.print,
            )
            write("kang_cells", cell_markdown(summary), summary)


if __name__ == "__main__":
    main()
