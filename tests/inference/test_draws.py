"""What prediction promises: labels, identities between variables, known and new batches, observation."""

import json

import arviz as az
import numpy as np
import pandas as pd
import pytest

from hilbertcell.data.validation import DataError
from hilbertcell.inference.fit import fit

from .conftest import SETTINGS, make_screen, populations_of


@pytest.fixture(scope="module")
def draws(without_d5, d5):
    return without_d5.predict(d5, num_samples=60, seed=2)


def test_groups_dimensions_and_coordinates(draws):
    predictions = draws["predictions"]
    assert predictions["mean"].dims == ("chain", "draw", "population", "gene")
    assert predictions["mean"].shape == (1, 60, 4, 5)
    assert list(predictions.indexes["population"]) == sorted(predictions.indexes["population"])
    assert set(predictions["batch"].values) == {"d5"}
    assert predictions["mean"].dtype == np.float32
    assert list(draws["log_likelihood"].data_vars) == ["response"]
    assert draws["log_likelihood"]["response"].dims == ("chain", "draw", "batch")
    assert "population" not in draws["posterior"].dims
    assert draws["posterior"]["microenvironment"].dims == ("chain", "draw", "batch", "factor")
    assert list(draws["posterior"]["batch"].values) == ["d0", "d1", "d2", "d3", "d4", "d5"]
    assert draws["predictions"].attrs["scale"] == "other"
    shares = draws["constant_data"]["variance_decomposition"]
    assert float(shares.sum()) == pytest.approx(1.0)
    assert "ignored" in json.loads(draws["constant_data"].attrs["warnings"])[-1]


def test_mean_is_drawn_control_mean_plus_shift(draws, d5, without_d5):
    control = (draws["predictions"]["mean"] - draws["predictions"]["shift"]).isel(chain=0)
    observed = draws["observed_data"]["control_mean"]
    noise = np.sqrt(draws["constant_data"]["control_variance"] / draws["constant_data"]["control_n"])
    spread = control.std("draw")
    assert (spread > 0).all()  # drawn, not plugged in
    assert (spread < 1.3 * noise).all()  # and informed by the controls that were given
    assert (abs(control.mean("draw") - observed) < 4 * noise).all()
    labels = d5.labels.index[d5.labels["is_control"]]
    assert set(draws["constant_data"]["control_n"].values) == set(d5.labels.loc[labels, "num_cells"])


def test_the_strongest_responses_are_drawn_in_every_batch(draws):
    posterior, measured = draws["posterior"].dataset, draws["constant_data"]["measured_response"]
    assert posterior["batch_response"].dims == ("chain", "draw", "batch", "leading_condition", "leading_gene")
    assert set(posterior["leading_condition"].values) == set(posterior["condition"].values)
    assert list(measured["training_batch"].values) == ["d0", "d1", "d2", "d3", "d4"]
    cells = make_screen()
    means = cells.to_df().groupby([cells.obs[name] for name in ("tissue", "drug", "donor")]).mean()
    for condition in posterior["leading_condition"].values:
        tissue, drug = condition.split(" | ")
        names = posterior["gene_name"].sel(leading_condition=condition).values
        assert names[0] == {"A": "gene0", "B": "gene1"}[drug]  # the largest planted effect
        for donor in measured["training_batch"].values:
            shift = means.loc[tissue, drug, donor] - means.loc[tissue, "DMSO", donor]
            one = measured.sel(training_batch=donor, leading_condition=condition)
            np.testing.assert_allclose(one, shift[names].to_numpy(), atol=1e-6)
        # The new batch: predictions add what is particular to one population, whose mean is zero.
        shift = (
            draws["predictions"]["shift"].sel(population=f"{tissue} | {drug} | d5", gene=names).isel(chain=0)
        )
        expected = posterior["batch_response"].sel(batch="d5", leading_condition=condition).isel(chain=0)
        error = shift.std("draw").values * np.sqrt(2 / shift.sizes["draw"])
        assert (abs(shift.mean("draw").values - expected.mean("draw").values) < 5 * error).all()
    # What batches share is what they average to, and they do differ.
    response, fixed = posterior["batch_response"].mean(("chain", "draw")), posterior["fixed_response"]
    spread = response.std("batch")
    gap = abs(response.mean("batch") - fixed.mean(("chain", "draw")))
    assert (gap < 3 * fixed.std(("chain", "draw")) + 3 * spread / np.sqrt(6)).all()
    assert float(spread.max()) > 0.05


def test_arviz_reads_the_tree_and_it_survives_netcdf(draws, tmp_path):
    draws.to_netcdf(tmp_path / "draws.nc")
    again = az.from_netcdf(tmp_path / "draws.nc")
    np.testing.assert_array_equal(again["predictions"]["mean"], draws["predictions"]["mean"])
    assert again["predictions"].attrs["units"] == "units of the data"
    with pytest.warns(UserWarning, match="Pareto"):  # five batches that the fit leans on: LOO must say so
        assert np.isfinite(az.loo(again).elpd)


def test_draws_depend_on_the_seed_alone(without_d5, d5, draws):
    same, other = (without_d5.predict(d5, num_samples=60, seed=seed) for seed in (2, 3))
    np.testing.assert_array_equal(same["predictions"]["mean"], draws["predictions"]["mean"])
    assert not np.allclose(other["predictions"]["mean"], draws["predictions"]["mean"])


def test_observed_cells_move_the_prediction_of_the_other_conditions(without_d5, d5):
    only_a = d5.select(d5.labels["is_control"] | (d5.labels["perturbation"] == "A"))
    blind, seen = (without_d5.predict(only_a, num_samples=300, observe=o, seed=0) for o in (False, True))
    flags = seen["constant_data"]["target_observed"]
    assert flags.values.tolist() == [p == "A" for p in flags["perturbation"].values]
    assert not blind["constant_data"]["target_observed"].any()
    sd = {
        name: tree["predictions"]["mean"].isel(chain=0).std("draw")
        for name, tree in (("b", blind), ("s", seen))
    }
    on_a = sd["b"]["perturbation"].values == "A"
    assert (sd["s"].values[on_a] < sd["b"].values[on_a]).all()
    assert sd["s"].values[~on_a].mean() < sd["b"].values[~on_a].mean()


def test_a_known_batch_uses_its_training_posterior_and_must_bring_its_controls(without_d5, screen):
    d0 = screen.select((screen.labels["batch"] == "d0").to_numpy())
    known = without_d5.predict(d0, num_samples=200)
    assert known["constant_data"]["target_observed"].all()
    other = make_screen(seed=9)
    strange = populations_of(other[other.obs["donor"] == "d0"].copy())
    with pytest.raises(DataError, match=r"d0.*--new-batch"):
        without_d5.predict(strange)
    new = without_d5.predict(strange, num_samples=50, new_batch=True)
    assert list(new["posterior"]["batch"].values)[-1] == "d0 (new)"
    assert not new["constant_data"]["target_observed"].any()


def test_targets_are_honoured_or_refused_by_name(without_d5, d5):
    table = pd.DataFrame({"context": ["liver"], "perturbation": ["B"], "batch": ["d5"]})
    tree = without_d5.predict(d5, targets=table, num_samples=5)
    assert list(tree["predictions"]["population"].values) == ["liver | B | d5"]
    for column, value, culprit in [
        ("context", "kidney", "kidney"),
        ("batch", "d9", "d9"),
        ("perturbation", "C", "'C'"),
        ("perturbation", "DMSO", "control label"),
    ]:
        with pytest.raises(DataError, match=culprit):
            without_d5.predict(d5, targets=table.assign(**{column: value}), num_samples=5)
    with pytest.raises(DataError, match="dose 'high'"):
        without_d5.predict(d5, targets=table.assign(dose="high"), num_samples=5)
    with pytest.raises(DataError, match="perturbation"):
        without_d5.predict(d5, targets=table.drop(columns="perturbation"), num_samples=5)


def test_a_context_without_controls_is_predicted_more_widely(without_d5, d5):
    spleen_only = d5.select((d5.labels["context"] == "spleen") | ~d5.labels["is_control"])
    table = pd.DataFrame({"context": ["liver", "spleen"], "perturbation": ["A", "A"], "batch": ["d5", "d5"]})
    full = without_d5.predict(d5, targets=table, num_samples=400)
    part = without_d5.predict(
        spleen_only.select(spleen_only.labels["is_control"] | (spleen_only.labels["perturbation"] == "A")),
        targets=table.iloc[1:], num_samples=400,
    )  # fmt: skip
    assert np.isfinite(part["predictions"]["mean"]).all()
    assert full["predictions"]["mean"].shape[2] == 2


def test_a_context_that_training_saw_unperturbed_is_predicted_from_the_others(screen, d5):
    labels = screen.labels
    hidden = (labels["context"] == "spleen") & ~labels["is_control"]
    fitted = fit(screen.select(~hidden & (labels["batch"] != "d5")), settings=SETTINGS)
    tree = fitted.predict(d5, num_samples=20, observe=False)
    unseen = tree["constant_data"].dataset.sel(population="spleen | A | d5")
    assert np.isfinite(tree["predictions"]["mean"]).all()
    assert (unseen["noise_variance"] > 0).all()
    assert int(unseen["training_num_batches"]) == 0


def test_other_genes_scale_or_context_are_refused(without_d5, d5):
    other = make_screen()
    other.var_names = [f"probe{i}" for i in range(5)]
    with pytest.raises(DataError, match="probe0"):
        without_d5.predict(populations_of(other))
    kidney = make_screen()
    kidney.obs["tissue"] = kidney.obs["tissue"].replace({"liver": "kidney"})
    with pytest.raises(DataError, match=r"kidney.*liver"):
        without_d5.predict(populations_of(kidney), new_batch=True)
    with pytest.raises(DataError, match="log1p"):
        without_d5.predict(populations_of(_positive(), scale="log1p"))
    with pytest.raises(DataError, match=r"100000000 x 4 x 5.*fewer draws"):
        without_d5.predict(d5, num_samples=100_000_000)
    with pytest.raises(DataError, match="num_samples = 1"):
        without_d5.predict(d5, num_samples=1)


def _positive():
    screen = make_screen()
    screen.X = np.abs(screen.X)
    return screen
