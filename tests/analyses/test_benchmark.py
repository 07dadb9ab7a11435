import json

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from hilbertcell.analyses.benchmark import (
    cell_fold,
    cell_units,
    concatenate_laws,
    fit_fold,
    given_screen,
    law_fold,
    training_source,
)
from hilbertcell.analyses.cell_summary import cell_rows, score_cells, summarise_cells
from hilbertcell.analyses.gene_table import GeneTable, controls_of, gene_table, natural_cells, table_of
from hilbertcell.analyses.law_summary import NULL, law_rows, score_targets, summarise_law
from hilbertcell.analyses.predictors import Predictor, Screen, baseline_fitters
from hilbertcell.analyses.shuffled import shuffle_batches
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.splits import LeakError, Split, leave_one_batch_out, make_split

GENES = 24
KEYS = {"perturbation": "condition", "control": "ctrl", "context": "kind", "batch": "donor", "scale": "other"}


def simulated_screen(seed=0, num_cells=60, num_batches=6, slope=-0.6):
    """Donors with their own control levels; the response depends on them (own baseline), noise of cells 1."""
    rng = np.random.default_rng(seed)
    blocks, obs = [], []
    for kind in ("B", "T"):
        level, effect = rng.normal(size=(2, GENES)) * np.array([[2.0], [1.0]])
        for donor in range(num_batches):
            deviation = 0.8 * rng.normal(size=GENES)
            rest = 0.1 * rng.normal(size=GENES)
            means = {"ctrl": level + deviation, "drug": level + effect + (1 + slope) * deviation + rest}
            for condition, mean in means.items():
                blocks.append(mean + rng.normal(size=(num_cells, GENES)))
                obs += [(condition, kind, f"d{donor}")] * num_cells
    frame = pd.DataFrame(obs, columns=["condition", "kind", "donor"])
    frame.index = [f"cell{i}" for i in range(len(frame))]
    return AnnData(np.concatenate(blocks), obs=frame, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


@pytest.fixture(scope="module")
def populations():
    return read_populations(simulated_screen(), **KEYS)


@pytest.fixture(scope="module")
def screen(populations):
    return Screen(populations)


def run_law(screen, fitters, source=None):
    """Leave one batch out; scores of the held-out populations of `screen`, predictors trained on `source`."""
    folds, labels = [], []
    for split in leave_one_batch_out((source or screen).populations.labels):
        predictors = {name: fit_fold(source or screen, split, fitter) for name, fitter in fitters.items()}
        scores, targets = law_fold(source or screen, split, predictors, np.ones(GENES), 0)
        folds.append(scores)
        labels.append(targets)
    return summarise_law(concatenate_laws(folds), pd.concat(labels))


@pytest.fixture(scope="module")
def baseline_summary(screen):
    return run_law(screen, baseline_fitters(200))


def test_gene_table_equals_the_cells(populations, screen):
    data = simulated_screen()
    for name in screen.table.labels.index[::5]:
        kind, condition, donor = name.split(" | ")
        obs = data.obs
        cells = data.X[(obs["kind"] == kind) & (obs["condition"] == condition) & (obs["donor"] == donor)]
        row = screen.table.rows(pd.Index([name]))
        np.testing.assert_allclose(row.mean[0], cells.mean(0))
        np.testing.assert_allclose(row.own_variance[0], cells.var(0, ddof=1))
        assert 0.5 < np.median(row.noise[0] / cells.var(0, ddof=1) * len(cells)) < 2
    np.testing.assert_allclose(screen.table.total_sd(), data.X.std(0), rtol=0.01)  # n - 1 within


def test_a_population_of_one_cell_borrows_its_noise(populations):
    name = "B | drug | d2"
    table = gene_table(populations.keep_cells(name, 1))
    j = table.labels.index.get_loc(name)
    alike = [f"B | drug | d{i}" for i in (0, 1, 3, 4, 5)]
    others = table.rows(pd.Index(alike))
    np.testing.assert_allclose(table.noise[j], others.own_variance.mean(0), rtol=0.25)  # classes lean too


def test_a_gene_silent_in_a_small_population_is_not_known_exactly():
    rng = np.random.default_rng(0)
    number = np.tile([10, 20, 40, 400], 4)  # cells that express each of 40 genes with probability 0.05
    cells = [rng.random((n, 40)) < 0.05 for n in number]
    mean, variance = (
        np.array([f(x) for x in cells]) for f in (lambda x: x.mean(0), lambda x: x.var(0, ddof=1))
    )
    names = pd.Index([f"p{i}" for i in range(len(number))])
    labels = pd.DataFrame({"context": "B", "is_control": False}, index=names)
    table = table_of(labels, number.astype(float), mean, variance)
    silent = mean == 0
    assert silent.sum() > 40
    assert (
        0.05 / np.sqrt(table.noise[silent])
    ).max() < 3  # standard deviations between silence and the truth
    part = table.select(number < 400)  # what is left out tells nothing
    assert not np.array_equal(part.noise, table.noise[number < 400])
    np.testing.assert_array_equal(table.rows(names[:6]).noise, table.noise[:6])


def test_given_controls_come_before_training_ones(screen):
    labels = screen.table.labels
    own = screen.table
    other = GeneTable(labels, own.n, own.mean + 100, own.variance, own.own_variance)
    targets = labels.loc[["T | drug | d3"]]
    mean, _, number = controls_of([other, screen.table], targets)
    np.testing.assert_allclose(mean[0], screen.table.rows(pd.Index(["T | ctrl | d3"])).mean[0] + 100)
    assert number[0] == 60
    no_controls = screen.table.select((labels["context"] == "B").to_numpy())
    assert np.isnan(controls_of([no_controls], targets)[0]).all()


def test_the_baselines_stand_in_the_right_order(baseline_summary):
    excess = {name: model["mean"]["excess"] for name, model in baseline_summary["models"].items()}
    assert excess["own-baseline slope"] < 0.7 * excess["null"]
    assert excess["null"] < 0.7 * excess["no change"]
    assert excess["training means"] < excess["no change"]
    assert baseline_summary["models"]["own-baseline slope"]["verdicts"]["crps"]["null"]["outcome"] == "wins"
    assert baseline_summary["models"]["no change"]["verdicts"]["crps"]["null"]["outcome"] == "loses"
    ratio = baseline_summary["models"]["own-baseline slope"]["relative_to_null"]["crps"]
    assert ratio["upper_90"] < 1
    assert len(ratio["per_batch"]) == 6
    assert baseline_summary["num_targets"] == 12
    assert law_rows(baseline_summary).shape[0] == len(baseline_fitters())


def test_an_oracle_is_calibrated_and_a_planted_fraud_moves_its_score(screen, populations):
    labels = populations.labels
    truth = screen.table.select(~labels["is_control"].to_numpy())
    control = screen.table.rows(pd.Index([name.replace("drug", "ctrl") for name in truth.labels.index]))
    rng = np.random.default_rng(5)
    # off the truth by its sampling noise and by 0.2, and aware of both
    shape = truth.mean.shape
    shift = truth.mean - control.mean + np.sqrt(truth.noise + 0.04) * rng.normal(size=shape)
    spread = 0.2 * rng.normal(size=(300, *shape))
    unit = np.ones(GENES)

    def scores(factor=1.0, width=1.0):
        return score_targets(control.mean + factor * shift + width * spread, truth, unit).targets.mean()

    honest = scores()
    assert honest["covered_90"] == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / truth.mean.size))
    assert honest["excess"] == pytest.approx(0.04, abs=4 * (0.04 + 1 / 60) * np.sqrt(2 / truth.mean.size))
    for fraud in (scores(factor=0.5), scores(factor=2.0)):
        assert fraud["excess"] > 3 * honest["excess"]
        assert fraud["crps"] > 1.5 * honest["crps"]
    too_wide = scores(width=6.0)
    assert too_wide["excess"] == pytest.approx(honest["excess"], abs=0.01)
    assert too_wide["crps"] > 1.3 * honest["crps"]
    assert too_wide["energy"] > 1.2 * honest["energy"]
    assert scores(width=0.0)["covered_90"] < 0.75


def test_shuffled_batch_labels_take_the_gain_away(screen, baseline_summary):
    shuffled = Screen(shuffle_batches(screen.populations, seed=1))
    fitters = {name: baseline_fitters(200)[name] for name in ("null", "training means", "own-baseline slope")}
    mixed = run_law(screen, fitters, source=shuffled)["models"]
    honest = baseline_summary["models"]
    slope = mixed["own-baseline slope"]["mean"]["crps"]
    assert honest["own-baseline slope"]["mean"]["crps"] < 0.85 * honest["null"]["mean"]["crps"]
    assert slope > 0.97 * mixed["training means"]["mean"]["crps"]  # nothing is gained from the wrong controls
    assert mixed["null"]["mean"]["crps"] > 1.3 * honest["null"]["mean"]["crps"]


def test_shuffling_moves_every_control_and_nothing_else(populations):
    shuffled = shuffle_batches(populations, seed=3)
    columns = ["context", "batch", "is_control", "perturbation"]
    order = shuffled.labels[columns].assign(is_control=~shuffled.labels["is_control"])
    assert order.equals(order.sort_values(columns))
    before = populations.labels.index[populations.cell_population]
    after = shuffled.labels.index[shuffled.cell_population]
    for old, new in set(zip(before, after, strict=True)):
        if "drug" in old:
            assert old == new
        else:
            assert old.rsplit(" | ", 1)[0] == new.rsplit(" | ", 1)[0]
            assert old != new
    assert sorted(shuffled.labels.index) == sorted(populations.labels.index)
    some = populations.select((populations.labels["context"] == "T").to_numpy())
    assert (shuffle_batches(some).cell_population >= 0).sum() == some.num_cells


def test_a_fold_refuses_leaks_and_other_data(screen, populations, monkeypatch):
    split = leave_one_batch_out(populations.labels)[0]
    seen = []
    fit_fold(screen, split, lambda training: seen.append(training) or Predictor())
    assert not seen[0].populations.labels["batch"].isin(["d0"]).any()
    assert len(seen[0].table.labels) == 20
    other = Split(split.name, 0, split.held_out, (), "another hash")
    with pytest.raises(ValueError, match="other data"):
        fit_fold(screen, other, lambda training: Predictor())
    monkeypatch.setattr(
        "hilbertcell.analyses.benchmark.training_mask", lambda s, labels: np.ones(len(labels), bool)
    )
    with pytest.raises(LeakError, match="hidden populations were used to fit"):
        fit_fold(screen, split, lambda training: Predictor())


@pytest.mark.parametrize("name", ["unseen_batch", "unseen_context"])
def test_only_controls_are_given(screen, populations, name):
    split = make_split(populations.labels, name)
    given = given_screen(screen, split, 0).populations.labels
    assert given["is_control"].all()
    assert set(given["batch"]) == set(populations.labels.loc[list(split.held_out), "batch"])
    scores, targets = law_fold(
        screen,
        split,
        {n: fit_fold(screen, split, f) for n, f in baseline_fitters(50).items()},
        np.ones(GENES),
        0,
    )
    assert len(targets) == len(split.held_out)
    assert np.isfinite(scores["null"].targets.to_numpy()).all()


def test_cells_are_scored_on_units_with_enough_of_them(populations):
    small = populations.keep_cells("B | drug | d0", 19).keep_cells("T | ctrl | d0", 39)
    held_out = leave_one_batch_out(small.labels)[0].held_out
    assert not len(cell_units(small.labels, held_out))
    units = cell_units(populations.labels, held_out)
    assert units["control"].tolist() == ["B | ctrl | d0", "T | ctrl | d0"]


def test_the_reference_is_never_transported_and_numbers_are_equal(screen, populations, monkeypatch):
    from hilbertcell.analyses import benchmark as module

    split = leave_one_batch_out(populations.labels)[2]
    asked, references = {}, []

    def remember(prediction, truth, reference):
        references.append(reference)
        return score_cells(prediction, truth, reference)

    monkeypatch.setattr(module, "score_cells", remember)

    def spy(given, targets, num_cells, seed):
        asked["given"] = given.populations
        asked["targets"], asked["num_cells"] = targets, num_cells
        return [np.random.default_rng(0).normal(size=(n, GENES)) for n in num_cells]

    scores = cell_fold(screen, split, {"spy": Predictor(cells=spy)}, seed=0)["spy"]
    assert asked["given"].labels["num_cells"].tolist() == [30, 30]
    assert asked["num_cells"].tolist() == [30, 30]
    assert "control" not in asked["targets"]
    for name, reference in zip(asked["given"].labels.index, references, strict=True):
        transported = natural_cells(populations, asked["given"].cells_of(name))
        controls = natural_cells(populations, populations.cells_of(name))
        both = np.concatenate([transported, reference])
        np.testing.assert_array_equal(np.sort(both, axis=0), np.sort(controls, axis=0))
    assert np.isfinite(scores["pearson"]).all()
    assert scores["batch"].tolist() == ["d2", "d2"]


def test_training_cells_beat_no_change_and_fresh_cells_beat_both(screen, populations):
    fitters = {name: baseline_fitters(50)[name] for name in ("no change", "training cells")}

    def fresh(given, targets, num_cells, seed):
        # other cells of the held-out populations: the ceiling of any prediction
        rng = np.random.default_rng(seed + 1)
        table = screen.table.rows(targets.index)
        return [m + rng.normal(size=(n, GENES)) for m, n in zip(table.mean, num_cells, strict=True)]

    folds = []
    for split in leave_one_batch_out(populations.labels):
        predictors = {name: fit_fold(screen, split, fitter) for name, fitter in fitters.items()}
        folds.append(cell_fold(screen, split, predictors | {"fresh": Predictor(cells=fresh)}, 0))
    units = {name: pd.concat([fold[name] for fold in folds]) for name in folds[0]}
    batch = units["fresh"]["batch"]
    summary = summarise_cells({n: t.drop(columns="batch") for n, t in units.items()}, batch)
    mean = {name: model["mean"] for name, model in summary["models"].items()}
    assert mean["fresh"]["energy_distance"] < 0.2 * mean["training cells"]["energy_distance"]
    assert mean["training cells"]["energy_distance"] < mean["no change"]["energy_distance"]
    assert 0.85 < mean["fresh"]["within_variance_ratio"] < 1.15
    assert 0.75 < mean["fresh"]["called_ratio"] < 1.3
    assert mean["fresh"]["precision_at_N"] > mean["training cells"]["precision_at_N"]
    ratio = summary["models"]["fresh"]["relative_to_training_cells"]["mae"]
    assert ratio["ratio"] < 0.7
    assert cell_rows(summary).loc["training cells", "MAE, x"] == "1.000 ± 0.000"


def test_unequal_numbers_of_cells_are_refused():
    with pytest.raises(ValueError, match="got 3 predicted and 4 true"):
        score_cells(np.zeros((3, 2)), np.zeros((4, 2)), None)


def test_targets_that_a_model_cannot_predict_are_left_out_for_all(screen, populations):
    truth = screen.table.select(~populations.labels["is_control"].to_numpy())
    draws = truth.mean + 0.1 * np.random.default_rng(0).normal(size=(20, *truth.mean.shape))
    blind = draws.copy()
    blind[:, 3] = np.nan
    scores = {
        NULL: score_targets(blind, truth, np.ones(GENES)),
        "model": score_targets(draws, truth, np.ones(GENES)),
    }
    summary = summarise_law(scores, truth.labels)
    assert summary["num_targets"] == 11
    assert summary["not_scored"] == [truth.labels.index[3]]
    blind[:] = np.nan
    scores[NULL] = score_targets(blind, truth, np.ones(GENES))
    with pytest.raises(ValueError, match="none of 12 targets"):
        summarise_law(scores, truth.labels)


def test_benchmark_end_to_end_with_a_stand_in_for_the_model(populations, monkeypatch):
    from hilbertcell.analyses import benchmark as module

    def stand_in(num_draws, seed, settings):
        return module.baseline_fitters(num_draws)["training cells"]

    monkeypatch.setattr(module, "hilbertcell_fitter", stand_in)
    results = module.benchmark(populations, "unseen_batch", num_samples=50)
    text = json.dumps(results, allow_nan=False)  # plain JSON
    models = json.loads(text)["law"]["models"]
    assert models["hilbertcell"]["mean"] == models["training cells"]["mean"]
    assert results["cells"]["num_units"] == 12
    assert [len(results[kind]["models"]) for kind in ("law", "cells")] == [9, 7]


def test_references_of_cells_are_kept_from_fits_that_see_the_controls(populations, screen):
    split = make_split(populations.labels, "unseen_context", 0)
    source = training_source(screen, split, seed=0)
    seen, references = [], []

    def spy(training):
        seen.append({*training.populations.cell_names[training.populations.cell_population >= 0]})
        return baseline_fitters(20)["no change"](training)

    predictor = fit_fold(screen, split, spy, source)
    scores = cell_fold(screen, split, {"no change": predictor}, 0)["no change"]
    assert len(scores) == 6  # the hidden context of six donors
    control = [name.replace("drug", "ctrl") for name in split.held_out]
    for name in control:
        half = set(source.populations.cells_of(name).tolist())
        references += [p for p in populations.cells_of(name) if p not in half]
    assert len(references) == 6 * 30
    assert not seen[0].intersection(populations.cell_names[references])
    left_out = leave_one_batch_out(populations.labels)[0]
    assert training_source(screen, left_out, 0) is screen  # there the controls are not in training
