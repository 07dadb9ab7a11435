"""Law benchmarks on simulated donors, where the best possible law is known: `python -m hilbertcell.analyses.simulated_benchmark`.

24 training and 8 test batches per world; a world is a seed, and the batches of all worlds are the units of replication.
The settings below were fixed before anything was fitted to these worlds. Writes a Markdown part and a JSON file per
question.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
from rich.console import Console

from hilbertcell.analyses.batch_log_score import batch_log_score
from hilbertcell.analyses.benchmark import MODEL, concatenate_laws, fit_fold, law_fold
from hilbertcell.analyses.first_benchmarks import SHUFFLED, markdown
from hilbertcell.analyses.law_summary import NULL, LawScores, jsonable, law_rows, summarise_law
from hilbertcell.analyses.predictors import Fitter, Predictor, Screen, baseline_fitters, hilbertcell_fitter
from hilbertcell.analyses.shuffled import shuffle_batches
from hilbertcell.analyses.simulated import simulate, simulated_world
from hilbertcell.analyses.verdicts import verdicts
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.populations import Populations
from hilbertcell.data.splits import Split, make_split, training_mask
from hilbertcell.inference.fit import fit
from hilbertcell.inference.settings import Settings
from hilbertcell.models.oracle import condition, log_library_of, mean_curves, predicted_means
from hilbertcell.models.simulator import SimulatorSettings

BATCHES = SimulatorSettings(num_batches=32)  # for unseen batches and unseen pairs
PERTURBATIONS = SimulatorSettings(  # for unseen perturbations: enough of them to learn what features mean
    contexts=("lymphoid", "myeloid"),
    perturbations=tuple(f"P{i + 1:02d}" for i in range(20)),
    inert=(),
    combinations=(),
    num_batches=24,
    cells_per_population=60.0,
)
TEST_SHARE = 0.25  # of the batches, of the (context, perturbation) pairs; of the perturbations it is a fifth
NUM_DRAWS = 500
ORACLE = "oracle"
UNINFORMATIVE = f"{MODEL}, uninformative features"
DIFFUSION = f"{MODEL}, diffusion"
COVER = (0.87, 0.93)  # what 90 % intervals may cover
_COVER = f"{COVER[0]:.2f} to {COVER[1]:.2f}"
PARTS = ("unseen_batch", "unseen_pair", "unseen_perturbation", "structure")
# A world of the same kind in which batches differ by nothing but sampling noise.
UNSTRUCTURED = replace(
    BATCHES,
    mixed_responders=False,
    loading_scale=1e-6,
    modulation_scale=1e-6,
    slope_mean=0.0,
    slope_scale=1e-6,
    batch_effect_scale=1e-6,
)

Fold = tuple[dict[str, LawScores], pd.DataFrame]


def oracle_fitter(seed: int, settings: SimulatorSettings, num_draws: int = NUM_DRAWS) -> Fitter:
    """The law of the world behind `simulate(seed, settings)`: it learns nothing and sees the given controls alone."""
    world = simulated_world(seed, settings)
    curves = mean_curves(settings, world, np.random.default_rng(seed))

    def law(given: Screen, targets: pd.DataFrame, seed: int) -> np.ndarray:
        labels, populations = given.table.labels, given.populations
        draws = np.empty((num_draws, len(targets), settings.num_genes))
        for batch in targets["batch"].unique():
            mean = np.zeros((len(settings.contexts), settings.num_genes))
            number, library = np.zeros(len(settings.contexts)), []
            for j in np.flatnonzero((labels["is_control"] & (labels["batch"] == batch)).to_numpy()):
                c = settings.contexts.index(labels["context"].iloc[j])
                mean[c], number[c] = given.table.mean[j], given.table.n[j]
                assert populations.library_size is not None  # simulated data are counts
                library.append(populations.library_size[populations.cells_of(labels.index[j])])
            log_library = log_library_of(settings, np.concatenate([*library, np.empty(0)]))
            environments = condition(settings, world, curves, mean, number, log_library, num_draws, seed)
            for t in np.flatnonzero(targets["batch"] == batch):
                row = targets.iloc[t]
                draws[:, t] = predicted_means(
                    settings, world, curves, environments, row["context"], row["perturbation"], row["dose"]
                )
        return draws

    return lambda training: Predictor(law)


def read_simulated(cells: anndata.AnnData, features: pd.DataFrame | None = None) -> Populations:
    """Populations of what `simulate` made."""
    return read_populations(
        cells,
        perturbation="perturbation",
        control="control",
        context="cell_type",
        batch="donor",
        scale="counts",
        dose="dose" if "dose" in cells.obs else None,
        perturbation_features=features,
    )


def features_of(cells: anndata.AnnData) -> pd.DataFrame:
    """The true perturbation features (M, F) of what `simulate` made."""
    truth = cells.uns["truth"]
    return pd.DataFrame(truth["features"], index=list(truth["perturbations"])).rename(columns="f{}".format)


def unseen_batch(seed: int, fitters: Mapping[str, Fitter], settings: SimulatorSettings = BATCHES) -> Fold:
    """Scores of one world: the perturbed populations of a quarter of the batches, whose controls are given."""
    screen = Screen(read_simulated(simulate(seed, settings)))
    split = make_split(screen.populations.labels, "unseen_batch", seed, TEST_SHARE)
    scores, labels = _scores(screen, split, {**fitters, ORACLE: oracle_fitter(seed, settings)}, seed)
    mixed = Screen(shuffle_batches(screen.populations, seed))
    split = make_split(mixed.populations.labels, "unseen_batch", seed, TEST_SHARE)
    shuffled, _ = _scores(mixed, split, {MODEL: fitters[MODEL]}, seed)
    return scores | {SHUFFLED.format(MODEL): shuffled[MODEL]}, labels


def unseen_pair(seed: int, fitters: Mapping[str, Fitter], settings: SimulatorSettings = BATCHES) -> Fold:
    """Scores of one world: a quarter of the (context, perturbation) pairs, in all batches.

    The null is the perturbation mean here: the mean shift of the perturbation in the other contexts, added to the
    controls. The oracle knows what happens in the hidden pairs, which nobody can.
    """
    screen = Screen(read_simulated(simulate(seed, settings)))
    split = make_split(screen.populations.labels, "unseen_pair", seed, TEST_SHARE)
    return _scores(screen, split, {**fitters, ORACLE: oracle_fitter(seed, settings)}, seed)


def unseen_perturbation(
    seed: int, fitters: Mapping[str, Fitter], settings: SimulatorSettings = PERTURBATIONS
) -> Fold:
    """Scores of one world: a fifth of the perturbations, with their true features and with random numbers instead.

    The null is the mean over perturbations here: the mean shift of all of them in the context, added to the controls.
    """
    cells = simulate(seed, settings)
    features = features_of(cells)
    noise = pd.DataFrame(
        np.random.default_rng(seed).standard_normal(features.shape), features.index, features.columns
    )
    screen = Screen(read_simulated(cells, features))
    split = make_split(screen.populations.labels, "unseen_perturbation", seed)
    scores, labels = _scores(screen, split, {**fitters, ORACLE: oracle_fitter(seed, settings)}, seed)
    blind = Screen(read_simulated(cells, noise), screen.table)
    return scores | {UNINFORMATIVE: _scores(blind, split, {MODEL: fitters[MODEL]}, seed)[0][MODEL]}, labels


def structure_gain(seed: int, settings: SimulatorSettings, fitting: Settings) -> pd.Series:
    """Log score of each test batch of one world under a fit with hidden factors, less that under one without."""
    populations = read_simulated(simulate(seed, settings))
    mask = training_mask(make_split(populations.labels, "unseen_batch", seed, TEST_SHARE), populations.labels)
    training, tests = populations.select(mask), populations.select(~mask)
    rich, plain = (
        fit(training, settings=fitting.model_copy(update=change)) for change in ({}, {"num_factors": 0})
    )
    return batch_log_score(rich, tests) - batch_log_score(plain, tests)


def structure_table(seeds: int) -> pd.DataFrame:
    """Gain of hidden factors over the batches of all worlds, and what may be concluded."""
    rows = {}
    for name, settings in (("as everywhere", BATCHES), ("nothing hidden", UNSTRUCTURED)):
        gain = pd.concat([structure_gain(seed, settings, Settings()) for seed in range(seeds)]).to_numpy()
        rows[name] = {
            "batches": str(len(gain)),
            "gain per batch": f"{gain.mean():.1f} ± {gain.std(ddof=1) / np.sqrt(len(gain)):.1f}",
            "hidden factors": verdicts(-gain, {"none": np.zeros_like(gain)})["none"].outcome,
        }
    return pd.DataFrame.from_dict(rows, orient="index")


QUESTIONS: dict[str, Callable[[int, Mapping[str, Fitter]], Fold]] = {
    "unseen_batch": unseen_batch,
    "unseen_pair": unseen_pair,
    "unseen_perturbation": unseen_perturbation,
}


def _scores(screen: Screen, split: Split, fitters: Mapping[str, Fitter], seed: int) -> Fold:
    predictors = {name: fit_fold(screen, split, fitter) for name, fitter in fitters.items()}
    return law_fold(screen, split, predictors, np.ones(len(screen.populations.genes)), seed)


def summarise(folds: Mapping[int, Fold]) -> dict[str, Any]:
    """Scores of all worlds together, JSON-able; a batch is named after its world too."""
    labels = pd.concat(
        [
            fold.assign(batch=f"world {seed}, " + fold["batch"].astype(str))
            for seed, (_, fold) in folds.items()
        ]
    )
    scores = concatenate_laws([scores for scores, _ in folds.values()])
    return jsonable(summarise_law(scores, labels, bounds=(ORACLE,)))


def demands(question: str, summary: Mapping[str, Any]) -> pd.DataFrame:
    """What must hold, what was found, and whether it holds."""
    models = summary["models"]
    excess = {name: model["mean"]["excess"] for name, model in models.items()}
    ratio = {name: value / excess[NULL] for name, value in excess.items()}
    cover = models[MODEL]["mean"]["covered_90"]
    rows: dict[str, tuple[str, float, bool]] = {}
    limit = 0.70 if question == "unseen_batch" else 0.85
    rows["excess error x null"] = (f"<= {limit:.2f}", ratio[MODEL], ratio[MODEL] <= limit)
    if question == "unseen_batch":
        closed = (excess[NULL] - excess[MODEL]) / (excess[NULL] - excess[ORACLE])
        rows["gap between null and oracle closed"] = (">= 0.60", closed, closed >= 0.6)
        shuffled = ratio[SHUFFLED.format(MODEL)]
        rows["excess error x null, batch labels shuffled"] = (">= 1.00", shuffled, shuffled >= 1.0)
    if DIFFUSION in models:
        score = {name: model["mean"]["energy"] for name, model in models.items()}
        closed = (score[MODEL] - score[DIFFUSION]) / (score[MODEL] - score[ORACLE])
        rows["energy score: gap between the Gaussian law and the oracle closed by the diffusion"] = (
            ">= 0.60", closed, closed >= 0.6,
        )  # fmt: skip
        found = models[DIFFUSION]["mean"]["covered_90"]
        rows["cover of 90 %, diffusion"] = (_COVER, found, COVER[0] <= found <= COVER[1])
    if question == "unseen_perturbation":
        without = ratio[UNINFORMATIVE]
        rows["excess error x null, uninformative features"] = ("<= 1.00", without, without <= 1.0)
    rows["cover of 90 %"] = (_COVER, cover, COVER[0] <= cover <= COVER[1])
    return pd.DataFrame(
        {
            name: {"must be": wanted, "is": f"{found:.3f}", "holds": "yes" if holds else "no"}
            for name, (wanted, found, holds) in rows.items()
        }
    ).T


def main() -> None:
    """Run the benchmarks and write one Markdown part and one JSON file per question."""
    parser = argparse.ArgumentParser(prog="hilbertcell.analyses.simulated_benchmark", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="worlds per question")
    parser.add_argument("--only", choices=PARTS, help="one of the questions")
    parser.add_argument("--diffusion", action="store_true", help="a row of the diffusion as well")
    parser.add_argument("--out", type=Path, default=Path("docs/_parts"), help="folder of the parts")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=True)
    baselines = {
        name: fitter for name, fitter in baseline_fitters(NUM_DRAWS).items() if name != "training cells"
    }
    own = {MODEL: hilbertcell_fitter(NUM_DRAWS, cells=False)}
    if options.diffusion:
        own[DIFFUSION] = hilbertcell_fitter(NUM_DRAWS, settings=Settings(law="diffusion"), cells=False)
    fitters = baselines | own
    for question in (options.only,) if options.only else PARTS:
        if question == "structure":
            text = markdown(structure_table(options.seeds)).replace("| model |", "| world |", 1)
            (options.out / "simulated_structure.md").write_text(text)
            print(text)
            continue
        folds = {}
        for seed in range(options.seeds):
            folds[seed] = QUESTIONS[question](seed, fitters)
            console.print(
                f"{question}, world {seed}: excess "
                + ", ".join(
                    f"{name} {scores.targets['excess'].mean():.4f}" for name, scores in folds[seed][0].items()
                )
            )
        summary = summarise(folds)
        table = demands(question, summary)
        text = f"{options.seeds} world(s).\n\n{markdown(table).replace('| model |', '| |', 1)}\n{markdown(law_rows(summary))}"
        (options.out / f"simulated_{question}.md").write_text(text)
        summary["demands"] = table.to_dict("index")
        (options.out / f"simulated_{question}.json").write_text(
            json.dumps(summary, indent=1, allow_nan=False) + "\n"
        )
        print(text)


if __name__ == "__main__":
    main()
