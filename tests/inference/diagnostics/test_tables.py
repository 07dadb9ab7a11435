"""Checks of labels, replicates, microenvironments and held-out batches on arrays."""

import numpy as np
import pytest

from hilbertcell.inference.diagnostics import batches
from hilbertcell.inference.diagnostics.held_out import HeldOut, held_out_checks
from hilbertcell.inference.diagnostics.microenvironments import explained_by, known_factors
from hilbertcell.inference.diagnostics.replicates import Kinds, own_baseline_slope, predictive_checks


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def populations(rng, num_batches=6, num_kinds=4, num_genes=12):
    kind, batch = np.tile(np.arange(num_kinds), num_batches), np.repeat(np.arange(num_batches), num_kinds)
    own = rng.standard_normal((num_batches, num_genes))
    return kind, batch, own[batch] + rng.standard_normal((len(kind), num_genes))


def test_labels_that_mean_something_pass_and_exchanged_ones_do_not(rng):
    kind, batch, residual = populations(rng)
    assert batches.batch_labels(residual, kind, batch, rng).verdict == "ok"
    moved = batch.copy()
    for k in range(4):
        moved[kind == k] = np.roll(batch[kind == k], k)
    assert batches.batch_labels(residual, kind, moved, rng).verdict == "alarm"


def test_similarity_is_the_mean_product_of_residuals(rng):
    kind, batch, residual = populations(rng, 3, 2, 5)
    by_hand = np.mean([residual[2 * b] @ residual[2 * b + 1] / 5 for b in range(3)])
    assert batches.batch_labels(residual, kind, batch, rng).statistic == pytest.approx(by_hand)


def test_a_copy_is_found_and_named_and_a_second_sample_is_not(rng):
    names = [f"p{i}" for i in range(6)]
    variance, noise = np.full((6, 30), 0.04), 0.2 * rng.standard_normal((199, 6, 30))
    pairs = np.array([(i, j) for i in range(6) for j in range(i)])
    means = 0.2 * rng.standard_normal(
        (6, 30)
    )  # six samples of one law: the closest that independent cells come
    assert batches.copied_cells(means, variance, pairs, noise, names).verdict == "ok"
    means[4] = means[1]
    found = batches.copied_cells(means, variance, pairs, noise, names)
    assert (found.verdict, found.statistic, found.culprit) == ("alarm", 0.0, "p4 and p1")


def test_slopes_of_a_swapped_a_doubled_and_an_absent_batch(rng):
    effect = rng.standard_normal((3, 40))
    response = np.stack([effect, effect, effect, -effect, 2 * effect, effect])
    present = np.ones((6, 3), bool)
    present[5] = False
    slopes = batches.response_slopes(response, present)
    # the others' mean without batch 3: (1 + 1 + 1 + 2) / 4 effects; without 4: (1 + 1 + 1 - 1) / 4
    assert slopes[3] == pytest.approx(-1 / 1.25)
    assert slopes[4] == pytest.approx(2 / 0.5)
    assert np.isnan(slopes[5])


def test_one_batch_that_stands_out_is_named(rng):
    names = list("abcdefgh")
    values = 1 + 0.1 * rng.standard_normal(8)
    assert batches.outlying_batch(values, names, rng).verdict == "ok"
    values[3] = -1
    result = batches.outlying_batch(values, names, rng)
    assert (result.verdict, result.culprit) == ("alarm", "d")
    assert batches.outlying_batch(np.array([1.0, 1.1, 9.0]), list("abc"), rng).p is None


def test_a_factor_that_is_library_size_is_found_whatever_its_orientation(rng):
    library = rng.standard_normal(8)
    other = rng.standard_normal(8)
    angle = 0.7
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    factors = np.column_stack([library, rng.standard_normal(8)]) @ rotation
    covariates = np.column_stack([other, 3 * library + 0.02 * rng.standard_normal(8)])
    result = explained_by(factors, covariates, ("cells", "library"), rng)
    assert (result.verdict, result.culprit) == ("alarm", "library")
    assert result.statistic > 0.99


def test_without_factors_nothing_is_explained(rng):
    assert explained_by(np.zeros((5, 0)), np.ones((5, 1)), ("a",), rng).verdict == "ok"
    assert known_factors(np.zeros((10, 5, 0))).verdict == "ok"


def test_a_factor_left_at_its_prior_is_pointed_out(rng):
    draws = rng.standard_normal((400, 6, 2)) * [0.3, 1.0]
    result = known_factors(draws)
    assert (result.verdict, result.culprit) == ("watch", "factor 1")
    assert result.details["factor 0"] == pytest.approx(1 - 0.09, abs=0.02)


KINDS = Kinds(np.arange(24).reshape(6, 4), np.array([0, 0, 0, 0]))


def make_tables(rng, number, scale=1.0, slope=-0.5):
    control = scale * rng.standard_normal((number, 6, 1, 10))
    perturbed = control * (1 + slope) + scale * rng.standard_normal((number, 6, 3, 10))
    return np.concatenate([control, perturbed], axis=2).reshape(number, 24, 10)


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"scale": 0.5}, "spread between batches"),
        ({"scale": 2.0}, "spread between batches"),
        ({"slope": 0.5}, "slope on own baseline"),
    ],
)
def test_replicates_that_are_unlike_the_table_are_noticed(rng, change, check):
    observed, replicates = make_tables(rng, 1)[0], make_tables(rng, 199)
    assert {r.verdict for r in predictive_checks(observed, replicates, KINDS).values()} == {"ok"}
    found = predictive_checks(observed, make_tables(rng, 199, **change), KINDS)
    assert found[check].verdict == "alarm"


def test_one_wild_value_is_noticed(rng):
    observed = make_tables(rng, 1)[0]
    observed[5, 3] += 8.0
    assert predictive_checks(observed, make_tables(rng, 199), KINDS)["largest residual"].verdict == "alarm"


def test_the_slope_leaves_missing_populations_out(rng):
    control = rng.standard_normal((6, 1, 10))
    table = np.concatenate([control, 0.5 * control], axis=1)  # response is -0.5 x control
    table[2, 1] = np.nan
    assert own_baseline_slope(table, np.array([0, 0])) == pytest.approx(-0.5)


def held(rng, number=6, spread=1.0, strength=1.0):
    out = []
    for b in range(number):
        mean, loading = rng.standard_normal((4, 24)), 0.3 * rng.standard_normal((4, 24))
        table = loading * rng.standard_normal((151, 1, 1)) + 0.3 * rng.standard_normal((151, 4, 24))
        out.append(HeldOut(f"d{b}", strength * mean + spread * table[0], mean + table[1:], np.zeros((4, 24))))
    return out


def test_right_laws_pass_and_wrong_ones_do_not(rng):
    verdicts = lambda results: {name: result.verdict for name, result in results.items()}
    assert set(verdicts(held_out_checks(held(rng), rng)).values()) == {"ok"}
    narrow = held_out_checks(held(rng, 10, spread=3.0), rng)
    assert verdicts(narrow)["cover"] == "alarm"
    assert narrow["cover"].statistic < 0.75
    assert verdicts(held_out_checks(held(rng, 10, spread=0.3), rng))["cover"] == "alarm"
    weak = held_out_checks(held(rng, strength=0.5), rng)
    assert verdicts(weak)["strength"] == "alarm"
    assert weak["strength"].statistic == pytest.approx(0.5, abs=0.1)


def test_three_batches_never_raise_an_alarm(rng):
    found = held_out_checks(held(rng, number=3, spread=4.0), rng)
    assert {result.verdict for result in found.values()} <= {"ok", "watch"}
    assert found["cover"].verdict == "watch"
