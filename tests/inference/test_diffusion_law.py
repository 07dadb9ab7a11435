"""The trained law: without a network it is the program, with one it keeps what was given; the choice between the two."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from hilbertcell.inference.diffusion_conditions import label_features
from hilbertcell.inference.diffusion_law import (
    held_out_batches,
    labels_of,
    see_populations,
)
from hilbertcell.inference.fit import load_fit
from hilbertcell.inference.law_choice import GAUSSIAN, choose_law
from hilbertcell.inference.paired_test import p_greater
from hilbertcell.inference.settings import Settings
from tests.untrained_law import with_law


@pytest.fixture(scope="module")
def diffused(without_d5):
    return with_law(without_d5)


def test_a_network_of_zeros_draws_from_the_program(without_d5, diffused, d5):
    """Globals and latents are shared, so that the difference of two means has the spread of eps' alone."""
    num = 400
    gaussian = without_d5.predict(d5, num_samples=num)["predictions"]["mean"].values[0]
    drawn = diffused.predict(d5, num_samples=num)["predictions"]["mean"].values[0]
    difference = drawn - gaussian
    assert np.abs(difference.mean(0) / difference.std(0)).max() < 4.5 / np.sqrt(num)
    ratio = np.log(drawn.std(0) / gaussian.std(0))
    assert np.abs(ratio).max() < 4.5 / np.sqrt(num)
    assert np.abs(difference).max() > 0  # other draws of the same law


@pytest.mark.slow
def test_a_network_moves_the_law(diffused, without_d5, d5):
    num = 100
    moved = with_law(without_d5, 1.0).predict(d5, num_samples=num)["predictions"]["mean"].values[0]
    still = diffused.predict(d5, num_samples=num)["predictions"]["mean"].values[0]
    assert np.abs(moved - still).mean((0, 2)).min() > 1e-3


@pytest.mark.slow
def test_given_populations_are_drawn_by_the_program(diffused, without_d5, d5):
    table = pd.DataFrame({"context": "liver", "perturbation": ["A", "B"], "batch": "d5"})
    given = d5.select((d5.labels["is_control"] | (d5.labels["perturbation"] == "A")).to_numpy())
    drawn, gaussian = (
        f.predict(given, targets=table, num_samples=30, observe=True)["predictions"]["mean"]
        for f in (diffused, without_d5)
    )
    seen = {"population": "liver | A | d5"}
    assert np.allclose(drawn.sel(seen), gaussian.sel(seen))
    assert not np.allclose(drawn.sel(population="liver | B | d5"), gaussian.sel(population="liver | B | d5"))


@pytest.mark.slow
def test_a_saved_law_draws_the_same(diffused, d5, tmp_path):
    diffused.save(tmp_path / "fit")
    again = load_fit(tmp_path / "fit")
    first, second = (f.predict(d5, num_samples=10) for f in (diffused, again))
    assert np.array_equal(first["predictions"]["mean"], second["predictions"]["mean"])
    assert again.choice == diffused.choice
    assert int(second["sample_stats"]["denoiser_evaluations"]) == 16
    assert not again.sampling


def test_conditions_of_training_populations(without_d5):
    seen, description = see_populations(without_d5, without_d5.moments, 0)
    labels = without_d5.moments.labels
    assert len(seen.batch) == int((~labels["is_control"]).sum())
    assert sorted(set(seen.batch)) == sorted(labels["batch"].unique())
    # standardised, but for the features that name the perturbation: 0 there must mean "none of these"
    _, named = labels_of(without_d5)
    features = np.asarray(seen.conditions.features)
    assert set(np.unique(features[..., -len(named) :][..., named])) == {0.0, 1.0}
    assert np.abs(features[..., : -len(named)].mean((0, 1))).max() < 1e-4
    # one draw's mean of v plus what it leaves open covers what was observed
    spread = (
        np.sqrt(
            np.asarray(seen.conditions.strength)[..., None] ** 2
            * np.asarray(seen.conditions.values)[:, 0].max(-1)[:, None, None]
        )
        + np.asarray(seen.points.level)[:, None]
    )
    assert (np.abs(seen.points.observed - seen.conditions.mean) / spread).mean() < 3
    again, same = see_populations(without_d5, without_d5.moments, 0, description)
    assert same is description
    assert np.allclose(again.conditions.features, seen.conditions.features, atol=1e-5)
    one = seen.select(seen.batch == "d0")
    assert set(one.batch) == {"d0"}
    assert one.points.root.shape[0] == one.conditions.mean.shape[1] == len(one.batch)


def test_labels_of_an_unseen_perturbation_and_a_combination(without_d5):
    from hilbertcell.data.perturbations import perturbation_table

    names = without_d5.names.extend([("liver", "A+B", -1.0), ("liver", "new", -1.0)])
    features = pd.DataFrame({"f": [1.0, 2.0, 4.0]}, index=["A", "B", "new"])
    table = perturbation_table(["A", "B", "A+B", "new"], "DMSO", features=features)
    rows, named = label_features(names, table, ["A", "B"])
    place = {c[:2]: i for i, c in enumerate(names.conditions)}
    assert rows[:, named].shape[1] == 2
    assert rows[place["liver", "A+B"]][named].tolist() == [1, 1]
    assert rows[place["liver", "new"]][named].tolist() == [0, 0]
    assert rows[place["liver", "new"], -1] == 4.0
    assert rows[place["liver", "A+B"], -1] == 3.0


def test_held_out_batches_are_whole_batches():
    batches = np.repeat([f"b{i}" for i in range(10)], 3)
    mask = held_out_batches(batches, 0.2, 0)
    assert len(set(batches[mask])) == 2
    assert not set(batches[mask]) & set(batches[~mask])
    assert not np.array_equal(mask, held_out_batches(batches, 0.2, 1))
    assert held_out_batches(np.array(["a", "b"]), 0.9, 0).sum() == 1


def test_gaussian_is_the_default_and_few_batches_choose_it(without_d5):
    assert Settings().law == "gaussian"
    assert choose_law(without_d5) == (GAUSSIAN, None)
    choice, law = choose_law(
        replace(without_d5, settings=without_d5.settings.model_copy(update={"law": "auto"}))
    )
    assert (choice.name, law) == ("gaussian", None)
    assert "5 batches" in choice.reason
    assert "12 are needed" in choice.reason


def test_a_tie_is_not_a_win():
    assert p_greater(np.array([0.5, -0.4, 0.3, -0.5])) > 0.05
    assert p_greater(np.array([5.0, 4.0, 6.0])) == 1.0  # too few batches to say
    assert p_greater(np.array([5.0, 4.0, 6.0, 5.5])) < 0.01
