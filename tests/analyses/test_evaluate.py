import json

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from anndata import AnnData

from hilbertcell.analyses.evaluate import evaluate
from hilbertcell.analyses.gene_table import baseline_inputs, controls_of, gene_table
from hilbertcell.analyses.law_summary import score_targets
from hilbertcell.data.anndata_io import read_populations
from hilbertcell.data.splits import LeakError
from hilbertcell.data.validation import DataError
from hilbertcell.models.baselines import mean_shift_null, training_shift

GENES = 15
KEYS = {"perturbation": "condition", "control": "ctrl", "context": "kind", "batch": "donor", "scale": "other"}
HELD_OUT = ("d0", "d1", "d2", "d3")


def cells(num_cells=80, seed=0):
    rng = np.random.default_rng(seed)
    blocks, obs = [], []
    effect = rng.normal(size=(2, GENES))
    for donor in range(9):
        deviation = rng.normal(size=(2, GENES))
        for k, kind in enumerate(("B", "T")):
            for condition in ("ctrl", "drug"):
                rest = effect[k] + 0.3 * rng.normal(size=GENES) if condition == "drug" else 0.0
                blocks.append(10 + deviation[k] + rest + rng.normal(size=(num_cells, GENES)))
                obs += [(condition, kind, f"d{donor}")] * num_cells
    frame = pd.DataFrame(obs, columns=["condition", "kind", "donor"])
    frame.index = [f"c{i}" for i in range(len(frame))]
    return AnnData(np.concatenate(blocks), obs=frame, var=pd.DataFrame(index=[f"g{i}" for i in range(GENES)]))


@pytest.fixture(scope="module")
def everything():
    return read_populations(cells(), **KEYS)


@pytest.fixture(scope="module")
def tree(everything):
    """Draws of a good law for four held-out donors, with the constants that a fit would store beside them."""
    table = gene_table(everything)
    labels = table.labels
    held = labels["batch"].isin(HELD_OUT).to_numpy()
    training, given = table.select(~held), table.select(held & labels["is_control"].to_numpy())
    targets = labels[held & ~labels["is_control"].to_numpy()]
    inputs = baseline_inputs(training, given, targets)
    shift, variance, number = training_shift(*inputs)
    control_mean, control_noise, control_n = controls_of([given], targets)
    truth = table.rows(targets.index)
    rng = np.random.default_rng(1)
    off = truth.mean + np.sqrt(truth.noise + 0.01) * rng.normal(size=truth.mean.shape)
    mean = (off + 0.1 * rng.normal(size=(1, 200, *off.shape))).astype(np.float32)
    coords = {
        "population": targets.index.to_numpy(dtype=str),
        **{
            name: ("population", targets[name].to_numpy(dtype=str))
            for name in ("context", "perturbation", "batch")
        },
        "gene": everything.genes,
    }
    pair = ("population", "gene")
    constants = xr.Dataset(
        {
            "control_n": ("population", control_n),
            "control_variance": (pair, control_noise * control_n[:, None]),
            "target_observed": ("population", np.zeros(len(targets), bool)),
            "training_shift": (pair, shift),
            "training_shift_sd": (pair, np.sqrt(variance)),
            "training_num_batches": ("population", number),
        },
        coords=coords,
        attrs={"training_populations": json.dumps(training.labels.index.tolist())},
    )
    predictions = xr.Dataset({"mean": (("chain", "draw", *pair), mean)}, coords=coords)
    observed = xr.Dataset({"control_mean": (pair, control_mean)}, coords=coords)
    groups = {"predictions": predictions, "constant_data": constants, "observed_data": observed}
    tree = xr.DataTree.from_dict(groups)
    tree.attrs["keys"] = json.dumps(everything.keys.to_dict())
    return tree


@pytest.fixture(scope="module")
def scores(tree, everything):
    return evaluate(tree, everything)


def test_a_good_law_beats_the_null_and_covers(scores):
    model = scores["law"]["models"]["prediction"]
    assert scores["law"]["batches"] == list(HELD_OUT)
    assert model["mean"]["covered_90"] == pytest.approx(0.9, abs=0.1)  # 120 values
    assert model["relative_to_null"]["excess"]["ratio"] < 0.5
    assert model["relative_to_null"]["crps"]["upper_90"] < 1
    assert model["verdicts"]["crps"]["null"]["outcome"] == "wins"
    assert len(scores["targets"]) == 8
    json.dumps(scores, allow_nan=False)


def test_the_null_is_that_of_the_training_populations(scores, everything):
    table = gene_table(everything)
    held = table.labels["batch"].isin(HELD_OUT).to_numpy()
    control = table.labels["is_control"].to_numpy(dtype=bool)
    targets = table.labels[held & ~control]
    inputs = baseline_inputs(table.select(~held), table.select(held & control), targets)
    draws = mean_shift_null(*inputs, 4000, np.random.default_rng(0))
    expected = score_targets(draws, table.rows(targets.index), table.total_sd()).targets
    found = scores["law"]["models"]["null"]["mean"]
    assert found["excess"] == pytest.approx(expected["excess"].mean(), rel=0.02)
    assert found["crps"] == pytest.approx(expected["crps"].mean(), rel=0.03)
    # A width from 200 draws is known to 6 %; targets x genes of them are averaged.
    error = 0.06 / np.sqrt(len(targets) * len(everything.genes))
    assert found["width_90"] == pytest.approx(expected["width_90"].mean(), rel=4 * error)


def test_genes_are_brought_into_order_and_cells_may_be_reordered(tree, everything, scores):
    data = cells()
    order = np.random.default_rng(2).permutation(data.n_obs)
    mixed = read_populations(data[order, ::-1].copy(), **KEYS)
    again = evaluate(tree, mixed)
    for name, values in scores["law"]["models"]["prediction"]["mean"].items():
        assert again["law"]["models"]["prediction"]["mean"][name] == pytest.approx(values, rel=1e-6)


def test_a_target_that_training_saw_is_a_leak(tree, everything):
    leaky = tree.copy(deep=True)
    seen = json.loads(leaky["constant_data"].attrs["training_populations"])
    leaky["constant_data"].attrs["training_populations"] = json.dumps([*seen, "T | drug | d1"])
    with pytest.raises(LeakError, match=r"T \| drug \| d1.*trained on them"):
        evaluate(leaky, everything)
    leaky["constant_data"]["target_observed"].loc[{"population": "T | drug | d1"}] = True
    marked = evaluate(leaky, everything)
    assert marked["observed"] == ["T | drug | d1"]
    assert marked["law"]["num_targets"] == 7
    assert "T | drug | d1" not in marked["targets"]
    del leaky["constant_data"].attrs["training_populations"]
    with pytest.raises(DataError, match="not known which cells the fit saw"):
        evaluate(leaky, everything)


def test_without_a_null_the_law_is_scored_alone(tree, everything):
    alone = tree.copy(deep=True)
    alone["constant_data"]["training_shift"][:] = np.nan
    result = evaluate(alone, everything)
    models = result["law"]["models"]
    assert list(models) == ["prediction"]
    assert models["prediction"]["relative_to_null"] == {}


def test_truth_without_the_targets_or_on_another_scale_is_refused(tree, everything):
    controls = everything.select(everything.labels["is_control"].to_numpy())
    with pytest.raises(DataError, match="none of them"):
        evaluate(tree, controls)
    other = read_populations(
        AnnData(np.abs(cells().X), obs=cells().obs, var=cells().var), **{**KEYS, "scale": "log1p"}
    )
    with pytest.raises(DataError, match="draws are on scale 'other'"):
        evaluate(tree, other)
    fewer = read_populations(cells()[:, :10].copy(), **KEYS)
    with pytest.raises(DataError, match="missing"):
        evaluate(tree, fewer)


def predicted_cells(factor=1.0, sources=40, draws=(-1,)):
    """Control cells of the held-out donors moved by `factor` times the true shift; source cells are named."""
    data = cells()
    parts = []
    for draw in draws:
        for kind in ("B", "T"):
            for donor in HELD_OUT:
                of = (data.obs["kind"] == kind) & (data.obs["donor"] == donor)
                control = data[of & (data.obs["condition"] == "ctrl")][:sources]
                truth = data[of & (data.obs["condition"] == "drug")].X.mean(0)
                all_controls = data[of & (data.obs["condition"] == "ctrl")].X.mean(0)
                obs = control.obs.assign(condition="drug", draw=draw, source_cell=control.obs_names)
                obs.index = [f"{name} draw {draw}" for name in obs.index]
                parts.append((control.X + factor * (truth - all_controls), obs))
    obs = pd.concat([part[1] for part in parts])
    return AnnData(np.concatenate([part[0] for part in parts]), obs=obs, var=data.var)


def test_cells_are_scored_against_untouched_controls(tree, everything):
    result = evaluate(tree, everything, predicted_cells())["cells"]
    good = result["models"]["prediction"]["mean"]
    assert result["targets"]["B | drug | d0"]["num_reference"] == 40
    assert result["targets"]["B | drug | d0"]["num_cells"] == 40
    assert good["pearson"] > 0.9
    assert good["precision_at_N"] > 0.7
    assert 0.85 < good["within_variance_ratio"] < 1.15
    half = evaluate(tree, everything, predicted_cells(factor=0.5))["cells"]["models"]["prediction"]["mean"]
    assert half["mae"] > 1.5 * good["mae"]
    assert half["called_ratio"] < 0.8 * good["called_ratio"]
    assert half["energy_distance"] > good["energy_distance"] + 0.3


def test_without_untouched_controls_nothing_is_called(tree, everything):
    result = evaluate(tree, everything, predicted_cells(sources=80))["cells"]
    assert "all controls were transported" in result["note"]
    assert "called" not in result["models"]["prediction"]["mean"]
    assert result["models"]["prediction"]["mean"]["energy_distance"] < 0.5


def test_draws_are_scored_one_by_one_and_never_pooled(tree, everything):
    one = evaluate(tree, everything, predicted_cells())["cells"]["models"]["prediction"]["mean"]
    both = predicted_cells(draws=(0, 1))
    both.X[both.obs["draw"] == 1] += 3.0  # pooled, the variance between cells would be 2.25 larger
    two = evaluate(tree, everything, both)["cells"]["models"]["prediction"]["mean"]
    assert two["within_variance_ratio"] == pytest.approx(one["within_variance_ratio"], rel=0.02)
    assert two["mae"] > 1.0
