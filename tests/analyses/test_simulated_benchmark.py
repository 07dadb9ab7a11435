"""On simulated donors: the oracle is not beaten, structure is found where it is and shrinks to nothing where it is not."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hilbertcell.analyses.benchmark import fit_fold, law_fold
from hilbertcell.analyses.law_summary import NULL
from hilbertcell.analyses.predictors import Screen, baseline_fitters, hilbertcell_fitter
from hilbertcell.analyses.simulated import simulate
from hilbertcell.analyses.simulated_benchmark import (
    MODEL,
    ORACLE,
    TEST_SHARE,
    demands,
    features_of,
    oracle_fitter,
    read_simulated,
    structure_gain,
    summarise,
    unseen_batch,
)
from hilbertcell.data.splits import Split, labels_hash, make_split, training_mask
from hilbertcell.inference.fit import fit
from hilbertcell.inference.settings import Settings
from hilbertcell.models.simulator import SimulatorSettings

SMALL = SimulatorSettings(num_genes=50, contexts=("x", "y"), num_batches=20, cells_per_population=60.0)
QUICK = Settings(num_steps=400, num_random_features=3, num_factors=2)
DRAWS = 100


def fitters():
    chosen = {NULL: baseline_fitters(DRAWS)[NULL]}
    return chosen | {MODEL: hilbertcell_fitter(DRAWS, settings=QUICK, cells=False)}


def excess(screen, split):
    """Mean excess squared error of the null and the model on the hidden populations of `split`."""
    predictors = {name: fit_fold(screen, split, fitter) for name, fitter in fitters().items()}
    scores, _ = law_fold(screen, split, predictors, np.ones(len(screen.populations.genes)), 0)
    return {name: float(score.targets["excess"].mean()) for name, score in scores.items()}


def hide(labels, mask, name):
    mask = np.asarray(mask)
    return Split(name, 0, tuple(labels.index[mask]), (), labels_hash(labels))


def test_the_oracle_sees_only_the_given_controls_and_covers():
    cells = simulate(0, SMALL)
    screen = Screen(read_simulated(cells))
    labels = screen.populations.labels
    split = make_split(labels, "unseen_batch", 0, 0.25)
    hidden = labels.loc[list(split.held_out)]
    given = screen.select((labels["is_control"] & labels["batch"].isin(hidden["batch"])).to_numpy())
    law = oracle_fitter(0, SMALL, DRAWS)(screen).law
    draws = law(given, hidden, 3)
    np.testing.assert_array_equal(draws, law(given, hidden, 3))
    truth = pd.DataFrame(cells.uns["truth"]["mean"], index=cells.uns["truth"]["population"])
    latent = truth.loc[hidden.index].to_numpy()
    lower, upper = np.quantile(draws, [0.05, 0.95], axis=0)
    # the truth itself is a mean over 1,000 cells
    assert 0.8 < ((lower - 0.03 < latent) & (latent < upper + 0.03)).mean() < 0.97
    one = hidden[hidden["batch"] == hidden["batch"].iloc[0]]
    np.testing.assert_array_equal(law(given, one, 3), draws[:, (hidden["batch"] == one["batch"].iloc[0])])


def test_demands_read_the_scores():
    def model(excess, cover, energy=1.0):
        return {"mean": {"excess": excess, "covered_90": cover, "energy": energy}}

    models = {NULL: model(1.0, 0.9), MODEL: model(0.5, 0.9), ORACLE: model(0.2, 0.9)}
    models |= {f"{MODEL}, batch labels shuffled": model(1.2, 0.9)}
    table = demands("unseen_batch", {"models": models})
    assert (table["holds"] == "yes").all()
    assert table.loc["gap between null and oracle closed", "is"] == "0.625"
    laws = models | {ORACLE: model(0.2, 0.9, 0.5), f"{MODEL}, diffusion": model(0.5, 0.95, 0.8)}
    table = demands("unseen_batch", {"models": laws})
    assert table.filter(like="diffusion", axis="index")["is"].tolist() == ["0.400", "0.950"]
    assert set(table.filter(like="diffusion", axis="index")["holds"]) == {"no"}
    models[MODEL] = model(0.9, 0.8)
    assert set(demands("unseen_pair", {"models": models})["holds"]) == {"no"}


@pytest.mark.slow
def test_unseen_batches_lie_between_null_and_oracle():
    summary = summarise({0: unseen_batch(0, fitters(), SMALL)})
    error = {name: model["mean"]["excess"] for name, model in summary["models"].items()}
    assert error[ORACLE] < error[MODEL] < 0.7 * error[NULL]
    assert error[f"{MODEL}, batch labels shuffled"] > 0.95 * error[NULL]


@pytest.mark.slow
def test_structure_is_found_where_it_is_and_shrinks_to_nothing_where_it_is_not():
    absent = replace(
        SMALL,
        mixed_responders=False,
        loading_scale=1e-6,
        modulation_scale=1e-6,
        slope_mean=0.0,
        slope_scale=1e-6,
        batch_effect_scale=1e-6,
    )
    gains, scales, slopes = {}, {}, {}
    for name, settings in (("present", SMALL), ("absent", absent)):
        populations = read_simulated(simulate(1, settings))
        split = make_split(populations.labels, "unseen_batch", 1, TEST_SHARE)
        mask = training_mask(split, populations.labels)
        training, tests = populations.select(mask), populations.select(~mask)
        rich = fit(training, settings=QUICK)
        gains[name] = structure_gain(1, settings, QUICK)
        draws = rich.predict(tests.select(tests.labels["is_control"]), num_samples=50)["posterior"]
        scales[name] = float(draws["factor_scale"].mean())
        slopes[name] = float(np.abs(draws["slope"].mean(("chain", "draw"))).mean())
    number = len(gains["present"])
    error = {name: gain.std(ddof=1) / np.sqrt(number) for name, gain in gains.items()}
    assert gains["present"].mean() > 5 * error["present"]
    assert abs(gains["absent"].mean()) < max(3 * error["absent"], 0.05 * gains["present"].mean())
    # Eight batches cannot tell a factor of a tenth of this variance from none; the score above says that it is harmless.
    assert scales["absent"] ** 2 < 0.1 * scales["present"] ** 2
    assert slopes["absent"] < 0.1


@pytest.mark.slow
def test_a_dose_between_seen_ones_is_better_than_its_neighbours_and_their_mean():
    settings = replace(
        SMALL, perturbations=("A", "B"), inert=(), combinations=(), doses=(0.1, 0.4, 1.5, 6.0, 25.0)
    )
    screen = Screen(read_simulated(simulate(2, settings)))
    labels, table = screen.populations.labels, screen.table
    hidden = (labels["perturbation"] == "A") & (labels["dose"] == 1.5)
    error = excess(screen, hide(labels, hidden, "unseen_pair"))
    names = labels.index[hidden]
    truth = table.rows(names)
    at = {
        dose: table.rows(pd.Index([n.replace("@ 1.5", f"@ {dose:g}") for n in names])) for dose in (0.4, 6.0)
    }
    for rival in (at[0.4].mean, at[6.0].mean):
        # the very batch's own population at a neighbouring dose is a stronger rival than other batches'
        assert error[MODEL] < ((rival - truth.mean) ** 2 - truth.noise).mean()
    assert error[MODEL] < error[NULL]


@pytest.mark.slow
def test_an_unseen_combination_is_better_than_no_change_and_not_worse_than_adding_up():
    settings = replace(
        SMALL, perturbations=("A", "B", "C"), inert=(), combinations=(("A", "B"), ("A", "C"), ("B", "C"))
    )
    screen = Screen(read_simulated(simulate(3, settings)))
    labels, table = screen.populations.labels, screen.table
    hidden = labels["perturbation"] == "B+C"
    error = excess(screen, hide(labels, hidden, "unseen_pair"))
    truth = table.rows(labels.index[hidden])

    def same(perturbation):
        return table.rows(pd.Index([name.replace("B+C", perturbation) for name in truth.labels.index])).mean

    control = same("control")
    nothing = ((control - truth.mean) ** 2 - truth.noise).mean()
    # mean shifts of the members over batches, added to the batch's own controls
    shift = sum(same(p) - control for p in ("B", "C"))
    mean = pd.DataFrame(shift).groupby(truth.labels["context"].to_numpy()).transform("mean").to_numpy()
    added = ((control + mean - truth.mean) ** 2 - truth.noise).mean()
    assert error[MODEL] < 0.8 * nothing
    assert error[MODEL] < 1.05 * added


@pytest.mark.slow
def test_features_of_an_unseen_perturbation_help_when_they_say_something():
    settings = replace(
        SMALL,
        perturbations=tuple(f"P{i:02d}" for i in range(16)),
        inert=(),
        combinations=(),
        num_batches=10,
        feature_share=0.9,
        num_features=2,
    )
    cells = simulate(4, settings)
    features = features_of(cells)
    noise = pd.DataFrame(np.random.default_rng(0).standard_normal(features.shape), features.index)
    error = {}
    for name, table in (("told", features), ("noise", noise.set_axis(features.columns, axis=1))):
        screen = Screen(read_simulated(cells, table))
        split = make_split(screen.populations.labels, "unseen_perturbation", 0)
        error[name] = excess(screen, split)
    assert error["told"][MODEL] < 0.7 * error["told"][NULL]
    assert error["noise"][MODEL] < 1.05 * error["noise"][NULL]
